"""Commands about what measures volumes: segmenter, which trains one, and compare, for what other programs measured."""

from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli import options
from ldm3d.cli.options import DataOverride, Device, Experiment, Root
from ldm3d.errors import InputError

Pattern = Annotated[
    str | None, typer.Option(help="Which label map, if a scan has several: glob of its name or path, '*desc-aseg_dseg*'.")
]


@options.app.command()
def segmenter(
    model: Annotated[
        Path, typer.Argument(help="Pipeline folder, whose training scans and grid are used.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(help="BIDS folder or table that the model was trained on.")],
    labels: Annotated[Path, typer.Option(help="Folder with a label map of each scan, sub-XX[_ses-YY]_...nii.gz.")],
    volume: Annotated[list[str], typer.Option(metavar="NAME=LABEL,LABEL", help="A quantity and its labels.")],
    total: Annotated[
        list[str], typer.Option(metavar="NAME=GROUP+GROUP", help="A quantity that is the sum of others, such as the brain's.")
    ] = [],  # noqa: B006
    pattern: Pattern = None,
    root: Root = None,
    experiment: Experiment = None,
    override: DataOverride = [],  # noqa: B006 (typer reads it, and it is never changed)
    out: Annotated[Path, typer.Option(help="Where to write the segmenter.")] = Path("segmenter"),
    painted: Annotated[
        bool,
        typer.Option(help="Paint every second volume from its label map, which must cover all tissues, in random contrasts."),
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 300,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = None,
) -> None:
    """Train a small segmentation network on scans with label maps, for: ldm3d evaluate --measure segmenter:FOLDER."""
    import numpy as np

    from ldm3d.data.labels import LabelMaps, load_labels, paint_labels, parse_groups, parse_totals
    from ldm3d.evaluation.selection import in_turn
    from ldm3d.experiment import scans_by_use
    from ldm3d.processes import own_device
    from ldm3d.rulers.segmenter import dice
    from ldm3d.training.segmenter import train_segmenter

    groups, maps = parse_groups(volume), LabelMaps(labels, pattern)
    config, *tables = scans_by_use(model, data, out / "work", root, experiment=experiment, overrides=override)
    trained, held_out = (
        [
            (config, key, maps.one(subject, session), groups)
            for key, subject, session in zip(table["key"], table["subject"], table["session"])
        ]
        for table in tables
    )
    paint = (lambda i, random: paint_labels(*trained[i], random)) if painted else None
    network = train_segmenter(
        *(lambda i: load_labels(*trained[i]), len(trained), groups, steps, seed, device or own_device(), paint),
        totals=parse_totals(total),
    )
    network.save_pretrained(out)
    some = in_turn(list(tables[1]["subject"]), seed)[:20]
    for name, values in dice(network, lambda i: load_labels(*held_out[i]), some).items():
        print(f"{name}: Dice {np.nanmean(values):.3f} on {len(values)} held-out scans")
    print(f"segmenter written to {out}; use it with: ldm3d evaluate ... --measure segmenter:{out}")


@options.app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="Dataset with participants.tsv, for example of ldm3d generate.")],
    table: Annotated[Path | None, typer.Option(help="CSV or TSV of volumes, such as SynthSeg's --vol.")] = None,
    column: Annotated[list[str], typer.Option(metavar="NAME=COLUMN+COLUMN", help="A covariate and its columns.")] = [],  # noqa: B006
    to_ml: Annotated[float, typer.Option(help="Millilitres of the table's unit; 0.001 for cubic mm.")] = 1e-3,
    labels: Annotated[Path | None, typer.Option(help="Instead, a folder with a label map of each participant.")] = None,
    volume: Annotated[list[str], typer.Option(metavar="NAME=LABEL,LABEL", help="A covariate and its labels.")] = [],  # noqa: B006
    pattern: Pattern = None,
    out: Annotated[Path, typer.Option(help="Where to write the page and the figures.")] = Path("comparison"),
) -> None:
    """Compare measurements of another program (SynthSeg, FreeSurfer) with the requests, or with a table of real subjects."""
    from ldm3d.data.labels import LabelMaps, parse_groups
    from ldm3d.report.external import (
        compare_written,
        count_labels,
        parse_columns,
        read_participants,
        read_volumes,
        write_comparison,
    )

    if (table is None) == (labels is None):
        raise InputError("give either --table with --column, or --labels with --volume")
    if table is not None:
        measured = read_volumes(table, parse_columns(column), to_ml)
    else:
        maps = LabelMaps(labels, pattern)
        measured = count_labels(maps, list(read_participants(folder)[1]), parse_groups(volume))
    page = write_comparison(out, f"Measured volumes of {options.title(folder)}", *compare_written(folder, measured))
    print(f"page written to {page}")
