"""The command line, all but training.

ldm3d phantoms | prepare | encode | generate | info | evaluate | segmenter | compare | audit | likelihood | explain |
import-monai | demo.

Training is started with `accelerate launch`; see `ldm3d.training.autoencoder` and `ldm3d.training.diffusion`.
"""

import functools
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ldm3d.errors import InputError, exit_on_input_error

app = typer.Typer(
    help="Latent diffusion for 3D brain MRI. Train with: accelerate launch -m ldm3d.training.autoencoder CONFIG, "
    "ldm3d encode CONFIG, accelerate launch -m ldm3d.training.diffusion CONFIG.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(help="The experiment's YAML file.", show_default=False)]
Override = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the config.")]
Device = Annotated[str | None, typer.Option(help="Where to compute; the first GPU if there is one, else the CPU.")]
Precision = Annotated[str, typer.Option(help="float32 or bfloat16 (faster on GPUs and recent CPUs).")]


@app.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(help="Where to write; must be empty or absent.", show_default=False)],
    subjects: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    shape: Annotated[tuple[int, int, int], typer.Option(help="Voxels to the right, front and top.")] = (40, 48, 40),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core if not given.")] = None,
) -> None:
    """Make a BIDS dataset of toy brains with exactly known covariates."""
    from ldm3d.data.phantoms import write_dataset

    write_dataset(folder, subjects, shape, seed, workers=workers)
    print(f"{subjects} phantoms written to {folder}")


@app.command()
def prepare(
    config: ConfigPath,
    override: Override = [],  # noqa: B006 (typer reads it, nobody changes it)
    strict: Annotated[bool, typer.Option(help="Stop if any scan cannot be used.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core if not given.")] = None,
) -> None:
    """Bring every scan to the config's grid; only what is new or has changed."""
    from ldm3d.config import load_config
    from ldm3d.data.preprocess import prepare
    from ldm3d.processes import started_processes

    settings, processes = load_config(config, override), started_processes()
    done = prepare(settings, workers=workers, strict=strict, processes=processes)
    splits = ", ".join(f"{count} {split}" for split, count in done.table["split"].value_counts().items())
    if processes.is_main:
        print(
            f"{done.prepared} scans prepared, {done.cached} unchanged, {len(done.failed)} failed in {done.seconds:.0f} s; "
            f"{splits}; written to {settings.prepared_folder}"
        )


