"""The command that draws label maps of a scan."""

from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli.options import Device, ModelPath, Precision, Steps, app, load_model
from ldm3d.cli.placing import Stripped
from ldm3d.cli.restore import RandomSeed, Scan, Source, bar, told_stripped


@app.command()
def segment(
    model: ModelPath,
    scan: Scan,
    out: Annotated[Path, typer.Option(help="Folder: empty, absent, or of segmented scans.")] = Path("segmented"),
    source: Source = [],  # noqa: B006 (typer reads it, and it is never changed)
    samples: Annotated[int, typer.Option(min=1, help="Label maps that are drawn; their mean is the probability.")] = 8,
    steps: Steps = None,
    seed: RandomSeed = 0,
    stripped: Stripped = False,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Label maps of a scan by a model that makes them: probabilities, uncertainty, volumes with intervals. No diagnosis."""
    from ldm3d.applications.changes import parse_pairs
    from ldm3d.applications.segment import segment as apply
    from ldm3d.applications.segment import segmented_files, taken, write_segmented
    from ldm3d.errors import InputError

    if not scan.is_file():
        raise InputError(f"{scan}: no such file")
    pipe, _ = load_model(model, device, precision)
    taken(pipe)
    given = parse_pairs(source, "--from")
    asked = {"from": given, "samples": samples, "steps": steps, "seed": seed, **told_stripped(stripped)}
    files = segmented_files(out, pipe, scan, asked)
    if files.is_done:
        print(f"{files.path('labels')} is there already")
        return
    with bar("segment", "map") as show:
        found = apply(pipe, scan, given, samples, seed, steps, stripped, show)
    path = write_segmented(files, found)
    for name, volume in found.volumes.items():
        print(f"{name:24} {volume['ml']:8.1f} ml ({volume['low']:.1f} to {volume['high']:.1f})")
    print(f"label map: {path}")
