"""Commands that ask how good a model is, and whom it gives away."""

import functools
import re
from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli.options import Device, Experiment, Guidance, ModelPath, Precision, Root, SamplerName, Seed, Steps, app
from ldm3d.errors import InputError

Pattern = Annotated[
    str | None,
    typer.Option(help="Which of the label maps, where a scan has several: glob of name or path, '*desc-aseg_dseg*'."),
]


@app.command()
def evaluate(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="BIDS folder or table; subjects that were trained on are left out.")],
    root: Root = None,
    experiment: Experiment = None,
    out: Annotated[Path, typer.Option(help="Where to write the page and the figures.")] = Path("evaluation"),
    num: Annotated[
        int, typer.Option("--num", "--volumes", min=3, help="To generate for held-out subjects' covariates.")
    ] = 200,
    measure: Annotated[
        str, typer.Option(help="package.module:function (volume, spacing_mm) -> {covariate: value}")
    ] = "ldm3d.rulers.volumetry:measure_volumes",
    features: Annotated[
        str,
        typer.Option(
            help="What distributions are compared by: random, medicalnet:FILE, radimagenet:FILE, package.module:function"
        ),
    ] = "random",
    predict: Annotated[bool, typer.Option(help="Read what MEASURE does not give (age) off the image, by regression.")] = True,
    downstream: Annotated[bool, typer.Option("--downstream", help="Train regressors on real, synthetic and both.")] = False,
    with_likelihood: Annotated[bool, typer.Option("--likelihood", help="Score held-out volumes: some minutes.")] = False,
    with_audit: Annotated[
        bool, typer.Option("--audit", help="Look for copies; the page then shows training subjects.")
    ] = False,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Measure reconstruction and how generated volumes follow their covariates, for whom, and of what use; one HTML page.

    Training volumes in --data serve to learn what ages look like; nothing is judged on them.
    """
    import torch

    from ldm3d.experiment import scans_by_use
    from ldm3d.metrics.features import load_extractor
    from ldm3d.pipeline import Pipeline
    from ldm3d.precision import dtype
    from ldm3d.processes import own_device, started_processes
    from ldm3d.evaluation.assess import assess
    from ldm3d.report.write import summary, write_report
    from ldm3d.rulers.volumetry import load_measure

    processes = started_processes()
    where = device or own_device()
    kind = torch.float32 if with_likelihood and precision == "auto" else dtype(precision, where)  # see `likelihood`
    pipeline = Pipeline.from_pretrained(model, where, kind)
    pipeline.threads = None  # all: what is measured does not depend on the last bits
    function, extractor = load_measure(measure, where), load_extractor(features)
    sampling = pipeline.sampling.replace(seed=seed, steps=steps, guidance=guidance, sampler=sampler)
    scans = scans_by_use(model, data, out / "work", root, processes, experiment)  # the config, trained on, held out
    parts = {"predict": predict, "downstream": downstream, "likelihood": with_likelihood, "audit": with_audit}
    done = assess(pipeline, *scans, function, extractor, sampling, num, **parts, processes=processes)
    if processes.is_main:
        others = done.goals, done.extra, done.figures
        page = write_report(out, f"Evaluation of {model}", pipeline, done.found, sampling, *others)
        print(summary(done.found))
        print(f"page written to {page}")


@app.command()
def audit(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="BIDS folder or table with the scans it was trained on, and held-out subjects.")],
    root: Root = None,
    experiment: Experiment = None,
    out: Annotated[Path, typer.Option(help="Where to write; it will show training subjects.")] = Path("audit"),
    num: Annotated[
        int, typer.Option("--num", "--volumes", min=1, help="To generate, half of them for training subjects' own covariates.")
    ] = 200,
    synthetic: Annotated[Path | None, typer.Option(help="Folder of `ldm3d generate` to look at instead.")] = None,
    level: Annotated[
        float, typer.Option(min=1e-4, max=0.4, help="Share of new subjects' volumes that may be called copies.")
    ] = 0.05,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Look for copies of training subjects, and for what the model's loss tells of them; writes a page and a guard.

    `ldm3d generate --audit OUT` then withholds such volumes.
    """
    from ldm3d.experiment import scans_by_use
    from ldm3d.pipeline import Pipeline
    from ldm3d.precision import dtype
    from ldm3d.privacy.audit import audit
    from ldm3d.privacy.volumes import generated_for, of_scans, written_in
    from ldm3d.processes import own_device, started_processes
    from ldm3d.report.audit import summary, write_audit

    processes = started_processes()
    where = device or own_device()
    pipeline = Pipeline.from_pretrained(model, where, dtype(precision, where))
    pipeline.threads = None  # all: what is measured does not depend on the last bits
    sampling = pipeline.sampling.replace(seed=seed, steps=steps, guidance=guidance, sampler=sampler)
    config, *groups = scans_by_use(model, data, out / "work", root, processes, experiment)
    training, held_out = (of_scans(config, scans, pipeline) for scans in groups)
    if synthetic:
        looked = written_in(synthetic, pipeline)
    else:
        looked = generated_for(pipeline, training, held_out, num, sampling, sampling.seed)
    if processes.is_main:
        print(f"looking at {len(training)} training, {len(held_out)} held-out and {len(looked)} synthetic volumes", flush=True)
    found, guard = audit(pipeline, training, held_out, looked, level, sampling.seed, processes=processes)
    if processes.is_main:
        page = write_audit(out, f"Audit of {model}", pipeline, found, guard, sampling)
        print(f"page written to {page}; keep it as the training data, for it shows and names training subjects")
        print(summary(found))


