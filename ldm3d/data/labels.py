"""Label maps of scans: finding a scan's, resampling it to the experiment's grid, counting volumes on it."""

import bisect
import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm3d.config.sections import Config
from ldm3d.data.augment import paint, random_place
from ldm3d.data.nifti import read_volume
from ldm3d.data.preparing import load_info, load_prepared
from ldm3d.errors import InputError
from ldm3d.geometry import resample, spacing_of

MAX_POINTS = 3  # along each axis of a voxel
_KINDS = (".nii", ".nii.gz", ".mgz", ".mgh")


class LabelMaps:
    """The label maps below a folder, found in one walk of it.

    A file belongs to a subject (and session) by its name, sub-XX[_ses-YY]_...nii.gz, or if no name fits, by its folders:
    FreeSurfer writes sub-XX/mri/aseg.mgz, other programs sub-XX/ses-YY/labels.nii.gz.

    Args:
        folder: to walk.
        pattern: glob of the path below `folder` or of the file's name, such as "*desc-aseg_dseg*"; None takes all.
    """

    def __init__(self, folder: Path, pattern: str | None = None):
        self.folder, self.pattern = folder, pattern
        by_name: list[tuple[str, Path]] = []
        by_folder: list[tuple[str, Path]] = []
        for above, _, names in os.walk(folder):
            parts = Path(above).relative_to(folder).parts
            first = next((i for i, part in enumerate(parts) if part.startswith("sub-")), len(parts))
            for name in names:
                if name.endswith(_KINDS) and (pattern is None or self._fits("/".join((*parts, name)))):
                    by_name.append((name, Path(above, name)))
                    by_folder.append(("_".join((*parts[first:], "")), Path(above, name)))
        self._indexes = sorted(by_name), sorted(by_folder)

    def _fits(self, path: str) -> bool:
        return fnmatch.fnmatchcase(path, self.pattern) or fnmatch.fnmatchcase(path.rpartition("/")[2], self.pattern)

    def find(self, subject: str, session: str = "") -> list[Path]:
        """All label maps of this subject (and session), by name."""
        name = _stem(subject, session)
        for index in self._indexes:
            found = []
            for start in (f"{name}.", f"{name}_"):
                found += index[bisect.bisect_left(index, (start,)) : bisect.bisect_left(index, (f"{start}\uffff",))]
            if found:
                return sorted(path for _, path in found)
        return []

    def one(self, subject: str, session: str = "") -> Path:
        """The one label map of this subject (and session).

        Raises:
            InputError: none, or several.
        """
        found = self.find(subject, session)
        if len(found) != 1:
            listed = ", ".join(str(path.relative_to(self.folder)) for path in found[:3]) or "none"
            way = "choose one kind with --pattern, such as '*desc-aseg_dseg*'" if found else "is --labels the right folder?"
            if self.pattern and not found:
                way = f"--pattern {self.pattern!r} may leave it out"
            raise InputError(
                f"{self.folder} must hold one label map named {_stem(subject, session)}_...nii.gz, found {len(found)} "
                f"({listed}); {way}"
            )
        return found[0]


def _stem(subject: str, session: str) -> str:
    return f"sub-{subject}_ses-{session}" if session else f"sub-{subject}"


def load_labels(config: Config, key: str, path: Path, groups: Mapping[str, Sequence[int]]) -> tuple[NDArray, NDArray]:
    """A prepared volume and its label map on the same grid, as shares of each voxel.

    Shares preserve volumes, and thin horns are not lost, as they would be with one label a voxel.

    Args:
        config, key: of the prepared scan.
        path: of its label map, in the scan's space at any resolution.
        groups: name -> labels.

    Returns:
        Volume (1, X, Y, Z) and shares (1 + groups, X, Y, Z), see `shares_on_grid`, both float32 in [0, 1].
    """
    volume, info = load_prepared(config, key), load_info(config, key)
    return volume, shares_on_grid(*read_labels(path), np.array(info["grid_affine"]), volume.shape[1:], groups)


