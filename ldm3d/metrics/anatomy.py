"""What a segmentation says of a brain: volume, surface and thickness of each tissue, left against right, overlap.

Class maps are (X, Y, Z) integers, X to the right; 0 is background.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

# Weights of the 13 directions of a voxel's neighbours depend on the spacing: the share of the sphere nearest to each
DIRECTIONS = tuple((x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1) if (x, y, z) > (0, 0, 0))


def surface_mm2(mask: NDArray, spacing_mm: Sequence[float]) -> float:
    """Area of the boundary of a mask, by Crofton's formula over the 13 directions of neighbours.

    S = 4 times the mean, over directions, of boundary crossings on parallel lines per unit of area across them (Ohser &
    Mücklich 2000, section 3.2.2), which is 2 for each line through a convex body. A sphere of 5 voxels or more in radius is
    found to about 5%.

    Args:
        mask: (X, Y, Z), boolean.
        spacing_mm: of its voxels.
    """
    mask = np.pad(mask.astype(bool), 1)
    voxel = float(np.prod(spacing_mm))
    total = 0.0
    for direction, weight in zip(DIRECTIONS, _shares(tuple(float(s) for s in spacing_mm))):
        length = float(np.linalg.norm(np.multiply(direction, spacing_mm)))
        shifted = np.roll(mask, direction, axis=(0, 1, 2))
        crossings = int(np.count_nonzero(mask != shifted))
        total += weight * crossings * voxel / length  # each line stands for an area of voxel / length across it
    return 2 * total


def _shares(spacing_mm: tuple[float, ...]) -> NDArray:
    """Share of all directions that are nearest to each of `DIRECTIONS`, from points spread evenly over a half sphere."""
    k = np.arange(20000) + 0.5
    height, angle = 1 - k / len(k), np.pi * (1 + 5**0.5) * k  # Fibonacci's lattice
    ring = np.sqrt(1 - height**2)
    points = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)
    axes = np.multiply(DIRECTIONS, spacing_mm)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    return np.bincount(np.abs(points @ axes.T).argmax(axis=1), minlength=len(axes)) / len(points)


def describe_classes(classes: NDArray, names: Sequence[str], spacing_mm: Sequence[float]) -> dict[str, float]:
    """Volume, surface, thickness and asymmetry of each class of a class map.

    Args:
        classes: (X, Y, Z); class k + 1 is `names[k]`.
        names: of the classes.
        spacing_mm: of the voxels.

    Returns:
        NAME_volume_ml; NAME_surface_mm2; NAME_thickness_mm, twice the volume over the surface, as of a sheet; NAME_asymmetry,
        (right - left) / (right + left) of the volume on either side of the middle plane of all classes. The latter two are NaN
        where the class is empty.
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    found: dict[str, float] = {}
    columns = np.arange(classes.shape[0])
    occupied = np.count_nonzero(classes, axis=(1, 2))
    middle = float((columns * occupied).sum() / max(occupied.sum(), 1))
    for k, name in enumerate(names, start=1):
        mask = classes == k
        volume, area = np.count_nonzero(mask) * voxel_ml, surface_mm2(mask, spacing_mm)
        by_column = np.count_nonzero(mask, axis=(1, 2))
        right, left = by_column[columns > middle].sum(), by_column[columns < middle].sum()
        found[f"{name}_volume_ml"] = volume
        found[f"{name}_surface_mm2"] = area
        found[f"{name}_thickness_mm"] = 2000 * volume / area if area else float("nan")
        found[f"{name}_asymmetry"] = float((right - left) / (right + left)) if right + left else float("nan")
    return found


def overlaps(classes: NDArray, others: Sequence[NDArray], names: Sequence[str]) -> Mapping[str, float]:
    """Dice overlap of each class with the class map that it agrees with best over all classes: the nearest anatomy.

    Class maps are first brought to one centre of mass, by whole voxels. 2 |a & b| / (|a| + |b|) (Dice 1945); NaN where both
    are empty.
    """
    best, most = {name: float("nan") for name in names}, -1.0
    centre = _centre(classes)
    for other in others:
        shift = np.round(centre - _centre(other)).astype(int)
        found = dice(classes, np.roll(other, shift, axis=(0, 1, 2)), names)
        known = [value for value in found.values() if not np.isnan(value)]
        if known and np.mean(known) > most:
            best, most = found, float(np.mean(known))
    return best


def dice(one: NDArray, other: NDArray, names: Sequence[str]) -> dict[str, float]:
    """Dice overlap of each class of two class maps; NaN where both are empty."""
    count = len(names) + 1
    # How often each pair of classes meets, in one pass over the voxels
    joint = np.bincount((one.astype(np.int32) * count + other).ravel(), minlength=count**2).reshape(count, count)
    total = joint.sum(axis=0) + joint.sum(axis=1)
    return {name: 2 * joint[k, k] / total[k] if total[k] else float("nan") for k, name in enumerate(names, start=1)}


def _centre(classes: NDArray) -> NDArray:
    """Centre of mass of all classes, in voxels; 0 if there are none."""
    counts = [np.count_nonzero(classes, axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    return np.array([np.arange(len(n)) @ n / max(n.sum(), 1) for n in counts])