@app.command()
def encode(
    config: ConfigPath,
    override: Override = [],  # noqa: B006
    device: Device = None,
    precision: Precision = "float32",
    force: Annotated[bool, typer.Option(help="Encode even if the cache is up to date.")] = False,
) -> None:
    """Write the latents of all prepared scans with the trained autoencoder: what stage 2 reads."""
    import torch

    from ldm3d.config import load_config
    from ldm3d.data.latents import is_fresh, write_latents
    from ldm3d.data.preprocess import load_prepared, read_scan_table
    from ldm3d.experiment import latents_origin
    from ldm3d.models.autoencoder import LatentSpace
    from ldm3d.processes import own_device, started_processes

    settings, processes = load_config(config, override), started_processes()
    scans = read_scan_table(settings)
    device = device or own_device()
    dtype = _dtype(precision)
    origin = latents_origin(settings)
    autoencoder = LatentSpace.from_pretrained(settings.autoencoder_folder, device, dtype)
    if is_fresh(settings.latents_folder, origin) and not force:
        if processes.is_main:
            print(f"the latents in {settings.latents_folder} are up to date")
        return

    @torch.no_grad()
    def moments(volumes):
        return autoencoder.encode(torch.from_numpy(volumes).to(device, dtype)).float().cpu().numpy()

    load = functools.partial(load_prepared, settings)
    write_latents(settings.latents_folder, scans, load, moments, origin, processes=processes)
    if processes.is_main:
        print(f"latents of {len(scans)} scans written to {settings.latents_folder}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def generate(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Pipeline folder, for example runs/toy/model.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where to write; empty, absent, or with a part of the same.", show_default=False)],
    num: Annotated[
        int | None, typer.Option("--num", "--volumes", min=1, help="Of one request; 1 if not given. (torchrun eats --num.)")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="CSV or TSV with covariate columns: a volume for each row.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the sampler; the model's own if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="1 is none.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddpm, ddim, euler, heun, dpmpp-2m, unipc, sde-euler, sde-heun or sde-pc.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Volumes sampled before they are decoded; changes no volume.")] = 8,
    group: Annotated[
        int | None, typer.Option(min=1, help="Volumes that the U-Net takes together; another number, other last bits.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of a CPU, a process; another number, other last bits.")] = 1,
    device: Device = None,
    precision: Precision = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile: pays from some tens of volumes on.")] = False,
    check: Annotated[bool, typer.Option(help="Compare finished volumes with their checksums, or their sizes only.")] = True,
    audit: Annotated[
        Path | None, typer.Option(help="Folder of `ldm3d audit` of this model: withhold copies of training subjects.")
    ] = None,
) -> None:
    """Generate volumes for asked covariates, as a BIDS derivative.

    Ask by the names of the model's covariates: --age 72 --sex F --ventricular-volume-ml 45. Those left out are left open.

    The same command goes on where it was stopped or killed. Several processes share the work: torchrun --nproc_per_node 4 -m
    ldm3d generate ..., accelerate launch -m ldm3d generate ..., or srun. Exit code 75: stopped by a signal, start it again.
    """
    from tqdm import tqdm

    from ldm3d.evaluation.guard import Guard
    from ldm3d.generation import WITHHELD, generate, which_process
    from ldm3d.pipeline import Pipeline
    from ldm3d.preemption import REQUEUE, preemption
    from ldm3d.processes import cores_each, own_device

    processes = which_process()
    pipeline = Pipeline.from_pretrained(model, device or own_device(), _dtype(precision))
    pipeline.group, pipeline.threads = group, threads
    asked = _covariates(context.args)
    if compile:
        pipeline.compile()
    if table is not None and (asked or num is not None):
        raise InputError("give either --table, with one row a volume, or covariates and --num")
    rows = pipeline.parse(_requests(table) if table is not None else [asked] * (num or 1))
    sampling = pipeline.sampling.replace(seed=seed, steps=steps, guidance=guidance, sampler=sampler)
    guard = Guard.load(audit, pipeline.model_hash) if audit else None
    if pipeline.device.type == "cpu" and processes.is_main and cores_each() > threads:
        print(
            f"computing with {threads} of {cores_each()} cores: start more processes (torchrun --nproc_per_node N -m ldm3d "
            "generate ...), or use --threads, which changes the last bits",
            flush=True,
        )
    who = f"process {processes.rank} of {processes.world}: " if processes.world > 1 else ""
    every = 0.1 if sys.stderr.isatty() else 30  # seconds; in a log file twice a minute
    looks = {"desc": "generate", "unit": "volume", "mininterval": every, "delay": 1e-3, "disable": not processes.is_main}
    with preemption() as stop, tqdm(**looks) as bar:

        def show(finished: int, volumes: int) -> None:
            bar.total = volumes
            bar.update(finished - bar.n)

        def say(finished: int, volumes: int) -> None:
            if finished:
                print(f"{who}{finished} of {volumes} volumes there already", flush=True)

        tally = generate(pipeline, out, rows, sampling, batch_size, processes, check, show, say, stop, guard)
    if stop.asked:
        print(f"{who}{tally}; stopped by {stop.signal}, {tally.missing} volumes missing: the same command goes on from there")
        raise SystemExit(REQUEUE)
    if tally.missing:
        print(f"{who}{tally}; {tally.missing} volumes of {out} are other processes' to make")
    else:
        print(f"{who}{tally}; {len(rows) - tally.withheld} synthetic volumes written to {out}")
    if tally.withheld:
        print(f"{who}{tally.withheld} of {len(rows)} withheld: too near to a training subject; see {out / WITHHELD}")


