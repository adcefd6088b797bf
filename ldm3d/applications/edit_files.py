"""Edited scans as a BIDS derivative: a folder that a killed command leaves in order, and goes on with.

The files:

    OUT/sub-XX[/ses-YY]/anat/   ..._desc-edited_T1w.nii.gz    the scan with other covariates; desc-trajectory, 4D, for several
                                ..._desc-difference_T1w       edited minus scan, in the scan's intensities
                                ..._desc-tissuechange_T1w     share of each voxel that became (+) or ceased to be (-) tissue
                                ..._desc-spread_T1w           deviation of the change over samples, where there are several
                                ..._desc-edited_T1w.json      (or desc-trajectory) appears last: with it the scan is done
    OUT/figures/                a picture of each
    OUT/volumes.tsv             measured volumes before and after
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm3d import figures
from ldm3d.applications.derived import Derived, Kind
from ldm3d.applications.edit import Edit
from ldm3d.covariates import Value, describe
from ldm3d.data.placing import restore
from ldm3d.data.tables import write_table
from ldm3d.rulers.volumetry import Measure, apply_measure, tissue_change

README = (
    "Scans edited by a latent diffusion model (ldm3d): what a person's brain might look like with other covariates. They are "
    "derived from scans and partly synthetic; what they show never happened. Not for diagnosis."
)
TABLE = "volumes.tsv"
EDITED, TRAJECTORY = "edited", "trajectory"
MAPS = ("difference", "tissuechange", "spread")
# BIDS knows no T1w images of four dimensions, so validators are told to ignore trajectories
EDIT = Kind("edit", "Edited brain scans (DERIVED, partly synthetic)", README, (EDITED, TRAJECTORY), (TABLE, TRAJECTORY, *MAPS))


def write_edit(files: Derived, done: Edit, measure: Measure) -> dict[str, Any]:
    """Write an edit; returns what its sidecar says of it.

    Args:
        files: of the scan, of the kind `EDIT`.
        done: the edit.
        measure: of volumes, see `ldm3d.rulers.volumetry.load_measure`.
    """
    placed, spacing = done.placed, files.pipe.grid.spacing_mm
    before = placed.volume[0].cpu().numpy()
    kind = EDITED if len(done.targets) == 1 else TRAJECTORY
    maps: dict[str, list[NDArray]] = {name: [] for name in (kind, *MAPS)}
    volumes, measured = [], []
    for target in range(len(done.targets)):
        change, spread = done.change(target)
        edited = placed.back(placed.reconstruction + change)
        volumes.append((before + change[0].cpu().numpy()).clip(0, 1))
        maps[kind].append(edited)
        maps["difference"].append(edited - placed.scan)
        tissue = tissue_change(before[0], volumes[-1][0], spacing)
        maps["tissuechange"].append(restore(tissue[None], {**placed.info, "low": 0.0, "high": 1.0})[0])
        if spread is not None:
            maps["spread"].append(placed.back_change(spread[0].cpu().numpy()))
        measured.append(dict(apply_measure(measure, volumes[-1], spacing)))
    _draw(files, done, before, volumes)
    of_edit = {
        "From": _given(done.source),
        "To": [_given(row) for row in done.targets],
        **vars(done.settings),
        "VolumesBefore": _numbers(dict(apply_measure(measure, before, spacing))),
        "VolumesAfter": [_numbers(row) for row in measured],
        "Registration": placed.info.get("registration"),
    }
    about = f"A {files.pipe.suffix} scan edited to other covariates by ldm3d: derived, and synthetic in part"
    images = {name: np.concatenate(found) for name, found in maps.items() if found}
    files.write(images, placed.affine, placed.mark, {"Description": about, "Edit": of_edit})
    return of_edit


def write_volumes(folder: Path, suffix: str) -> Path:
    """volumes.tsv of all scans that are done: a row for each target."""
    rows = []
    for path in sorted(folder.rglob(f"sub-*_desc-*_{suffix}.json")):
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        of = sidecar["Edit"]
        for target, after in zip(of["To"], of["VolumesAfter"]):
            row = {"participant_id": path.name.partition("_")[0], "scan": sidecar["Sources"][0]}
            row |= {f"from_{name}": value for name, value in of["From"].items()}
            row |= {f"to_{name}": value for name, value in target.items()}
            for name, value in after.items():
                first = of["VolumesBefore"][name]
                row |= {f"{name}_before": first, f"{name}_after": value}
                row[f"{name}_change"] = None if first is None or value is None else round(value - first, 3)
            rows.append(row)
    write_table(folder / TABLE, pd.DataFrame(rows))
    return folder / TABLE


def _draw(files: Derived, done: Edit, before: NDArray, volumes: Sequence[NDArray]) -> None:
    """A film strip: the scan, what it becomes, and where the last one differs."""
    titles = ["scan: " + describe(done.source), *(describe(_changed(done.source, row)) for row in done.targets)]
    spacing = files.pipe.grid.spacing_mm
    strip = figures.mosaic(
        [before, *volumes], titles, spacing, columns=min(len(titles), 3), heading="derived, synthetic in part"
    )
    figures.save(strip, files.figure("edited"))
    difference = figures.overlay(
        before, volumes[-1] - before, spacing, f"change to {titles[-1]}", "share of the intensity range", signed=True
    )
    figures.save(difference, files.figure("difference"))


def _changed(source: Mapping[str, Value], target: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in target.items() if value != source.get(name)} or dict(target)


def _given(row: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in row.items() if value is not None}


def _numbers(row: Mapping[str, float]) -> dict[str, float | None]:
    return {name: round(float(value), 3) if np.isfinite(value) else None for name, value in row.items()}
