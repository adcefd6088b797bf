"""The command edit: a scan as it would be with other covariates."""

from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli.options import VOLUMETRY, Device, ModelPath, Precision, Ruler, app
from ldm3d.cli.placing import Register, Stripped, Template, ready
from ldm3d.cli.scans import Bids, Scan, Source, Table, each_scan

Method = Annotated[str | None, typer.Option(help="ode, noise or linear; by default ode, noise for several samples.")]
Strength = Annotated[
    float | None, typer.Option(help="Noise level to sample from, 0 to 1; by default 1 for ode, 0.9 for noise.")
]


@app.command()
def edit(
    model: ModelPath,
    scan: Scan = None,
    out: Annotated[Path, typer.Option(help="Folder: empty, absent, or of the same command before.")] = Path("edited"),
    source: Source = [],  # noqa: B006 (typer reads it, and it is never changed)
    to: Annotated[
        list[str], typer.Option(metavar="NAME=VALUE,...", help="Changes: age=72, age=+10, or age=50:90:5, a trajectory.")
    ] = [],  # noqa: B006
    table: Table = None,
    bids: Bids = None,
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
    from ldm3d.applications.asked import asked_scans
    from ldm3d.applications.changes import parse_pairs
    from ldm3d.applications.derived import Derived
    from ldm3d.applications.edit import edit as apply
    from ldm3d.applications.edit_files import EDIT, write_edit, write_volumes
    from ldm3d.rulers.volumetry import load_measure

    pipe, placing = ready(model, device, precision, register, template, stripped)
    given, changes = parse_pairs(source, "--from"), parse_pairs(to, "--to")
    options = {"method": method, "strength": strength, "samples": samples, "average": average, "steps": steps}
    options |= {"guidance": guidance, "seed": seed, **placing}
    if any(covariate.following for covariate in pipe.schema):
        options |= {"hold": hold, "measure": measure}
    ruler = load_measure(measure, str(pipe.device))

    def files_of(each) -> Derived:
        asked = {"from": {**each.covariates, **given}, "to": changes, **options}
        return Derived(out, EDIT, pipe, each.scan, asked, [Path(template)])

    def work(each, files, show) -> str:
        done = apply(pipe, each.scan, {**each.covariates, **given}, changes, progress=show, **options)
        write_edit(files, done, ruler)
        return f"edited scan, derived and synthetic in part, in {out}"

    scans = asked_scans(pipe, scan, table, bids)
    try:
        each_scan("edit", "sample", scans, files_of, work)
    finally:
        if EDIT.is_begun(out):
            print(f"volumes: {write_volumes(out, pipe.suffix)}")