@app.command()
def info(model: Annotated[Path, typer.Argument(help="Pipeline folder.", show_default=False)]) -> None:
    """What a model makes, and what it can be asked."""
    from ldm3d.pipeline import Pipeline

    print(Pipeline.from_pretrained(model, "cpu"))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Pipeline folder.", show_default=False)],
    data: Annotated[Path, typer.Option(help="BIDS folder or table; subjects that were trained on are left out.")],
    root: Annotated[Path | None, typer.Option(help="Folder that holds all its scans, if they lie elsewhere.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write the page and the figures.")] = Path("evaluation"),
    num: Annotated[int, typer.Option("--num", "--volumes", min=3, help="To generate for held-out subjects' covariates.")] = 64,
    measure: Annotated[
        str, typer.Option(help="package.module:function (volume, spacing_mm) -> {covariate: value}")
    ] = "ldm3d.evaluation.volumetry:measure_volumes",
    features: Annotated[
        str,
        typer.Option(
            help="What distributions are compared by: random, medicalnet:FILE, radimagenet:FILE, package.module:function"
        ),
    ] = "random",
    predict: Annotated[bool, typer.Option(help="Read what MEASURE does not give (age) off the image, by regression.")] = True,
    downstream: Annotated[bool, typer.Option("--downstream", help="Train regressors on real, synthetic and both.")] = False,
    with_likelihood: Annotated[bool, typer.Option("--likelihood", help="Score held-out volumes: some minutes.")] = False,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance: Annotated[float | None, typer.Option(min=0)] = None,
    sampler: Annotated[str | None, typer.Option()] = None,
    device: Device = None,
    precision: Precision = "float32",
) -> None:
    """Measure reconstruction and how generated volumes follow their covariates, for whom, and of what use; one HTML page.

    Training volumes in --data serve to learn what ages look like; nothing is judged on them.
    """
    from ldm3d.assessment import assess
    from ldm3d.evaluation.features import load_extractor
    from ldm3d.evaluation.volumetry import load_measure
    from ldm3d.experiment import audited_scans
    from ldm3d.pipeline import Pipeline
    from ldm3d.processes import own_device, started_processes
    from ldm3d.report import summary, write_report

    processes = started_processes()
    pipeline = Pipeline.from_pretrained(model, device or own_device(), _dtype(precision))
    pipeline.threads = None  # all: what is measured does not depend on the last bits
    function, extractor = load_measure(measure), load_extractor(features)
    sampling = pipeline.sampling.replace(seed=seed, steps=steps, guidance=guidance, sampler=sampler)
    scans = audited_scans(model, data, out / "work", root, processes)  # the config, trained on, held out
    parts = {"predict": predict, "downstream": downstream, "likelihood": with_likelihood, "processes": processes}
    done = assess(pipeline, *scans, function, extractor, sampling, num, **parts)
    if processes.is_main:
        others = done.goals, done.extra, done.figures
        page = write_report(out, f"Evaluation of {model}", pipeline, done.found, sampling, *others)
        print(summary(done.found))
        print(f"page written to {page}")


