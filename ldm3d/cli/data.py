"""Commands before and between the trainings: phantoms, a check, prepared scans, latents."""

import functools
import re
from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli.options import VOLUMETRY, ConfigPath, Device, Override, Precision, Ruler, app
from ldm3d.errors import InputError


@app.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(help="Where to write; must be empty or absent.", show_default=False)],
    subjects: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    shape: Annotated[tuple[int, int, int], typer.Option(help="Voxels to the right, front and top.")] = (40, 48, 40),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core if not given.")] = None,
    twins: Annotated[
        str | None,
        typer.Option(help="Two sessions each, one covariate changed: age=15, sex or ventricular_volume_ml=10."),
    ] = None,
) -> None:
    """Make a BIDS dataset of toy brains with exactly known covariates."""
    from ldm3d.data.phantom_dataset import write_dataset
    from ldm3d.data.phantoms import Change

    name, _, amount = (twins or "").partition("=")
    try:
        difference = float(amount or 0)
    except ValueError:
        raise InputError(f"--twins {twins}: write NAME=NUMBER, such as age=15, or sex") from None
    change = Change(name, difference) if twins else None
    write_dataset(folder, subjects, shape, seed, workers=workers, twins=change)
    print(f"{subjects} phantoms written to {folder}" + (f", each with a twin: {twins}" if twins else ""))


@app.command()
def config(
    name: Annotated[
        str | None, typer.Argument(help="Such as age-and-sex, or your own file; none: list names.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write it; if not given, it is printed.")] = None,
    full: Annotated[bool, typer.Option("--full", help="With all keys of its recipe and all defaults.")] = False,
    override: Override = [],  # noqa: B006 (typer reads it, and it is never changed)
) -> None:
    """Copy a config that comes with ldm3d, to edit it; or show a file of yours in full, with what its recipe gives.

    Commands take such a name, too, in place of a file.
    """
    from ldm3d.config.read import full_text, load_config
    from ldm3d.config.recipe import shipped_configs
    from ldm3d.errors import choose
    from ldm3d.files import write_atomic

    shipped = shipped_configs()
    if name is None:
        for each, path in shipped.items():
            about = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            print(f"{each:28} {re.split('[:,] ', about)[0]}")
        return
    if full or override or Path(name).is_file():
        text = full_text(load_config(name, override))
    else:
        text = shipped[choose("config", name, tuple(shipped))].read_text(encoding="utf-8")
    if out is None:
        print(text, end="")
    elif out.exists():
        raise InputError(f"{out} is there already, and may have been edited; give another name, or remove it")
    else:
        write_atomic(out, text)
        print(f"{out} written; edit its data section, then: ldm3d check {out}")


@app.command("import-dicom")
def import_dicom(
    folder: Annotated[Path, typer.Argument(help="With a folder of DICOM files for each person.", show_default=False)],
    out: Annotated[Path, typer.Option(help="BIDS dataset to write; must be empty or absent.")],
    series: Annotated[str | None, typer.Option(help="Regular expression in the description of the wanted series.")] = None,
    suffix: Annotated[str, typer.Option(help="BIDS suffix of the scans.")] = "T1w",
    sessions: Annotated[bool, typer.Option("--sessions", help="Folders of people hold one for each session.")] = False,
) -> None:
    """Convert DICOM files into a BIDS dataset, with dcm2niix, which has to be installed."""
    from ldm3d.data.from_dicom import T1W, convert

    if series is None and suffix != "T1w":
        raise InputError(f"--suffix {suffix} goes with --series: say what the series is called in the files, such as flair")
    table = convert(folder, out, series or T1W, suffix, sessions)
    known = [name for name in ("age", "sex") if table[name].notna().all()]
    print(
        f"{len(table)} scans of {table['participant_id'].nunique()} people written to {out}"
        + (f"; the files say everybody's {' and '.join(known)}" if known else "; add ages and sexes to participants.tsv")
    )


@app.command()
def check(
    config: ConfigPath,
    override: Override = [],  # noqa: B006 (typer reads it, and it is never changed)
    times: Annotated[bool, typer.Option(help="Time a few steps of both trainings.")] = True,
) -> None:
    """Look before anything runs: scans, columns, memory, disk, time, and what to do first. Exit code 0: ready."""
    from ldm3d.check import check
    from ldm3d.config.read import load_config

    found = check(load_config(config, override), times)
    print(found.text())
    if found.todo:
        raise typer.Exit(2)


@app.command()
def prepare(
    config: ConfigPath,
    override: Override = [],  # noqa: B006 (typer reads it, and it is never changed)
    strict: Annotated[bool, typer.Option(help="Stop if any scan cannot be used.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core if not given.")] = None,
) -> None:
    """Bring every scan to the config's grid; only new and changed ones."""
    from ldm3d.config.read import load_config
    from ldm3d.data.preparing import prepare
    from ldm3d.data.splits import MIN_TEST_SUBJECTS
    from ldm3d.processes import started_processes
    from ldm3d.report.preparation import write_preparation

    settings, processes = load_config(config, override), started_processes()
    done = prepare(settings, workers=workers, strict=strict, processes=processes)
    splits = ", ".join(f"{count} {split}" for split, count in done.table["split"].value_counts().items())
    if processes.is_main:
        page = write_preparation(settings, done)
        print(
            f"{done.prepared} scans prepared, {done.cached} unchanged, {len(done.failed)} failed in {done.seconds:.0f} s; "
            f"{splits}; written to {settings.prepared_folder}\nlook at every scan, the oddest first: {page}"
        )
        tested = done.table.loc[done.table["split"] == "test", "subject"].nunique()
        if settings.data.splits.test and tested < MIN_TEST_SUBJECTS:
            print(f"{tested} subjects are held out for the test, too few to evaluate a model: raise data.splits.test now")


