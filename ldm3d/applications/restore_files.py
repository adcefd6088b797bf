"""A restored scan as files.

The files:

    ..._desc-restored_T1w.nii.gz     the mean of all samples, on the scan's voxels or finer ones
    ..._desc-samples_T1w.nii.gz      the samples, 4D
    ..._desc-deviation_T1w.nii.gz    how far to trust each voxel, in the scan's intensities
    figures/                         a picture
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ldm3d import figures
from ldm3d.applications.degraded import KINDS
from ldm3d.applications.derived import Derived, Kind
from ldm3d.applications.restore import Restored
from ldm3d.geometry import slices_through

README = (
    "Restored brain scans: what was there, given how each scan was degraded, by a latent diffusion model (ldm3d). They are "
    "derived from scans and partly synthetic: what was not measured is made up, in a likely way. Not for diagnosis."
)
FILES = ("mask", "hole", "bias")  # operators that name one
RESTORE = Kind("restore", "Restored brain scans (DERIVED)", README, ("restored",), ("samples", "deviation"))


def operators_of(cells: Mapping[str, str], folder: Path) -> list[str]:
    """What happened to a scan by its row of a table: cells of columns that are called like operators.

    >>> operators_of({"path": "a.nii.gz", "hole": "lesion.nii.gz", "blur": ""}, Path("data"))
    ['hole=data/lesion.nii.gz']
    """
    told = {name: cells[name] for name in KINDS if cells.get(name, "") not in ("", "n/a")}
    return [f"{name}={folder / value if name in FILES else value}" for name, value in told.items()]


def files_of(words: Sequence[str]) -> list[Path]:
    """The files that operators name: ["hole=lesion.nii.gz", "blur=8"] -> [Path("lesion.nii.gz")]."""
    pairs = (word.partition("=") for word in words)
    return [Path(value) for name, _, value in pairs if name in FILES and value]


def write_restored(files: Derived, restored: Restored) -> Path:
    """Write a restored scan; returns the path of its mean."""
    degraded, placed = restored.degraded, restored.placed
    images = {
        "restored": degraded.back(placed, restored.mean),
        "samples": np.concatenate([degraded.back(placed, sample[None]) for sample in restored.samples]),
    }
    masked, place = degraded.known is not None, None
    if masked:
        unknown = 1 - degraded.linear(torch.ones_like(placed.volume))
        place = slices_through(unknown[0, 0].cpu().numpy() > 0.5)
    shown = [degraded.linear(placed.volume) if masked else placed.volume, restored.mean, restored.samples[:1]]
    titles = ["what is known" if masked else "scan", f"mean of {len(restored.samples)}", "a sample"]
    if len(restored.samples) > 1:
        images["deviation"] = degraded.deviation_back(placed, restored.deviation)
        deviation = restored.deviation
        if masked:
            deviation = deviation * unknown
        most = float(deviation.max())
        shown.append(deviation / max(most, 1e-6))
        titles.append(f"deviation, white: {100 * most:.0f}% of the range")
    volumes = [volume[0].cpu().numpy() for volume in shown]
    heading = "derived, synthetic in part"
    picture = figures.mosaic(volumes, titles, files.pipe.grid.spacing_mm, columns=2, heading=heading, where=[place])
    figures.save(picture, files.figure("restored"))
    sidecar = {
        "Description": f"A {files.pipe.suffix} scan restored by ldm3d: derived, and synthetic in part",
        "Restoration": {**restored.settings, "Registration": placed.info.get("registration")},
    }
    return files.write(images, degraded.affine, placed.mark, sidecar)
