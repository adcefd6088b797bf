"""Commands on given scans by posterior sampling: restore, calibrate, anomaly."""

from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli.options import Device, ModelPath, Precision, app
from ldm3d.cli.placing import Register, Stripped, Template, ready
from ldm3d.cli.scans import Bids, Scan, Source, Table, each_scan, progress_bar
from ldm3d.errors import InputError

Draws = Annotated[int, typer.Option(min=1, help="Draws; their deviation says how far to trust the mean.")]
Levels = Annotated[int, typer.Option(min=1, help="Of noise, from pure noise down.")]
RandomSeed = Annotated[int, typer.Option(min=0, help="Of all random numbers.")]
Doubted = Annotated[float, typer.Option(help="Share of the brain that is drawn again.")]


@app.command()
def restore(
    model: ModelPath,
    scan: Scan = None,
    operator: Annotated[
        list[str],
        typer.Option(
            metavar="WHAT",
            help="What happened to it, in this order: hole=FILE, mask=FILE, ball=-20,35,10:15, missing=z:10-14, slices, "
            "slices=z:6, blur=8, bias=FILE, noise.",
        ),
    ] = [],  # noqa: B006 (typer reads it, and it is never changed)
    table: Table = None,
    bids: Bids = None,
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

    Writes the mean of several draws, the draws, and their deviation. Run again, the same command goes on. A table's columns
    hole, mask, missing, bias, slices and blur say what happened to each scan, before what --operator says of all.
    """
    from ldm3d.applications.asked import asked_scans
    from ldm3d.applications.changes import parse_pairs
    from ldm3d.applications.derived import Derived
    from ldm3d.applications.restore import restore as apply
    from ldm3d.applications.restore_files import RESTORE, operators_of, write_restored
    from ldm3d.applications.restore_files import files_of as named

    pipe, placing = ready(model, device, precision, register, template, stripped)
    given = parse_pairs(source, "--from")
    options = {"samples": samples, "levels": levels, "seed": seed}

    def happened(each) -> list[str]:
        words = [*operators_of(each.cells, table.parent if table else out), *operator]
        if not words:
            raise InputError("say what happened to the scan, --operator hole=FILE or slices; --operator noise for noise alone")
        return words

    def files_of(each) -> Derived:
        words = happened(each)
        asked = {"operator": words, "noise": noise, "from": {**each.covariates, **given}, **options}
        asked |= {"register": [register, template], **_told(stripped)}
        return Derived(out, RESTORE, pipe, each.scan, asked, [*named(words), Path(template)])

    def work(each, files, show) -> str:
        own = {**each.covariates, **given}
        restored = apply(pipe, each.scan, happened(each), noise, covariates=own, progress=show, **options, **placing)
        return f"restored scan, derived and synthetic in part: {write_restored(files, restored)}"

    each_scan("restore", "level", asked_scans(pipe, scan, table, bids), files_of, work)


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
    """What differs from the healthy counterpart in healthy people, which `ldm3d anomaly` needs to judge a scan.

    Stopped and run again, the same command goes on: what it found of each person lies in OUT.people until OUT is there.
    """
    import shutil

    from ldm3d.applications.anomaly import calibrate as apply
    from ldm3d.data.tables import check_column, read_table

    pipe, placing = ready(model, device, precision, register, template, stripped)
    frame = read_table(table)
    check_column(table, list(frame), "path", "the healthy scans")
    names = [name for name in pipe.schema.names if name in frame]
    people = [(table.parent / row["path"], {name: row[name] for name in names}) for row in frame.to_dict("records")]
    with progress_bar("calibrate", "scan") as show:
        done = 0

        def count(outcome: str) -> None:
            nonlocal done
            done += 1
            if outcome.startswith("left out"):
                print(outcome, flush=True)
            show(done, len(people))

        options = {"samples": samples, "levels": levels, "doubted": doubted, "seed": seed}
        kept = out.with_name(f"{out.name}.people")
        found = apply(pipe, people, count, kept, **placing, **options)
    found.save(out)
    shutil.rmtree(kept, ignore_errors=True)
    print(
        f"{found.people} of {len(people)} healthy people written to {out}; use it with the same --samples, --levels, --doubted"
    )


@app.command()
def anomaly(
    model: ModelPath,
    calibration: Annotated[Path, typer.Option(help="File of `ldm3d calibrate`.", show_default=False)],
    scan: Scan = None,
    table: Table = None,
    bids: Bids = None,
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
    from ldm3d.applications.anomaly import ANOMALY, about_of, write_anomaly
    from ldm3d.applications.anomaly import anomaly as apply
    from ldm3d.applications.asked import asked_scans
    from ldm3d.applications.calibration import Calibration
    from ldm3d.applications.changes import parse_pairs
    from ldm3d.applications.derived import Derived

    pipe, placing = ready(model, device, precision, register, template, stripped)
    options = {"samples": samples, "levels": levels, "doubted": doubted, "seed": seed}
    healthy = Calibration.load(calibration, about_of(pipe, options))
    given = parse_pairs(source, "--from")

    def files_of(each) -> Derived:
        asked = {**options, "from": {**each.covariates, **given}, "register": [register, template]}
        asked |= {"calibration": healthy.identity, **_told(stripped)}
        return Derived(out, ANOMALY, pipe, each.scan, asked, [Path(template)])

    def work(each, files, show) -> str:
        found = apply(pipe, each.scan, healthy, {**each.covariates, **given}, **placing, progress=show, **options)
        path = write_anomaly(files, found, healthy)
        unusual = sum(row["p"] <= 0.05 for row in found.clusters)
        return f"{len(found.clusters)} clusters, {unusual} of them unusually large (corrected p at most 0.05): {path}"

    each_scan("anomaly", "part", asked_scans(pipe, scan, table, bids), files_of, work)


def _told(stripped: bool) -> dict[str, bool]:
    """In what a result follows from; nothing by default."""
    return {"stripped": True} if stripped else {}