@app.command()
def measure(
    config: ConfigPath,
    out: Annotated[Path, typer.Option(help="Table to write (.tsv).")],
    override: Override = [],  # noqa: B006
    measure: Ruler = VOLUMETRY,
    labels: Annotated[Path | None, typer.Option(help="Instead, a folder with a label map of each scan.")] = None,
    volume: Annotated[list[str], typer.Option(metavar="NAME=LABEL,LABEL", help="A quantity and its labels.")] = [],  # noqa: B006
    total: Annotated[list[str], typer.Option(metavar="NAME=GROUP+GROUP", help="A sum of such quantities.")] = [],  # noqa: B006
    pattern: Annotated[str | None, typer.Option(help="Which label map, if a scan has several: glob of name or path.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core if not given.")] = None,
    device: Device = None,
) -> None:
    """Measure every prepared scan; the table goes into data.covariates_tables, so that age and sex are enough to begin."""
    from ldm3d.config.read import load_config
    from ldm3d.data.labels import LabelMaps, parse_groups, parse_totals
    from ldm3d.data.tables import write_table
    from ldm3d.processes import cores_each, own_device
    from ldm3d.rulers.table import count_label_maps, measure_scans

    settings = load_config(config, override)
    if out.suffix != ".tsv":
        raise InputError(f"{out} must end in .tsv: tabs separate its columns")
    if (labels is None) != (not volume):
        raise InputError("--labels FOLDER goes with at least one --volume NAME=LABEL,LABEL, and the other way round")
    if labels:
        if not labels.is_dir():
            raise InputError(f"no folder {labels} (--labels)")
        table = count_label_maps(settings, LabelMaps(labels, pattern), parse_groups(volume), parse_totals(total))
    else:
        table = measure_scans(settings, measure, workers or cores_each(), device or own_device())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_table(out, table)
    names = [name for name in table if name not in (settings.data.subject_column, settings.data.session_column)]
    failed = int(table[names].isna().any(axis=1).sum())
    print(
        f"{len(table)} rows with {', '.join(names)} written to {out}"
        + (f"; {failed} of them have a missing value" if failed else "")
        + f". To train with them, add data.covariates_tables: [{out}] and each as a covariate, and run `ldm3d prepare` again"
    )


@app.command()
def encode(
    config: ConfigPath,
    override: Override = [],  # noqa: B006
    device: Device = None,
    precision: Precision = "auto",
    force: Annotated[bool, typer.Option(help="Encode even if the cache is up to date.")] = False,
) -> None:
    """Encode all prepared scans with the trained autoencoder; stage 2 reads these latents."""
    import warnings

    import torch

    from ldm3d.conditions import ImageChannels
    from ldm3d.config.read import load_config
    from ldm3d.data.coded import CodedVolumes
    from ldm3d.data.conditions import cached_conditions, find_files, load_condition
    from ldm3d.data.latents import describe_noise, is_fresh, noise_share, read_latents, write_latents
    from ldm3d.data.preparing import read_scan_table
    from ldm3d.experiment import latents_origin
    from ldm3d.models.autoencoder import LatentSpace
    from ldm3d.precision import dtype
    from ldm3d.processes import own_device, started_processes

    settings, processes = load_config(config, override), started_processes()
    scans = read_scan_table(settings)
    device = device or own_device()
    kind = dtype(precision, device)
    origin = latents_origin(settings)
    autoencoder = LatentSpace.from_pretrained(settings.autoencoder_folder, device, kind)
    if is_fresh(settings.latents_folder, origin) and not force:
        if processes.is_main:
            print(f"the latents in {settings.latents_folder} are up to date")
        return

    @torch.no_grad()
    def moments(volumes):
        return autoencoder.encode(torch.from_numpy(volumes).to(device, kind)).float().cpu().numpy()

    channels, conditions = ImageChannels(settings.diffusion.conditions, autoencoder), {}
    for each in cached_conditions(settings):
        if each == settings.made_labels:  # they are what is coded
            continue
        image = functools.partial(load_condition, settings, each, dict(zip(scans["key"], find_files(settings, each, scans))))
        encoded = moments if each.name == settings.diffusion.makes else functools.partial(encoded_with, channels, each)
        conditions[each.name] = image, encoded
    load = CodedVolumes.of(settings, scans)
    more = {"conditions": conditions, "mirrored": settings.diffusion.mirror}
    write_latents(settings.latents_folder, scans, load, moments, origin, processes=processes, **more)
    if processes.is_main:
        line, warning = describe_noise(noise_share(read_latents(settings.latents_folder, origin)[0]))
        print(f"latents of {len(scans)} scans written to {settings.latents_folder}; {line}")
        if warning:
            warnings.warn(warning, stacklevel=1)


def encoded_with(channels, condition, volumes):
    """The channels of a condition of some scans, as the latent cache holds them."""
    import torch

    with torch.no_grad():
        return channels.encoded(condition, torch.from_numpy(volumes).to(channels.autoencoder.latent_mean.device)).cpu().numpy()
