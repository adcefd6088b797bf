"""Commands on given scans by posterior sampling: restore, calibrate, anomaly."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli.options import Device, ModelPath, Precision, app
from ldm3d.cli.placing import Register, Stripped, Template, ready

Scan = Annotated[Path, typer.Argument(help="A scan (NIfTI, .mgz).", show_default=False)]
Source = Annotated[list[str], typer.Option("--from", metavar="NAME=VALUE,...", help="The person's covariates.")]
Draws = Annotated[int, typer.Option(min=1, help="Draws; their deviation says how far to trust the mean.")]
Levels = Annotated[int, typer.Option(min=1, help="Of noise, from pure noise down.")]
RandomSeed = Annotated[int, typer.Option(min=0, help="Of all random numbers.")]
Doubted = Annotated[float, typer.Option(help="Share of the brain that is drawn again.")]


@app.command()
def restore(
    model: ModelPath,
    scan: Scan,
    operator: Annotated[
        list[str],
        typer.Option(
            metavar="WHAT",
            help="What happened to it, in this order: hole=FILE, mask=FILE, ball=-20,35,10:15, missing=z:10-14, slices, "
            "slices=z:6, blur=8, bias=FILE, noise.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder: empty, absent, or of restored scans.")] = Path("restored"),
    noise: Annotated[float, typer.Option(help="Deviation of the scan's noise, as a share of its intensity range.")] = 0.01,
    source: Source = [],  # noqa: B006 (typer reads it, and it is never changed)
    samples: Draws = 8,
    levels: Levels = 8,
    seed: RandomSeed = 0,
    register: Register = "model",
    template: Template = "mni152",
    stripped: Stripped = False,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Restore a scan with holes, missing or thick slices, blur or noise. Research only: what was not measured is made up.

    Writes the mean of several draws, the draws, and their deviation. Run again, the same command does nothing.
    """
    from ldm3d.applications.changes import parse_pairs
    from ldm3d.applications.restore import restore as apply
    from ldm3d.applications.restore_files import restored_files, write_restored

    pipe, placing = ready(model, device, precision, register, template, stripped, scan)
    given = parse_pairs(source, "--from")
    asked = {"operator": operator, "noise": noise, "from": given, "samples": samples, "levels": levels, "seed": seed}
    files = restored_files(out, pipe, scan, {**asked, "register": [register, template], **_told(stripped)})
    if files.is_done:
        print(f"{files.path('restored')} is there already")
        return
    with _bar("restore", "level") as show:
        options = {"samples": samples, "levels": levels, "seed": seed, "progress": show, **placing}
        restored = apply(pipe, scan, operator, noise, covariates=given, **options)
    print(f"restored scan, derived and synthetic in part: {write_restored(files, restored)}")


@app.command()
def calibrate(
    model: ModelPath,
    table: Annotated[Path, typer.Argument(help="CSV or TSV of healthy people that MODEL has not seen: path, covariates.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("healthy.npz"),
    samples: Draws = 4,
    levels: Levels = 6,
    doubted: Doubted = 0.1,
    seed: RandomSeed = 0,
    register: Register = "model",
    template: Template = "mni152",
    stripped: Stripped = False,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """What differs from the healthy counterpart in healthy people, which `ldm3d anomaly` needs to judge a scan."""
    from ldm3d.applications.anomaly import calibrate as apply
    from ldm3d.data.tables import check_column, read_table

    pipe, placing = ready(model, device, precision, register, template, stripped)
    frame = read_table(table)
    check_column(table, list(frame), "path", "the healthy scans")
    names = [name for name in pipe.schema.names if name in frame]
    people = [(table.parent / row["path"], {name: row[name] for name in names}) for row in frame.to_dict("records")]
    with _bar("calibrate", "scan") as show:
        done = 0

        def count(outcome: str) -> None:
            nonlocal done
            done += 1
            if outcome.startswith("left out"):
                print(outcome, flush=True)
            show(done, len(people))

        options = {"samples": samples, "levels": levels, "doubted": doubted, "seed": seed}
        found = apply(pipe, people, count, **placing, **options)
    found.save(out)
    print(
        f"{found.people} of {len(people)} healthy people written to {out}; use it with the same --samples, --levels, --doubted"
    )


@app.command()
def anomaly(
    model: ModelPath,
    scan: Scan,
    calibration: Annotated[Path, typer.Option(help="File of `ldm3d calibrate`.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder: empty, absent, or of judged scans.")] = Path("anomaly"),
    source: Source = [],  # noqa: B006
    samples: Draws = 4,
    levels: Levels = 6,
    doubted: Doubted = 0.1,
    seed: RandomSeed = 0,
    register: Register = "model",
    template: Template = "mni152",
    stripped: Stripped = False,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Where a scan differs from its healthy counterpart more than healthy people's do. Research only, no diagnosis."""
    from ldm3d.applications.anomaly import about_of, anomaly_files, write_anomaly
    from ldm3d.applications.anomaly import anomaly as apply
    from ldm3d.applications.calibration import Calibration
    from ldm3d.applications.changes import parse_pairs

    pipe, placing = ready(model, device, precision, register, template, stripped, scan)
    options = {"samples": samples, "levels": levels, "doubted": doubted, "seed": seed}
    healthy = Calibration.load(calibration, about_of(pipe, options))
    given = parse_pairs(source, "--from")
    asked = {**options, "from": given, "register": [register, template], "calibration": healthy.identity, **_told(stripped)}
    files = anomaly_files(out, pipe, scan, asked)
    if files.is_done:
        print(f"{files.path('zscore')} is there already")
        return
    with _bar("anomaly", "part") as show:
        found = apply(pipe, scan, healthy, given, **placing, progress=show, **options)
    path = write_anomaly(files, found, healthy)
    unusual = sum(row["p"] <= 0.05 for row in found.clusters)
    print(f"{len(found.clusters)} clusters, {unusual} of them unusually large (corrected p at most 0.05): {path}")


def _told(stripped: bool) -> dict[str, bool]:
    """In what a result follows from; nothing by default."""
    return {"stripped": True} if stripped else {}


@contextlib.contextmanager
def _bar(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a function of (done, total)."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=unit, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
