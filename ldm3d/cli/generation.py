"""Commands for a trained model: generate, dicom, info, export, push, import-monai."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli.options import (
    Audit,
    BatchSize,
    Device,
    Guidance,
    ModelPath,
    Precision,
    SamplerName,
    Seed,
    SeriesFolder,
    Spread,
    Steps,
    Threads,
    app,
    load_model,
)
from ldm3d.cli.placing import Stripped
from ldm3d.errors import InputError, shown

OfFiles = Annotated[str, typer.Option(help="Of the weights in the files: float16, bfloat16, float32 or int8.")]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def generate(
    context: typer.Context,
    model: ModelPath,
    out: SeriesFolder,
    num: Annotated[int | None, typer.Option("--num", "--volumes", min=1, help="By default 1 (torchrun: --volumes).")] = None,
    ask: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="A covariate whose name is an option.")] = [],  # noqa: B006 (typer reads it, and it is never changed)
    table: Annotated[Path | None, typer.Option(help="CSV or TSV with covariate columns: a volume for each row.")] = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    batch_size: BatchSize = 8,
    group: Annotated[int | None, typer.Option(min=1, help="Batch size of the U-Net; changes the last bits.")] = None,
    threads: Threads = 1,
    device: Device = None,
    precision: Precision = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile: faster for many volumes.")] = False,
    check: Annotated[bool, typer.Option(help="Check finished volumes by checksum, not by size only.")] = True,
    audit: Audit = None,
    dicom: Annotated[Path | None, typer.Option(help="Write the volumes as DICOM into this folder, too.")] = None,
    condition: Annotated[list[str], typer.Option(metavar="NAME=FILE", help="An image that the model takes.")] = [],  # noqa: B006
    measured: Annotated[list[str], typer.Option(metavar="NAME=MASK", help="Which voxels of it were measured.")] = [],  # noqa: B006
    told: Annotated[list[str], typer.Option(metavar="NAME.COVARIATE=VALUE", help="Of a visit that is given: its age.")] = [],  # noqa: B006
    bids: Annotated[Path | None, typer.Option(help="Dataset with the images: --num volumes for each session.")] = None,
    like: Annotated[str | None, typer.Option(help="Condition on whose own voxels the volumes are written.")] = None,
    image_guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale of the images.")] = None,
    spread: Spread = None,
    stripped: Stripped = False,
) -> None:
    """Generate volumes for given covariates, and images where the model takes some, as a BIDS derivative.

    Request the model's covariates by name: --age 72 --sex F --ventricular-volume-ml 45, or --ask age=72 --ask sex=F. Others
    are left open.

    Run again, the same command continues where it was stopped or killed. Several processes share the work: torchrun
    --nproc_per_node 4 -m ldm3d generate ..., accelerate launch -m ldm3d generate ..., or srun. Exit code 75: stopped by a
    signal, run it again.
    """
    from ldm3d.generation.given_scans import check_needed
    from ldm3d.privacy.guard import Guard
    from ldm3d.processes import which_process

    processes = which_process()
    pipeline, sampling = load_model(model, device, precision, seed, steps, guidance, sampler)
    pipeline.group, pipeline.threads = group, threads
    asked = requested(context.args, ask)
    if compile:
        pipeline.compile()
    if table is not None and (asked or num is not None):
        raise InputError("give either --table, with one row a volume, or covariates and --num")
    sampling = sampling.replace(image_guidance=image_guidance, spread=spread)
    if bids is not None or condition:
        if table is not None or audit is not None or (bids is not None and condition):
            raise InputError("--bids and --condition go with covariates and --num, and with neither --table nor --audit")
        files = named_files(condition, measured, told)
        pipeline, rows = with_images(pipeline, asked, num or 1, files, bids, like, stripped)
    else:
        if like or measured or told or stripped:
            raise InputError("--like, --measured, --told and --stripped go with images: give --condition NAME=FILE, or --bids")
        check_needed(pipeline.conditions)
        rows = pipeline.parse(read_requests(table) if table is not None else [asked] * (num or 1))
    guard = Guard.load(audit, pipeline.model_hash) if audit else None
    if dicom is not None:
        _dicom()  # before anything is generated
    if run_series(pipeline, sampling, rows, out, batch_size, check, guard, processes) and dicom is not None:
        as_dicom(out, dicom)


def run_series(pipeline, sampling, rows: list[dict], out: Path, batch_size: int, check: bool, guard, processes) -> bool:
    """Generate with a progress bar, and print the outcome; whether the series is complete."""
    from tqdm import tqdm

    from ldm3d.generation.run import generate
    from ldm3d.generation.series import WITHHELD
    from ldm3d.preemption import REQUEUE, preemption
    from ldm3d.processes import cores_each

    threads = pipeline.threads
    if pipeline.device.type == "cpu" and processes.is_main and cores_each() > threads and len(rows) > pipeline.group_size:
        print(
            f"computing with {threads} of {cores_each()} cores: start more processes (torchrun --nproc_per_node N -m ldm3d "
            "generate ...), or use --threads, which changes the last bits",
            flush=True,
        )
    who = f"process {processes.rank} of {processes.world}: " if processes.world > 1 else ""
    settings = {"desc": "generate", "unit": "volume", "mininterval": often(), "disable": not processes.is_main}
    settings["total"] = -(-len(rows) // processes.world)  # about; `show` knows this process's share
    with preemption() as stop, tqdm(**settings) as bar:

        def show(finished: int, volumes: int) -> None:
            bar.total = volumes
            bar.update(finished - bar.n)

        def resume(finished: int, volumes: int) -> None:
            if finished:
                print(f"{who}{finished} of {volumes} volumes there already", flush=True)

        tally = generate(pipeline, out, rows, sampling, batch_size, processes, check, show, resume, stop, guard)
        if stop.asked:
            bar.close()
            there = f"stopped by {stop.signal}, {tally.missing} volumes missing: run the same command to continue from there"
            print(f"{who}{tally}; {there}", flush=True)
            raise SystemExit(REQUEUE)
    if tally.missing:
        print(f"{who}{tally}; {tally.missing} volumes of {out} are left to other processes")
    else:
        print(f"{who}{tally}; {len(rows) - tally.withheld} synthetic volumes written to {out}")
    if tally.withheld:
        print(f"{who}{tally.withheld} of {len(rows)} withheld: too near to a training subject; see {out / WITHHELD}")
    return not tally.missing


@app.command("dicom")
def as_dicom(
    folder: Annotated[Path, typer.Argument(help="Of `ldm3d generate`.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where to write sub-syn0001.dcm and so on.", show_default=False)],
    classic: Annotated[bool, typer.Option("--classic", help="A series of MR images each, for older programs.")] = False,
) -> None:
    """Write generated volumes as DICOM: Enhanced MR objects, or classic series, that say that they are synthetic."""
    print(f"{_dicom()(folder, out, classic)} volumes written as DICOM to {out}")


def _dicom():
    """What writes DICOM, where its library is there."""
    try:
        from ldm3d.dicom.convert import convert
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing, which DICOM needs; pip install 'ldm3d[dicom]'") from None
    return convert


@app.command()
def info(
    model: Annotated[
        Path | None,
        typer.Argument(help="Pipeline folder, for example runs/toy/model, or a shipped model's name.", show_default=False),
    ] = None,
    environment: Annotated[
        bool, typer.Option("--environment", help="Devices of this machine, and the kernels that load.")
    ] = False,
) -> None:
    """Grid and covariates of a model; or the devices and kernels of this machine."""
    from ldm3d.environment import describe_environment
    from ldm3d.pipeline import Pipeline

    if model is None and not environment:
        raise InputError("give a model's folder, or --environment")
    if model is not None:
        print(Pipeline.from_pretrained(model, "cpu"))
    if environment:
        print(describe_environment())


@app.command()
def export(
    model: ModelPath,
    out: Annotated[Path, typer.Option(help="Folder to write, named like the model; must be empty or absent.")],
    precision: OfFiles = "float16",
    about: Annotated[Path | None, typer.Option(help="Markdown for the card: whose data, approval, further limits.")] = None,
    segmenter: Annotated[Path | None, typer.Option(help="Folder of `ldm3d segmenter`, to lie beside the networks.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Folder of `ldm3d evaluate`: its figures go into the card.")] = None,
    licence: Annotated[str, typer.Option("--license", help="Of the weights, as Hugging Face calls it.")] = "apache-2.0",
) -> None:
    """Copy a model for others: half of the size, with a model card (README.md) made from what is known of it."""
    from ldm3d.export import export as write

    size = write(model, out, precision, about, segmenter, licence, evaluation=evaluation)
    print(f"model written to {out}: {size / 1e6:.1f} MB; read its README.md before you publish it")


@app.command()
def push(
    model: ModelPath,
    name: Annotated[str, typer.Argument(help="user/name at the hub.", show_default=False)],
    precision: OfFiles = "float16",
    about: Annotated[Path | None, typer.Option(help="Markdown: whose data, training, figures, limits; for the card.")] = None,
    licence: Annotated[str, typer.Option("--license", help="Of the weights, as Hugging Face calls it.")] = "apache-2.0",
    private: Annotated[bool, typer.Option("--private", help="For its owner alone, if it is new.")] = False,
) -> None:
    """Push a model to the Hugging Face Hub, or to the hub that HF_ENDPOINT names: weights, JSON and a card."""
    from ldm3d.export import push as to_hub

    print(f"pushed: {to_hub(model, name, precision, about, licence, private)}")


@app.command("import-monai")
def import_monai(
    folder: Annotated[Path, typer.Argument(help="Of a published model; see docs/monai.md.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Pipeline folder to write; must be empty or absent.", show_default=False)],
    library: Annotated[
        str, typer.Option(help="Library of the networks: monai (MONAI core) or monai-generative (0.2.3).")
    ] = "monai",
    settings: Annotated[
        Path | None, typer.Option(help="YAML with settings that are not in the files; by default FOLDER/import.yaml.")
    ] = None,
) -> None:
    """Convert a model that was trained with MONAI and published as PyTorch checkpoints."""
    from ldm3d.published import import_model

    pipeline = import_model(folder, out, library, settings)
    print(f"model written to {out}; its covariates: {', '.join(pipeline.schema.names) or 'none'}")


def requested(arguments: list[str], more: list[str]) -> dict[str, str]:
    """["--age", "72", "--sex=F"] and ["group=patient"] -> {"age": "72", "sex": "F", "group": "patient"}."""
    asked, rest = {}, list(arguments)
    while rest:
        name, separator, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise InputError(f"{name!r} has no name; request a covariate as --name value")
        if not separator:
            if not rest:
                raise InputError(f"{name} needs a value")
            value = rest.pop(0)
        asked[name.removeprefix("--").replace("-", "_")] = value
    for text in more:
        name, separator, value = text.partition("=")
        if not separator:
            raise InputError(f"--ask {shown(text)}: write --ask NAME=VALUE, such as --ask age=72")
        if name in asked:
            raise InputError(f"{shown(name)} is asked twice; keep one")
        asked[name] = value
    return asked


def often() -> float:
    """Seconds between two updates of a progress bar; in a log file twice a minute."""
    return 0.1 if sys.stderr.isatty() else 30


def read_requests(table: Path) -> list[dict]:
    """Rows of a table of requests; identifiers in it are not covariates."""
    from ldm3d.data.tables import read_table

    frame = read_table(table).drop(columns=["participant_id", "session_id"], errors="ignore")
    if not len(frame):
        raise InputError(f"{table} has no rows; write one for each volume")
    return [dict(zip(frame.columns, row)) for row in frame.to_numpy().tolist()]


def named_files(conditions: list[str], measured: list[str], told: list[str]) -> dict:
    """["T1w=scan.nii.gz"], ["T1w=mask.nii.gz"] -> {"T1w": (scan, mask)}, or {"T1w": scan} without a mask.

    With ["visit.age=63"], of a visit: {"visit": (scan, {"age": "63"})}.
    """
    found: list[dict[str, Path]] = [{}, {}]
    for texts, into, option in zip((conditions, measured), found, ("--condition", "--measured")):
        for text in texts:
            name, separator, path = text.partition("=")
            if not separator or not path or name in into:
                raise InputError(f"{option} {shown(text)}: write NAME=FILE once for each, such as T1w=scan.nii.gz")
            into[name] = Path(path)
    files, masks = found
    if strangers := masks.keys() - files.keys():
        raise InputError(f"--measured {', '.join(sorted(strangers))}: there is no such --condition")
    covariates: dict[str, dict[str, str]] = {}
    for text in told:
        name, _, rest = text.partition(".")
        covariate, separator, value = rest.partition("=")
        if not separator or not value or name not in files or name in masks:
            raise InputError(f"--told {shown(text)}: write NAME.COVARIATE=VALUE for a visit that is given: visit.age=63")
        covariates.setdefault(name, {})[covariate.replace("-", "_")] = value
    beside = {**masks, **covariates}
    return {name: (path, beside[name]) if name in beside else path for name, path in files.items()}


def with_images(
    pipeline, asked: dict, num: int, files: dict, bids: Path | None, like: str | None, stripped: bool = False
) -> tuple:
    """(the pipeline with images given, requests), from files or from a dataset."""
    from ldm3d.generation.dataset import find_sessions, images_of, placeable

    if not pipeline.conditions:
        raise InputError("this model takes no images: it was trained without `diffusion.conditions`")
    if bids is None:
        return pipeline.given(files, like, stripped), pipeline.parse([asked] * num)
    sessions = find_sessions(bids, pipeline.conditions, pipeline.suffix, pipeline.schema.names)
    sessions = placeable(sessions, pipeline, bids, stripped)
    rows = [{**row, **asked} for row in sessions.rows for _ in range(num)]
    return pipeline.given(images_of(sessions, pipeline, bids, num, like, stripped)), pipeline.parse(rows)
