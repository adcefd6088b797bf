"""Commands that assess a model: evaluate, audit, likelihood, explain."""

import functools
import re
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli import options
from ldm3d.cli.options import (
    VOLUMETRY,
    DataOverride,
    Device,
    Experiment,
    Guidance,
    ModelPath,
    Precision,
    Root,
    SamplerName,
    Seed,
    Steps,
)
from ldm3d.errors import InputError

LEARNED = "learned"  # no measure: all covariates are predicted by regression
Features = Annotated[
    str | None,
    typer.Option(
        help="random, segmenter:FOLDER, medicalnet:FILE, radimagenet:FILE or package.module:function; by default the "
        "segmenter's, or random."
    ),
]
Classifier = Annotated[
    bool | None,
    typer.Option(
        "--classifier/--no-classifier",
        help="Train one to tell generated volumes; by default with a segmenter, if it takes minutes.",
    ),
]


@options.app.command()
def evaluate(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="BIDS folder or table; subjects that were trained on are left out.")],
    root: Root = None,
    experiment: Experiment = None,
    override: DataOverride = [],  # noqa: B006 (typer reads it, and it is never changed)
    out: Annotated[Path, typer.Option(help="Where to write the page and the figures.")] = Path("evaluation"),
    num: Annotated[int, typer.Option("--num", "--volumes", min=3, help="To generate (torchrun: --volumes).")] = 200,
    measure: Annotated[str, typer.Option(help="package.module:function, segmenter:FOLDER, or learned.")] = VOLUMETRY,
    segmenter: Annotated[Path | None, typer.Option(help="Of `ldm3d segmenter`: compare the anatomy of volumes.")] = None,
    features: Features = None,
    classifier: Classifier = None,
    predict: Annotated[bool, typer.Option(help="Predict covariates that MEASURE does not give (age) by regression.")] = True,
    downstream: Annotated[
        bool,
        typer.Option("--downstream", help="Train regressors, or segmenters where label maps are given, on synthetic volumes."),
    ] = False,
    with_likelihood: Annotated[bool, typer.Option("--likelihood", help="Likelihood of held-out volumes.")] = False,
    with_audit: Annotated[bool, typer.Option("--audit", help="Privacy audit; the page then shows training subjects.")] = False,
    regression: Annotated[
        Path | None, typer.Option(help="A model of the same images, trained for regression alone; see docs/conditions.md.")
    ] = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Assess reconstruction, conditioning, realism and subgroups on held-out subjects; writes one HTML page.

    Training volumes in --data are used to fit regressions (age, sex), and by --audit.
    """
    from ldm3d.account import read_account
    from ldm3d.evaluation.assess import assess, plan
    from ldm3d.evaluation.discriminability import is_quick
    from ldm3d.evaluation.segmentation_utility import labels_of, trainings
    from ldm3d.experiment import scans_by_use
    from ldm3d.privacy.audit import plan as audit_plan
    from ldm3d.processes import started_processes
    from ldm3d.report.sections.evaluation import summary
    from ldm3d.report.write import write_report
    from ldm3d.rulers.segmenter import Segmenter
    from ldm3d.rulers.volumetry import load_measure
    from ldm3d.shipped import model_folder

    processes = started_processes()
    precision = "float32" if with_likelihood and precision == "auto" else precision  # see `likelihood`
    pipeline, sampling = options.load_model(model, device, precision, seed, steps, guidance, sampler)
    if measure == LEARNED and not predict:
        raise InputError("--measure learned predicts covariates by regression; drop --no-predict")
    function = load_measure(measure, str(pipeline.device)) if measure != LEARNED else lambda volume, spacing_mm: {}
    extractor = _extractor(features or (f"segmenter:{segmenter}" if segmenter else "random"))
    judge = Segmenter.from_pretrained(segmenter, pipeline.device) if segmenter else None
    if classifier is None:
        classifier = judge is not None and is_quick(pipeline.output_grid.shape, pipeline.device)
    config, trained, held_out = scans_by_use(model, data, out / "work", root, processes, experiment, override)
    counts = len(trained), len(held_out), num
    lines = plan(pipeline, *counts, sampling, predict or downstream, with_likelihood, judge is not None, classifier)
    if downstream and labels_of(pipeline):
        lines.append(f"train {trainings(len(trained))} segmenters on scans with label maps, and on volumes drawn of these")
    lines += audit_plan(*counts) if with_audit and len(trained) else []
    if processes.is_main:
        _announce(lines)
    parts = {"predict": predict, "downstream": downstream, "likelihood": with_likelihood}
    parts |= {"segmenter": judge, "classifier": classifier}
    parts["regression"] = rival(regression, pipeline, device, precision) if regression else None
    found = assess(pipeline, config, trained, held_out, function, extractor, sampling, num, **parts, processes=processes)
    if downstream and processes.is_main:
        found.segmentation = _segmentation(pipeline, config, trained, held_out, sampling)
    audited = None
    if with_audit and trained.empty:
        warnings.warn("no audit: --data has none of the volumes that the model was trained on", stacklevel=1)
    elif with_audit:
        audited, _ = _audit(pipeline, config, trained, held_out, sampling, num, processes)
        found.scores += audited.scores
    if processes.is_main:
        found.analyse_subgroups(pipeline.schema)
        account = read_account(model_folder(model))
        page = write_report(
            out, f"Evaluation of {options.title(model)}", pipeline, found, sampling, audit=audited, account=account
        )
        print(summary(found))
        print(f"page written to {page}")


def _announce(lines: list[str]) -> None:
    last = "(--num and --steps shorten generation only; the other parts depend on the number of scans in --data)"
    print("\n  ".join(["evaluation, with a progress bar for each part:", *lines, last]), flush=True)


def _extractor(features: str):
    from ldm3d.metrics.features import load_extractor
    from ldm3d.shipped import segmenter_folder

    if features.startswith("segmenter:"):  # of a folder, or of a shipped model
        features = f"segmenter:{segmenter_folder(features.partition(':')[2])}"
    return load_extractor(features)


def _segmentation(pipeline, config, trained, held_out, sampling):
    """Downstream utility of a model that draws scans of label maps; None of others, or, with a warning, of too few people."""
    from ldm3d.evaluation.segmentation_utility import labels_of, utility_of_model
    from ldm3d.training.segmenter import train_segmenter

    if labels_of(pipeline) is None:
        return None
    train = functools.partial(train_segmenter, device=pipeline.device)
    try:
        return utility_of_model(pipeline, config, trained, held_out, train, sampling)
    except InputError as error:  # the other figures are still useful
        warnings.warn(f"downstream utility for segmentation is not assessed: {error}", stacklevel=2)
        return None


def rival(model: Path, pipeline, device: str | None, precision: str):
    """The model of --regression; InputError unless it takes the images of the other."""
    found = options.load_model(model, device, precision)[0]
    if not pipeline.conditions or found.conditions != pipeline.conditions or found.grid.shape != pipeline.grid.shape:
        raise InputError(f"--regression {model}: it has to take the images of the model that is evaluated, on the same grid")
    return found


def _audit(pipeline, config, trained, held_out, sampling, num: int, processes, synthetic: Path | None = None, level=0.05):
    """The audit and the guard, of `num` volumes to be generated, or of a folder of synthetic volumes."""
    from ldm3d.privacy.audit import audit
    from ldm3d.privacy.volumes import generated_for, of_scans, written_in

    training, others = (of_scans(config, scans, pipeline) for scans in (trained, held_out))
    if synthetic:
        volumes = written_in(synthetic, pipeline)
    else:
        volumes = generated_for(pipeline, training, others, num, sampling, sampling.seed)
    return audit(pipeline, training, others, volumes, level, sampling.seed, processes=processes)


@options.app.command()
def audit(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="BIDS folder or table with the scans it was trained on, and held-out subjects.")],
    root: Root = None,
    experiment: Experiment = None,
    override: DataOverride = [],  # noqa: B006 (typer reads it, and it is never changed)
    out: Annotated[Path, typer.Option(help="Where to write; it will show training subjects.")] = Path("audit"),
    num: Annotated[int, typer.Option("--num", "--volumes", min=1, help="To generate (torchrun: --volumes).")] = 200,
    synthetic: Annotated[Path | None, typer.Option(help="Folder of `ldm3d generate` to audit instead.")] = None,
    level: Annotated[float, typer.Option(min=1e-4, max=0.4, help="Share of new subjects that may count as copies.")] = 0.05,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Look for copies of training subjects and test membership inference; writes a page and a guard.

    `ldm3d generate --audit OUT` then withholds copies.
    """
    from ldm3d.experiment import scans_by_use
    from ldm3d.processes import started_processes
    from ldm3d.report.audit import write_audit
    from ldm3d.report.sections.audit import summary

    processes = started_processes()
    pipeline, sampling = options.load_model(model, device, precision, seed, steps, guidance, sampler)
    scans = scans_by_use(model, data, out / "work", root, processes, experiment, override)
    found, guard = _audit(pipeline, *scans, sampling, num, processes, synthetic, level)
    if processes.is_main:
        page = write_audit(out, f"Audit of {options.title(model)}", pipeline, found, guard, sampling)
        print(f"page written to {page}; keep it as you keep the training data: it shows and names training subjects")
        print(summary(found))


