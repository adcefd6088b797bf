"""A scan on the Grid, and the way back to its own voxels and intensities. No files."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ldm3d.config.data import GridConfig
from ldm3d.errors import InputError
from ldm3d.geometry import MNI_CENTRE_MM, WORLD, Grid, align_grid, resample, spacing_of

BLOCK_MM = 2.0  # edge of the blocks in which the foreground is looked for: noise averages out, and a box needs no more
_FOREGROUND = 0.1  # of the robust range of intensities, as in BET (Smith 2002, section 2.1)


def grid_of(config: GridConfig) -> Grid:
    """The Grid of a config; its centre is at `origin_mm` where its place is "world", else at world (0, 0, 0)."""
    centre = (config.origin_mm or MNI_CENTRE_MM) if config.place == WORLD else (0, 0, 0)
    return Grid.centred(config.shape, config.spacing_mm, centre, config.place)


def to_grid(volume: NDArray, affine: NDArray, grid: Grid, percentiles: tuple[float, float]) -> tuple[NDArray, dict[str, Any]]:
    """One scan on the Grid with intensities in [0, 1].

    A Grid whose place is "foreground" is centred on the foreground's box, along the axes of the scan. A head that is higher
    than the Grid loses its neck, not its crown. One whose place is "world" lies at its own affine, whatever the scan.

    The lower percentile is taken over all voxels of the placed Grid and becomes 0, so the background does. The upper
    one is taken over the foreground alone and becomes 1: over all voxels it would depend on how much of the Grid a
    brain fills, and small brains would come out in another brightness than large ones. What lies beyond is clipped.

    Args:
        volume: (1, X, Y, Z), one scan in any orientation; a skull-stripped or a whole head.
        affine: (4, 4) of `volume`, to RAS+ mm.
        grid: to bring it to.
        percentiles: (lower, upper), 0 to 100.

    Returns:
        float32 (1, X, Y, Z) on the Grid; and the info that `restore` needs, plain JSON: shape and affine of the source,
        affine of the placed Grid, the intensities `low` and `high` that became 0 and 1, cut_mm, the most that the
        Grid cuts off the foreground on any side, extent_mm of the foreground along the axes of the scan and its foreground_ml,
        around_zero, whether intensities reach well below 0, as those of a standardised scan do, and even_background, whether
        most voxels at the scan's faces have one value, as a mask leaves them.

    Raises:
        InputError: both percentiles are the same intensity; nothing of the foreground is on a Grid that lies in the world.
    """
    affine = np.asarray(affine, dtype=np.float64)
    volume, background, threshold, even = _level_background(volume)
    (scan,) = volume
    blocks = _foreground_blocks(scan, background + threshold, affine)
    first, last = blocks[:, 0].min(axis=0), blocks[:, 1].max(axis=0)
    if grid.place == WORLD:
        placed, cut_mm = grid.affine, _outside_mm(blocks, affine, grid)
    else:
        placed, cut_mm = _place_on_foreground((first, last), scan.shape, affine, grid)
    # `resample` is 0 outside of the scan; after this subtraction so is the background
    on_grid = resample(volume - background, affine, placed, grid.shape)
    foreground = on_grid[on_grid > threshold]
    if grid.place == WORLD and not foreground.size:
        raise InputError(_not_there(blocks, affine, grid))
    low = float(np.percentile(on_grid, percentiles[0]))
    high = float(np.percentile(foreground, percentiles[1])) if foreground.size else low
    if not high > low:
        raise InputError(
            f"percentiles {percentiles[0]:g} and {percentiles[1]:g} of its intensities are both {low + background:g}; "
            "look at the scan, or move data.percentiles apart"
        )
    info = {
        "source_shape": list(scan.shape),
        "source_affine": affine.tolist(),
        "grid_affine": placed.tolist(),
        "low": low + background,
        "high": high + background,
        "cut_mm": round(cut_mm, 1),
        "extent_mm": ((last - first + 1) * spacing_of(affine)).round(1).tolist(),
        "foreground_ml": round(float((np.diff(blocks, axis=1) + 1).prod(-1).sum() * spacing_of(affine).prod()) / 1000, 1),
        "even_background": even,
        "around_zero": bool(background < -threshold),  # what interpolation undershoots is less
    }
    return ((on_grid - low) / (high - low)).clip(0, 1), info


def restore(volume: NDArray, info: Mapping[str, Any]) -> tuple[NDArray, NDArray]:
    """The way back from the Grid to the scan's own voxels and intensities; what the Grid cut off becomes background.

    Args:
        volume: (1, X, Y, Z) on the Grid, in [0, 1].
        info: of `to_grid`.

    Returns:
        float32 (1, X, Y, Z) in the scan's shape, and the scan's affine.
    """
    affine = np.array(info["source_affine"])
    back = resample(volume, np.array(info["grid_affine"]), affine, info["source_shape"])
    return back * np.float32(info["high"] - info["low"]) + np.float32(info["low"]), affine


def _level_background(volume: NDArray) -> tuple[NDArray, float, float, bool]:
    """A scan whose background is its lowest intensity; that; how far above it the foreground begins; whether it is constant.

    Three kinds of background: air, with noise in it; one constant around a skull-stripped brain or a defaced head; and
    that constant in the midst of the range, where a stripped brain was standardised to mean 0. The last is put
    below the brain's darkest voxels, for nothing could tell it from grey matter otherwise.
    """
    faces = np.concatenate([np.take(volume, (0, -1), axis).ravel() for axis in (1, 2, 3)])
    values, counts = np.unique(faces, return_counts=True)
    constant = values[counts.argmax()] if 2 * counts.max() > faces.size else None
    rest = volume.ravel() if constant is None else volume[volume != constant]
    darkest, brightest = np.percentile(rest[:: 1 + rest.size // 10**6], (0.5, 98))  # a million voxels tell enough
    if constant is None:
        background = darkest
    elif darkest < constant - _FOREGROUND * (brightest - darkest):
        volume, background = np.where(volume == constant, np.float32(darkest), volume), darkest
    else:
        background = constant
    return (
        np.maximum(volume, np.float32(background)),
        float(background),
        float(_FOREGROUND * (brightest - background)),
        constant is not None,
    )


def _foreground_blocks(scan: NDArray, threshold: float, affine: NDArray) -> NDArray:
    """The largest connected part brighter than `threshold` as blocks of BLOCK_MM: (blocks, 2, 3), first and last voxel."""
    block = np.clip(np.round(BLOCK_MM / spacing_of(affine)).astype(int), 1, scan.shape)
    padded = np.pad(scan, [(0, -n % b) for n, b in zip(scan.shape, block)], mode="edge")
    n = np.array(padded.shape) // block
    means = padded.reshape(n[0], block[0], n[1], block[1], n[2], block[2]).mean((1, 3, 5))
    parts, count = ndimage.label(means > threshold)
    if not count:  # nothing but scattered bright voxels; then all of it
        return np.array([[(0, 0, 0), scan.shape]]) - [[[0.0], [1.0]]]
    largest = np.bincount(parts.ravel())[1:].argmax() + 1
    first = np.argwhere(parts == largest) * block
    return np.stack([first, np.minimum(first + block, scan.shape) - 1], axis=1).astype(float)


def _place_on_foreground(
    box: tuple[NDArray, NDArray], shape: tuple[int, ...], affine: NDArray, grid: Grid
) -> tuple[NDArray, float]:
    """Affine of the Grid laid over a scan's foreground box; and how many mm of the box stick out, on the worst side."""
    first, last = box
    placed = align_grid(shape, affine, (first + last) / 2, grid)
    corners = np.array([np.where(end, last + 0.5, first - 0.5) for end in np.ndindex(2, 2, 2)])  # (8, 3), faces of voxels
    corners = np.linalg.solve(placed, affine @ np.c_[corners, np.ones(8)].T)[:3].T + 0.5  # from the Grid's own faces
    above = corners[:, 2].max() - grid.shape[2]
    if above > 0:
        # Whole voxels, so that an aligned Grid stays aligned
        placed[:3, 3] += placed[:3, 2] * np.ceil(above)
        corners[:, 2] -= np.ceil(above)
    out = np.maximum(-corners.min(0), corners.max(0) - grid.shape).clip(0) * grid.spacing_mm
    return placed, float(out.max())