@app.command()
def segmenter(
    model: Annotated[Path, typer.Argument(help="Pipeline folder: its scans are trained on, on its grid.", show_default=False)],
    data: Annotated[Path, typer.Option(help="BIDS folder or table that the model was trained on.")],
    labels: Annotated[Path, typer.Option(help="Folder with a label map of each scan, sub-XX[_ses-YY]_...nii.gz.")],
    volume: Annotated[list[str], typer.Option(metavar="NAME=LABEL,LABEL", help="A quantity and what counts for it.")],
    pattern: Pattern = None,
    root: Root = None,
    experiment: Experiment = None,
    out: Annotated[Path, typer.Option(help="Where to write the segmenter.")] = Path("segmenter"),
    steps: Annotated[int, typer.Option(min=1)] = 300,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = None,
) -> None:
    """Train a small segmentation network on scans with label maps, for: ldm3d evaluate --measure segmenter:FOLDER."""
    import numpy as np

    from ldm3d.data.labels import LabelMaps, load_labels, parse_groups
    from ldm3d.evaluation.selection import in_turn
    from ldm3d.experiment import scans_by_use
    from ldm3d.processes import own_device
    from ldm3d.rulers.segmenter import dice, train_segmenter

    groups, maps = parse_groups(volume), LabelMaps(labels, pattern)
    config, *tables = scans_by_use(model, data, out / "work", root, experiment=experiment)
    trained, held_out = (
        [
            functools.partial(load_labels, config, key, maps.one(subject, session), groups)
            for key, subject, session in zip(table["key"], table["subject"], table["session"])
        ]
        for table in tables
    )
    network = train_segmenter(lambda i: trained[i](), len(trained), groups, steps, seed, device or own_device())
    network.save_pretrained(out)
    some = in_turn(list(tables[1]["subject"]), seed)[:20]
    for name, values in dice(network, lambda i: held_out[i](), some).items():
        print(f"{name}: Dice {np.nanmean(values):.3f} on {len(values)} held-out scans")
    print(f"segmenter written to {out}; use it with: ldm3d evaluate ... --measure segmenter:{out}")


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="Dataset with participants.tsv, for example of ldm3d generate.")],
    table: Annotated[Path | None, typer.Option(help="CSV or TSV of volumes, such as SynthSeg's --vol.")] = None,
    column: Annotated[list[str], typer.Option(metavar="NAME=COLUMN+COLUMN", help="A covariate and its columns.")] = [],  # noqa: B006
    to_ml: Annotated[float, typer.Option(help="Millilitres of the table's unit; 0.001 for cubic mm.")] = 1e-3,
    labels: Annotated[Path | None, typer.Option(help="Instead, a folder with a label map of each participant.")] = None,
    volume: Annotated[list[str], typer.Option(metavar="NAME=LABEL,LABEL", help="A covariate and its labels.")] = [],  # noqa: B006
    pattern: Pattern = None,
    out: Annotated[Path, typer.Option(help="Where to write the page and the figures.")] = Path("comparison"),
) -> None:
    """Compare what another program measured (SynthSeg, FreeSurfer) with what was asked, or with a table of real subjects."""
    from ldm3d.data.labels import LabelMaps, parse_groups
    from ldm3d.report.external import (
        compare_written,
        count_labels,
        parse_columns,
        read_participants,
        read_volumes,
        write_comparison,
    )

    if (table is None) == (labels is None):
        raise InputError("give either --table with --column, or --labels with --volume")
    if table is not None:
        measured = read_volumes(table, parse_columns(column), to_ml)
    else:
        maps = LabelMaps(labels, pattern)
        measured = count_labels(maps, list(read_participants(folder)[1]), parse_groups(volume))
    page = write_comparison(out, f"Measured volumes of {folder}", *compare_written(folder, measured))
    print(f"page written to {page}")