@app.command()
def audit(
    model: Annotated[Path, typer.Argument(help="Pipeline folder.", show_default=False)],
    data: Annotated[Path, typer.Option(help="BIDS folder or table with the scans it was trained on, and held-out subjects.")],
    root: Annotated[Path | None, typer.Option(help="Folder that holds all its scans, if they lie elsewhere.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write; it will show training subjects.")] = Path("audit"),
    num: Annotated[
        int, typer.Option("--num", "--volumes", min=1, help="To generate, half of them for training subjects' own covariates.")
    ] = 200,
    synthetic: Annotated[Path | None, typer.Option(help="Folder of `ldm3d generate` to look at instead.")] = None,
    level: Annotated[
        float, typer.Option(min=1e-4, max=0.4, help="Share of new subjects' volumes that may be called copies.")
    ] = 0.05,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance: Annotated[float | None, typer.Option(min=0)] = None,
    sampler: Annotated[str | None, typer.Option()] = None,
    device: Device = None,
    precision: Precision = "float32",
) -> None:
    """Look for copies of training subjects, and for what the model's loss tells of them; writes a page and a guard.

    `ldm3d generate --audit OUT` then withholds such volumes.
    """
    from ldm3d.audit_page import summary, write_audit
    from ldm3d.data.preprocess import load_prepared
    from ldm3d.evaluation.audit import audit
    from ldm3d.evaluation.volumes import generated_for, of_subjects, written_in
    from ldm3d.experiment import audited_scans
    from ldm3d.pipeline import Pipeline
    from ldm3d.processes import own_device, started_processes

    processes = started_processes()
    pipeline = Pipeline.from_pretrained(model, device or own_device(), _dtype(precision))
    pipeline.threads = None  # all: what is measured does not depend on the last bits
    sampling = pipeline.sampling.replace(seed=seed, steps=steps, guidance=guidance, sampler=sampler)
    config, *groups = audited_scans(model, data, out / "work", root, processes)

    def volumes(scans):
        rows = scans[pipeline.schema.names].to_dict("records")
        return of_subjects(list(scans["subject"]), rows, lambda i: load_prepared(config, scans["key"][i]), pipeline)

    training, held_out = map(volumes, groups)
    if synthetic:
        looked = written_in(synthetic, pipeline)
    else:
        looked = generated_for(pipeline, training, held_out, num, sampling, sampling.seed)
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
    root: Annotated[Path | None, typer.Option(help="Folder that holds all its scans, if they lie elsewhere.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write the segmenter.")] = Path("segmenter"),
    steps: Annotated[int, typer.Option(min=1)] = 300,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = None,
) -> None:
    """Train a small segmentation network on scans with label maps, for: ldm3d evaluate --measure segmenter:FOLDER."""
    import numpy as np

    from ldm3d.data.label_maps import find_label_map, load_labels, parse_groups
    from ldm3d.evaluation.segmenter import dice, train_segmenter
    from ldm3d.experiment import audited_scans
    from ldm3d.processes import own_device

    groups = parse_groups(volume)
    config, *tables = audited_scans(model, data, out / "work", root)
    trained, held_out = (
        [
            functools.partial(load_labels, config, key, find_label_map(labels, subject, session), groups)
            for key, subject, session in zip(table["key"], table["subject"], table["session"])
        ]
        for table in tables
    )
    network = train_segmenter(lambda i: trained[i](), len(trained), groups, steps, seed, device or own_device())
    network.save_pretrained(out)
    for name, values in dice(network, lambda i: held_out[i](), range(min(len(held_out), 20))).items():
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
    out: Annotated[Path, typer.Option(help="Where to write the page and the figures.")] = Path("comparison"),
) -> None:
    """Compare what another program measured (SynthSeg, FreeSurfer) with what was asked, or with a table of real subjects."""
    from ldm3d.data.label_maps import parse_groups
    from ldm3d.written import compare_written, count_labels, parse_columns, read_participants, read_volumes, write_comparison

    if (table is None) == (labels is None):
        raise InputError("give either --table with --column, or --labels with --volume")
    if table is not None:
        measured = read_volumes(table, parse_columns(column), to_ml)
    else:
        measured = count_labels(labels, list(read_participants(folder)[1]), parse_groups(volume))
    page = write_comparison(out, f"Measured volumes of {folder}", *compare_written(folder, measured))
    print(f"page written to {page}")


