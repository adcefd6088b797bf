"""Volumes measured on an image alone, by intensity and place: no label map, no trained network.

Meant for images whose contrast is known (phantoms, rendered or clean skull-stripped T1w brains) and for judging many volumes
alike; not a segmentation for clinical scans. A function of the same form can take its place, see `load_measure`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ldm3d.errors import InputError

# Of the white matter's intensity in T1w images: cortex, and the darkest that counts as tissue
GREY_LEVEL, TISSUE_LEVEL = 0.68, 0.45
# Where lateral ventricles lie, in standard deviations of the brain's voxels from its centre (right, front, top)
VENTRICLE_SEED = ((-0.75, -1.0, -0.5), (0.75, 0.8, 0.9))
VENTRICLE_REACH = ((-1.25, -1.55, -0.9), (1.25, 1.15, 1.0))
VENTRICLE_DEPTH_MM = 9.0  # below the brain's surface; sulci that run into them are cut off here


def measure_volumes(volume: NDArray, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Ventricular and brain volume of a T1w volume.

    White matter is the brightest peak of the histogram. The brain is the largest connected part of what is brighter than
    `TISSUE_LEVEL` of it; ventricles are what is dark, connected and in their place inside of it. Voxels count with the part
    that their intensity says is tissue (or fluid), so that partial volume and blur do not bias the sum.

    Args:
        volume: (X, Y, Z) in [0, 1], RAS+; with or without skull.
        spacing_mm: of its voxels.

    Returns:
        ventricular_volume_ml (both lateral ventricles, and the third where it joins them) and brain_volume_ml (grey and
        white matter). NaN where no brain is found; 0 ventricles where nothing dark lies in their place.
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    nothing = {"ventricular_volume_ml": float("nan"), "brain_volume_ml": float("nan")}
    volume = np.asarray(volume, dtype=np.float32)
    if not np.isfinite(volume).all() or np.ptp(volume) < 1e-3:
        return nothing
    white = _white_level(volume)
    brain, others = _brain(volume > TISSUE_LEVEL * white, spacing_mm)
    if brain.sum() * voxel_ml < 50:
        return nothing
    inside = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(brain, 4), iterations=3))[4:-4, 4:-4, 4:-4]
    depth_mm = ndimage.distance_transform_edt(np.pad(inside, 1), spacing_mm)[1:-1, 1:-1, 1:-1]
    dark = inside & (volume < TISSUE_LEVEL * white)
    fluid = float(np.percentile(volume[dark & (depth_mm > VENTRICLE_DEPTH_MM)], 10)) if dark.any() else 0.2 * white

    # Ventricles: what of the dark hangs together with their middle
    place = _place(brain)
    reach = _box(place, VENTRICLE_REACH) & (depth_mm > VENTRICLE_DEPTH_MM)
    candidates = reach & (volume < (white + fluid) / 2)
    ventricles = ndimage.binary_propagation(candidates & _box(place, VENTRICLE_SEED), mask=candidates)
    rim = ndimage.binary_dilation(ventricles) & reach
    part = ((white - volume) / max(white - fluid, 1e-3)).clip(0, 1)
    ventricular = float(part[rim].sum()) * voxel_ml

    # Brain: each voxel with its part of tissue, up to halfway to the scalp
    near = ndimage.binary_dilation(brain, iterations=2) & ~ndimage.binary_dilation(others)
    grey = GREY_LEVEL * white
    tissue = ((volume - fluid) / max(grey - fluid, 1e-3)).clip(0, 1)
    return {"ventricular_volume_ml": ventricular, "brain_volume_ml": float(tissue[near].sum()) * voxel_ml}


def _white_level(volume: NDArray) -> float:
    """Intensity of white matter: the highest of the histogram's peaks among the brighter half of the range."""
    top = float(np.percentile(volume[volume > 0.1 * volume.max()], 99))
    counts, edges = np.histogram(volume, bins=64, range=(0.6 * top, 1.1 * top))
    smooth = ndimage.gaussian_filter1d(counts.astype(float), 3)
    return float((edges[:-1] + edges[1:])[smooth.argmax()] / 2)


def _brain(tissue: NDArray, spacing_mm: Sequence[float]) -> tuple[NDArray, NDArray]:
    """The largest part of `tissue` after a bridge one voxel wide is cut, and all other tissue; (X, Y, Z) masks."""
    core = ndimage.binary_erosion(tissue)
    parts, count = ndimage.label(core)
    if not count:
        return tissue & False, tissue
    # By distance to the middle as well as by size: a scalp may have more voxels than a brain
    middle = np.exp(-(_place(tissue) ** 2).sum(axis=0) / 2)
    largest = 1 + int(np.argmax(ndimage.sum_labels(middle, parts, range(1, count + 1))))
    brain = ndimage.binary_dilation(parts == largest) & tissue
    return brain, ndimage.binary_dilation((parts > 0) & (parts != largest)) & tissue & ~brain


def _place(mask: NDArray) -> NDArray:
    """Position of each voxel from the mask's centre in its standard deviations, (3, X, Y, Z)."""
    points = np.argwhere(mask) if mask.any() else np.argwhere(np.ones_like(mask))
    centre, deviation = points.mean(axis=0), points.std(axis=0) + 1e-6
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in mask.shape], indexing="ij"))
    return (grid - centre[:, None, None, None]) / deviation[:, None, None, None]


def _box(place: NDArray, corners: tuple) -> NDArray:
    low, high = (np.array(corner)[:, None, None, None] for corner in corners)
    return ((place > low) & (place < high)).all(axis=0)


def load_measure(name: str) -> Callable[[NDArray, Sequence[float]], Mapping[str, float]]:
    """The function "package.module:function" of the same form as `measure_volumes`.

    Raises:
        InputError: it cannot be imported.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"measure {name!r} cannot be imported ({error}); give package.module:function, with its folder on PYTHONPATH"
        ) from None