def _outside_mm(blocks: NDArray, affine: NDArray, grid: Grid) -> float:
    """How many mm of the foreground's blocks stick out of a Grid that lies at its own affine, on the worst side."""
    to_grid = np.linalg.solve(grid.affine, affine)
    middles = blocks.mean(axis=1) @ to_grid[:3, :3].T + to_grid[:3, 3] + 0.5  # from the Grid's own faces
    half = (np.diff(blocks, axis=1)[:, 0] + 1) / 2 @ np.abs(to_grid[:3, :3]).T
    out = np.maximum(-(middles - half).min(0), (middles + half).max(0) - grid.shape).clip(0) * grid.spacing_mm
    return float(out.max())


def _not_there(blocks: NDArray, affine: NDArray, grid: Grid) -> str:
    middle = affine[:3, :3] @ (blocks[:, 0].min(axis=0) + blocks[:, 1].max(axis=0)) / 2 + affine[:3, 3]
    there, here = (", ".join(f"{mm:.0f}" for mm in centre) for centre in (middle, grid.centre_mm))
    return (
        f"nothing of its foreground, whose middle is at ({there}) mm in world space, lies on the grid around ({here}) mm; "
        "register it to the space of the grid, move data.grid.origin_mm, or set data.grid.place: foreground"
    )