def paint_labels(
    config: Config, key: str, path: Path, groups: Mapping[str, Sequence[int]], random: np.random.Generator
) -> tuple[NDArray, NDArray]:
    """As `load_labels`, but the volume is painted from the label map (`ldm3d.data.augment.paint`), at a place of its own."""
    shape = config.data.grid.shape
    placed = random_place(np.array(load_info(config, key)["grid_affine"]), shape, random)
    points = at_points(*read_labels(path), placed, shape)
    return paint(points, random), _shares(points, groups)


def read_labels(path: Path) -> tuple[NDArray, NDArray]:
    """A label map as whole numbers, (1, X, Y, Z) int32, and its affine."""
    labels, affine = read_volume(path)
    return np.rint(labels).astype(np.int32), affine


def shares_on_grid(
    labels: NDArray, affine: NDArray, grid_affine: NDArray, shape: Sequence[int], groups: Mapping[str, Sequence[int]]
) -> NDArray:
    """How much of each voxel of a grid each group of labels fills, (1 + groups, X, Y, Z) float32; first what none does.

    Args:
        labels, affine, grid_affine, shape: see `at_points`.
        groups: name -> labels.
    """
    return _shares(at_points(labels, affine, grid_affine, shape), groups)


def at_points(labels: NDArray, affine: NDArray, grid_affine: NDArray, shape: Sequence[int]) -> NDArray:
    """The labels at points that lie evenly in each voxel of a grid, (points, X, Y, Z), 0 outside of the label map.

    There are as many points along each axis as voxels of the label map lie there, at most `MAX_POINTS`.

    Args:
        labels: (1, X', Y', Z'), whole numbers.
        affine, grid_affine: (4, 4), of the labels and of the grid, to mm.
        shape: of the grid, (X, Y, Z).
    """
    ratio = spacing_of(grid_affine) / np.cbrt(abs(np.linalg.det(affine[:3, :3])))
    count = np.clip(np.rint(ratio), 1, MAX_POINTS).astype(int)
    finer = np.array(grid_affine, np.float64)
    finer[:3, 3] += finer[:3, :3] @ (0.5 / count - 0.5)  # the first point of the first voxel
    finer[:3, :3] /= count
    found = resample(labels, affine, finer, tuple(count * shape), "nearest")[0]
    within = found.reshape([side for pair in zip(shape, count) for side in pair])
    # Means over a first axis are several times faster than over three short ones
    return np.ascontiguousarray(within.transpose(1, 3, 5, 0, 2, 4)).reshape(-1, *shape)


def _shares(points: NDArray, groups: Mapping[str, Sequence[int]]) -> NDArray:
    """`shares_on_grid` of `at_points`."""
    class_of = np.zeros(1 + max(0, int(points.max()), *(label for group in groups.values() for label in group)), np.uint8)
    for k, group in enumerate(groups.values()):
        class_of[list(group)] = k + 1
    found = class_of[np.maximum(points, 0)]
    counts = np.stack([(found == k).sum(axis=0, dtype=np.uint8) for k in range(len(groups) + 1)])  # of at most MAX_POINTS^3
    return counts / np.float32(len(found))


def count_volumes(labels: NDArray, spacing_mm: Sequence[float], groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Volume in ml of each group of labels of a label map."""
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
        raise InputError(f"labels {twice} are listed twice; each may be in one group, once")
    return found


def parse_totals(texts: Sequence[str]) -> dict[str, list[str]]:
    """["brain_volume_ml=grey+white"] -> {"brain_volume_ml": ["grey", "white"]}.

    Raises:
        InputError: not of this form.
    """
    found = {}
    for text in texts:
        name, separator, parts = text.partition("=")
        if not separator or not name.strip() or not all(part.strip() for part in parts.split("+")):
            raise InputError(f"{text!r}: write NAME=GROUP+GROUP, such as brain_volume_ml=grey+white")
        found[name.strip()] = [part.strip() for part in parts.split("+")]
    return found