@app.command()
def likelihood(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="BIDS folder or table; subjects that were trained on are left out.")],
    root: Root = None,
    experiment: Experiment = None,
    out: Annotated[Path, typer.Option(help="Table to write, a row for each subject.")] = Path("likelihood.tsv"),
    method: Annotated[str, typer.Option(help="bound, ode or both.")] = "both",
    times: Annotated[int, typer.Option(min=1, help="U-Net calls of the bound, for each subject.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Of the ODE.")] = 50,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="auto (here float32), float32 or bfloat16.")] = "auto",
) -> None:
    """How likely the model finds each held-out subject: nats per latent dimension, and bits per voxel."""
    import torch

    from ldm3d.data.preparing import load_prepared
    from ldm3d.data.tables import write_table
    from ldm3d.evaluation.likelihood import score
    from ldm3d.experiment import scans_by_use
    from ldm3d.pipeline import Pipeline
    from ldm3d.precision import dtype
    from ldm3d.processes import own_device

    where = device or own_device()
    # The least noise that likelihoods are taken at is finer than bfloat16's steps, so that is for those who ask for it
    pipeline = Pipeline.from_pretrained(model, where, torch.float32 if precision == "auto" else dtype(precision, where))
    config, _, scans = scans_by_use(model, data, out.with_name(f"{out.stem}-work"), root, experiment=experiment)
    subjects = scans[pipeline.schema.names].to_dict("records")

    def load(i: int):
        return load_prepared(config, scans["key"][i])

    found = score(pipeline, subjects, load, method, times, steps, seed=seed)
    found.insert(0, "subject", scans["subject"])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_table(out, found)
    print(found.drop(columns="subject").describe().loc[["mean", "std"]].T.to_string(float_format="{:.3f}".format))
    print(f"{len(found)} subjects written to {out}")


@app.command()
def explain(
    model: ModelPath,
    before: Annotated[list[str], typer.Option("--from", metavar="NAME=VALUE,...", help="The request to start at.")],
    changes: Annotated[list[str], typer.Option("--to", metavar="NAME=VALUE,...", help="What changes in it.")],
    out: Annotated[Path, typer.Option(help="Where to write maps, pictures and the page.")] = Path("explanation"),
    seeds: Annotated[int, typer.Option(min=2, help="Volumes of each request, 6 or more, with the same noise in all.")] = 16,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Show which covariate moves what: change a request with the noise kept, and test where volumes change.

    ldm3d explain MODEL --from age=60,sex=F --to age=80,ventricular_volume_ml=60. What --to does not name stays as it was;
    each of several changes is also made alone.
    """
    from ldm3d.evaluation.explanation import explain
    from ldm3d.pipeline import Pipeline
    from ldm3d.precision import dtype
    from ldm3d.processes import own_device
    from ldm3d.report.explanation import summary, write_explanation

    where = device or own_device()
    pipeline = Pipeline.from_pretrained(model, where, dtype(precision, where))
    pipeline.threads = None  # all: what is shown does not depend on the last bits
    sampling = pipeline.sampling.replace(seed=seed, steps=steps, guidance=guidance, sampler=sampler)
    found = explain(pipeline, _values("--from", before), _values("--to", changes), sampling, seeds)
    page = write_explanation(out, f"What covariates move in volumes of {model}", pipeline, found, sampling)
    print(summary(pipeline, found))
    print(f"page written to {page}")


def _values(option: str, texts: list[str]) -> dict[str, str]:
    """["age=60,sex=F"] -> {"age": "60", "sex": "F"}."""
    given = {}
    for text in texts:
        for part in re.split(r",(?=[^,=]*=)", text):  # a category may hold a comma, too
            name, separator, value = part.partition("=")
            if not separator:
                raise InputError(f"{option} {text!r}: write NAME=VALUE, several with commas between, such as age=60,sex=F")
            given[name.strip().replace("-", "_")] = value.strip()
    return given
