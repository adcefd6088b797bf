"""The command that draws label maps of a scan."""

from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli.options import Device, ModelPath, Precision, Steps, app, load_model
from ldm3d.cli.placing import Stripped
from ldm3d.cli.restore import RandomSeed
from ldm3d.cli.scans import Bids, Scan, Source, Table, each_scan


@app.command()
def segment(
    model: ModelPath,
    scan: Scan = None,
    table: Table = None,
    bids: Bids = None,
    out: Annotated[Path, typer.Option(help="Folder: empty, absent, or of segmented scans.")] = Path("segmented"),
    source: Source = [],  # noqa: B006 (typer reads it, and it is never changed)
    samples: Annotated[int, typer.Option(min=1, help="Label maps that are drawn; their mean is the probability.")] = 8,
    steps: Steps = None,
    seed: RandomSeed = 0,
    stripped: Stripped = False,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Label maps of scans by a model that makes them: probabilities, uncertainty, volumes with intervals. No diagnosis."""
    from ldm3d.applications.asked import asked_scans
    from ldm3d.applications.changes import parse_pairs
    from ldm3d.applications.derived import Derived
    from ldm3d.applications.segment import SEGMENT, taken, write_segmented
    from ldm3d.applications.segment import segment as apply

    pipe, _ = load_model(model, device, precision)
    suffix = taken(pipe).suffix
    given = parse_pairs(source, "--from")
    options = {"samples": samples, "steps": steps, "seed": seed, **({"stripped": True} if stripped else {})}

    def files_of(each) -> Derived:
        return Derived(out, SEGMENT, pipe, each.scan, {**options, "from": {**each.covariates, **given}})

    def work(each, files, show) -> str:
        found = apply(pipe, each.scan, {**each.covariates, **given}, progress=show, **options)
        path = write_segmented(files, found)
        rows = [f"{name:24} {v['ml']:8.1f} ml ({v['low']:.1f} to {v['high']:.1f})" for name, v in found.volumes.items()]
        return "\n".join([*rows, f"label map: {path}"])

    each_scan("segment", "map", asked_scans(pipe, scan, table, bids, suffix), files_of, work)