@options.app.command()
def likelihood(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="BIDS folder or table; subjects that were trained on are left out.")],
    root: Root = None,
    experiment: Experiment = None,
    override: DataOverride = [],  # noqa: B006 (typer reads it, and it is never changed)
    out: Annotated[Path, typer.Option(help="Table to write, a row for each subject.")] = Path("likelihood.tsv"),
    method: Annotated[str, typer.Option(help="bound, ode or both.")] = "both",
    times: Annotated[int, typer.Option(min=1, help="U-Net calls of the bound, for each subject.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the ODE.")] = 50,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="auto (here float32), float32 or bfloat16.")] = "auto",
) -> None:
    """Likelihood of each held-out subject under the model: nats per latent dimension, and bits per voxel."""
    from ldm3d.data.conditions import ScanImages
    from ldm3d.data.tables import write_table
    from ldm3d.evaluation.likelihood import score
    from ldm3d.experiment import scans_by_use

    # The lowest noise level of likelihoods is below the resolution of bfloat16, which is therefore not the default
    pipeline, _ = options.load_model(model, device, "float32" if precision == "auto" else precision)
    pipeline.threads = 1
    work = out.with_name(f"{out.stem}-work")
    config, _, scans = scans_by_use(model, data, work, root, experiment=experiment, overrides=override)
    subjects = scans[pipeline.schema.names].to_dict("records")
    found = score(pipeline, subjects, ScanImages(config, scans).made, method, times, steps, seed=seed)
    found.insert(0, "subject", scans["subject"])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_table(out, found)
    print(found.drop(columns="subject").describe().loc[["mean", "std"]].T.to_string(float_format="{:.3f}".format))
    print(f"{len(found)} subjects written to {out}")