@app.command()
def likelihood(
    model: Annotated[Path, typer.Argument(help="Pipeline folder.", show_default=False)],
    data: Annotated[Path, typer.Option(help="BIDS folder or table; subjects that were trained on are left out.")],
    root: Annotated[Path | None, typer.Option(help="Folder that holds all its scans, if they lie elsewhere.")] = None,
    out: Annotated[Path, typer.Option(help="Table to write, a row for each subject.")] = Path("likelihood.tsv"),
    method: Annotated[str, typer.Option(help="bound, ode or both.")] = "both",
    times: Annotated[int, typer.Option(min=1, help="U-Net calls of the bound, for each subject.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Of the ODE.")] = 50,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = None,
    precision: Precision = "float32",
) -> None:
    """How likely the model finds each held-out subject: nats per latent dimension, and bits per voxel."""
    from ldm3d.data.bids import write_table
    from ldm3d.data.preprocess import load_prepared
    from ldm3d.evaluation.likelihood import score
    from ldm3d.experiment import held_out_scans
    from ldm3d.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model, device, _dtype(precision))
    config, scans = held_out_scans(model, data, out.parent / "work", root)
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
    model: Annotated[Path, typer.Argument(help="Pipeline folder.", show_default=False)],
    before: Annotated[list[str], typer.Option("--from", metavar="NAME=VALUE,...", help="The request to start at.")],
    changes: Annotated[list[str], typer.Option("--to", metavar="NAME=VALUE,...", help="What changes in it.")],
    out: Annotated[Path, typer.Option(help="Where to write maps, pictures and the page.")] = Path("explanation"),
    seeds: Annotated[int, typer.Option(min=2, help="Volumes of each request, with the same noise in all of them.")] = 16,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance: Annotated[float | None, typer.Option(min=0)] = None,
    sampler: Annotated[str | None, typer.Option()] = None,
    device: Device = None,
    precision: Precision = "float32",
) -> None:
    """Show which covariate moves what: change a request with the noise kept, and test where volumes change.

    ldm3d explain MODEL --from age=60,sex=F --to age=80,ventricular_volume_ml=60. What --to does not name stays as it was;
    each of several changes is also made alone.
    """
    from ldm3d.evaluation.explanation import explain
    from ldm3d.explanation_page import summary, write_explanation
    from ldm3d.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model, device, _dtype(precision))
    pipeline.threads = None  # all: what is shown does not depend on the last bits
    sampling = pipeline.sampling.replace(seed=seed, steps=steps, guidance=guidance, sampler=sampler)
    found = explain(pipeline, _values("--from", before), _values("--to", changes), sampling, seeds)
    page = write_explanation(out, f"What covariates move in volumes of {model}", pipeline, found, sampling)
    print(summary(pipeline, found))
    print(f"page written to {page}")


@app.command("import-monai")
def import_monai(
    folder: Annotated[Path, typer.Argument(help="Of a published model's files; see docs/monai.md.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Pipeline folder to write; must be empty or absent.", show_default=False)],
    library: Annotated[str, typer.Option(help="Whose networks: monai (MONAI core) or monai-generative (0.2.3).")] = "monai",
    settings: Annotated[Path | None, typer.Option(help="YAML with what the files leave unsaid; FOLDER/import.yaml.")] = None,
) -> None:
    """Make a pipeline of a model that was trained with MONAI and published as PyTorch checkpoints."""
    from ldm3d.published import import_model

    pipeline = import_model(folder, out, library, settings)
    print(f"{', '.join(pipeline.schema.names)} can be asked of the model written to {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    config: Annotated[Path, typer.Option(help="The toy experiment.")] = Path("configs/toy.yaml"),
) -> None:
    """The whole path on toy brains, from phantoms to an HTML page, in a few minutes on two cores."""
    from ldm3d.demo import run_demo

    run_demo(out, config)


def _dtype(name: str):
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise InputError(f"--precision {name}: use float32 or bfloat16")
    return known[name]


def _covariates(arguments: list[str]) -> dict[str, str]:
    """["--age", "72", "--sex=F"] -> {"age": "72", "sex": "F"}."""
    asked, rest = {}, list(arguments)
    while rest:
        name, separator, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise InputError(f"{name!r} stands alone; ask for a covariate as --name value")
        if not separator:
            if not rest:
                raise InputError(f"{name} needs a value")
            value = rest.pop(0)
        asked[name.removeprefix("--").replace("-", "_")] = value
    return asked


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


def _requests(table: Path) -> list[dict]:
    """Rows of a table of requests; identifiers in it are not covariates."""
    from ldm3d.data.bids import read_table

    frame = read_table(table).drop(columns=["participant_id", "session_id"], errors="ignore")
    if frame.empty:
        raise InputError(f"{table} has no rows; write one for each volume")
    return [dict(zip(frame.columns, row)) for row in frame.to_numpy().tolist()]


@exit_on_input_error
def main() -> None:
    """Entry point of the console script."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", flush=True)
    app()


if __name__ == "__main__":
    main()
