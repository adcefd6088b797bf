"""The command edit: a scan as it would be with other covariates."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli.options import VOLUMETRY, Device, ModelPath, Precision, Ruler, app
from ldm3d.cli.placing import Register, Stripped, Template, ready
from ldm3d.errors import InputError

Method = Annotated[str | None, typer.Option(help="ode, noise or linear; by default ode, noise for several samples.")]
Strength = Annotated[
    float | None, typer.Option(help="Noise level to sample from, 0 to 1; by default 1 for ode, 0.9 for noise.")
]


@app.command()
def edit(
    model: ModelPath,
    scan: Annotated[Path | None, typer.Argument(help="A scan (NIfTI, .mgz); or give --table.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder: empty, absent, or of the same command before.")] = Path("edited"),
    source: Annotated[list[str], typer.Option("--from", metavar="NAME=VALUE,...", help="The scan's own covariates.")] = [],  # noqa: B006 (typer reads it, and it is never changed)
    to: Annotated[
        list[str], typer.Option(metavar="NAME=VALUE,...", help="Changes: age=72, age=+10, or age=50:90:5, a trajectory.")
    ] = [],  # noqa: B006
    table: Annotated[
        Path | None, typer.Option(help="CSV or TSV with a path column, and columns of covariates: all of its scans.")
    ] = None,
    method: Method = None,
    strength: Strength = None,
    samples: Annotated[int, typer.Option(min=1, help="Draws of noise; from 2 on, the spread of the change is written.")] = 1,
    average: Annotated[bool, typer.Option("--average", help="One latent, the mean of the samples': smoother.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 20,
    guidance: Annotated[float, typer.Option(min=0, help="1: none. More makes the change larger, not truer.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    hold: Annotated[list[str], typer.Option(metavar="NAME", help="Covariates that stay, though they follow.")] = [],  # noqa: B006
    register: Register = "model",
    template: Template = "mni152",
    stripped: Stripped = False,
    measure: Ruler = VOLUMETRY,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Show a scan as it would be with other covariates: ten years older, say. Research only; what it shows never happened.

    Covariates that --from gives and --to does not change are held, but for those that the model knows to follow from changed
    ones (ventricles from age): these change as they do among people.
    """
    from tqdm import tqdm

    from ldm3d.applications.changes import parse_pairs
    from ldm3d.applications.edit import edit as apply
    from ldm3d.applications.edit_files import EditFolder, Job
    from ldm3d.rulers.volumetry import load_measure

    if (scan is None) == (table is None):
        raise InputError("give either one scan, or --table with a path column")
    pipe, placing = ready(model, device, precision, register, template, stripped)
    given, changes = parse_pairs(source, "--from"), parse_pairs(to, "--to")
    options = {"method": method, "strength": strength, "samples": samples, "average": average, "steps": steps}
    options |= {"guidance": guidance, "seed": seed, **placing}
    if any(covariate.following for covariate in pipe.schema):
        options |= {"hold": hold, "measure": measure}
    rows = _rows(table, pipe.schema.names) if table is not None else [(scan, {})]
    jobs = _distinct(table, [Job(path, {**own, **given}, changes, options) for path, own in rows])
    folder, failed = EditFolder(out, pipe, load_measure(measure, str(pipe.device))), []
    for job in tqdm(jobs, desc="edit", unit="scan", disable=None if len(jobs) > 1 else True):
        try:
            if not job.scan.is_file():
                raise InputError(f"{job.scan}: no such file")
            if folder.is_done(job):
                continue
            with tqdm(desc=job.stem, unit="sample", leave=False, disable=None) as bar:
                done = apply(pipe, job.scan, job.source, job.to, progress=functools.partial(_show, bar), **options)
            folder.write(job, done)
        except InputError as error:
            if table is None:
                raise
            failed.append(str(error))
            tqdm.write(f"left out: {error}")
    if len(failed) < len(jobs):
        print(
            f"{len(jobs) - len(failed)} edited scans, derived and synthetic in part, in {out}; volumes: {folder.write_table()}"
        )
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} scans of {table} were left out; the first: {failed[0]}")


def _distinct(table: Path | None, jobs: list) -> list:
    if len({job.label for job in jobs}) < len(jobs):
        raise InputError(f"{table} has several scans of one subject and session by their names; edit them apart")
    return jobs


def _show(bar, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _rows(table: Path, names: list[str]) -> list[tuple[Path, dict[str, str]]]:
    """(scan, its covariates) of each row; relative paths start at the table's folder, empty cells are open."""
    from ldm3d.data.tables import check_column, read_table

    frame = read_table(table)
    check_column(table, list(frame), "path", "the scans to edit")
    if not len(frame):
        raise InputError(f"{table} has no rows; write one for each scan")
    own = [name for name in names if name in frame]
    return [(table.parent / row["path"], {name: row[name] for name in own}) for row in frame.to_dict("records")]