@options.app.command()
def explain(
    model: ModelPath,
    before: Annotated[list[str], typer.Option("--from", metavar="NAME=VALUE,...", help="The request before the change.")],
    changes: Annotated[list[str], typer.Option("--to", metavar="NAME=VALUE,...", help="The change.")],
    out: Annotated[Path, typer.Option(help="Where to write maps, pictures and the page.")] = Path("explanation"),
    seeds: Annotated[
        int,
        typer.Option(
            min=2, help="Volumes of each request, with the same noise in all; fewer than 6 cannot give a significant change."
        ),
    ] = 16,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Show the effect of a covariate: change a request, keep the noise, and test where volumes change.

    ldm3d explain MODEL --from age=60,sex=F --to age=80,ventricular_volume_ml=60. Covariates that are not in --to stay the
    same; each of several changes is also made alone.
    """
    from ldm3d.evaluation.explanation import explain
    from ldm3d.report.explanation import summary, write_explanation

    pipeline, sampling = options.load_model(model, device, precision, seed, steps, guidance, sampler)
    found = explain(pipeline, _values("--from", before), _values("--to", changes), sampling, seeds)
    page = write_explanation(out, f"Effect of covariates in volumes of {options.title(model)}", pipeline, found, sampling)
    print(summary(pipeline, found))
    print(f"page written to {page}")


def _values(option: str, texts: list[str]) -> dict[str, str]:
    """["age=60,sex=F"] -> {"age": "60", "sex": "F"}."""
    given = {}
    for text in texts:
        for part in re.split(r",(?=[^,=]*=)", text):  # a category may contain a comma
            name, separator, value = part.partition("=")
            if not separator:
                raise InputError(f"{option} {text!r}: write NAME=VALUE, several with commas between, such as age=60,sex=F")
            given[name.strip().replace("-", "_")] = value.strip()
    return given
