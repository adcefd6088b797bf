"""Label maps that lie beside scans: which belongs to which, brought to the experiment's grid, and volumes counted on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm3d.config import Config
from ldm3d.data.nifti import read_volume
from ldm3d.data.preprocess import load_info, load_prepared
from ldm3d.errors import InputError
from ldm3d.files import checked_name
from ldm3d.geometry import resample


def find_label_map(folder: Path, subject: str, session: str = "") -> Path:
    """The one NIfTI file below `folder` whose name begins with this subject (and session).

    Raises:
        InputError: none, or several.
    """
    name = f"sub-{checked_name(subject, 'subject')}" + (f"_ses-{checked_name(session, 'session')}" if session else "")
    found = sorted(p for p in folder.rglob(f"{name}[_.]*") if p.name.endswith((".nii", ".nii.gz")))
    if len(found) != 1:
        shown = ", ".join(p.name for p in found[:3]) or "none"
        raise InputError(f"{folder} must hold one label map named {name}_...nii.gz, found {len(found)} ({shown})")
    return found[0]


def load_labels(config: Config, key: str, path: Path, classes: Mapping[str, Sequence[int]]) -> tuple[NDArray, NDArray]:
    """A prepared volume and its label map on the same grid, as classes.

    Of the nearest voxel, which keeps volumes on average: a share of each voxel, and what most of it is, would lose thin horns.

    Args:
        config, key: of the prepared scan.
        path: of its label map, in the scan's space at any resolution.
        classes: group -> labels; class k + 1 is the k-th, 0 all else.

    Returns:
        Volume float32 in [0, 1] and classes uint8, both (X, Y, Z).
    """
    volume, info = load_prepared(config, key), load_info(config, key)
    labels, affine = read_volume(path)
    labels = resample(np.rint(labels).astype(np.int32), affine, np.array(info["grid_affine"]), volume.shape, "nearest")
    found = np.zeros(volume.shape, np.uint8)
    for k, group in enumerate(classes.values()):
        found[np.isin(labels, list(group))] = k + 1
    return volume, found


def count_volumes(labels: NDArray, spacing_mm: Sequence[float], groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Volume in ml of each group of labels of a label map (X, Y, Z)."""
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    return {name: float(np.isin(np.rint(labels), list(group)).sum()) * voxel_ml for name, group in groups.items()}


def parse_groups(texts: Sequence[str]) -> dict[str, list[int]]:
    """["ventricular_volume_ml=4,43"] -> {"ventricular_volume_ml": [4, 43]}.

    Raises:
        InputError: not of this form.
    """
    found = {}
    for text in texts:
        name, separator, labels = text.partition("=")
        try:
            found[name.strip()] = [int(label) for label in labels.split(",")]
        except ValueError:
            separator = ""
        if not separator or not name.strip():
            raise InputError(f"{text!r}: write NAME=LABEL,LABEL with whole numbers, such as ventricular_volume_ml=4,43")
    if not found:
        raise InputError("no structure; give at least one as NAME=LABEL,LABEL")
    known = [label for group in found.values() for label in group]
    if twice := sorted({label for label in known if known.count(label) > 1}):
        raise InputError(f"labels {twice} stand in two places; each may be in one group, once")
    return found
