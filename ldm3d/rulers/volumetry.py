"""Volumes measured on an image alone, by intensity and place: no label map, no trained network.

Meant for images whose contrast is known (phantoms, rendered or clean skull-stripped T1w brains) and for judging many volumes
alike; not a segmentation for clinical scans. A function of the same form can take its place, see `load_measure`.

Intensities are in units of the white matter around (1 = white matter), which removes bias field and brightness.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ldm3d.metrics.features import imported

TISSUE_LEVEL = 0.5  # brighter than fluid, darker than cortex
VENTRICLE_LEVEL, SEED_LEVEL = 0.6, 0.75  # below deep grey matter; on the centreline, as thin ventricles are less dark
AIR_LEVEL, FLUID_LEVEL = 0.1, 0.25  # the second: between what T1w scans have (0.2 to 0.28)
BIAS_FIELD_MM = 25.0  # standard deviation of the window in which white matter is averaged
CLOSING_MM, DEPTH_MM = 15.0, 9.0  # sulci narrower than the first are closed; ventricles lie deeper than the second

# The lateral ventricle's centreline in mm from the brain's centre (x from the midline), in a brain whose voxels have
# these standard deviations; ventricles lie within VENTRICLE_REACH_MM of it and begin within VENTRICLE_SEED_MM.
BRAIN_DEVIATION_MM = (28.6, 38.0, 27.3)
BODY = ((15, 41, -4), (12, 27, 8), (11, 5, 14), (15, -15, 12), (23, -31, 2), (22, -55, -4))
TEMPORAL_HORN = ((23, -31, 2), (33, -17, -16), (31, 1, -22))
VENTRICLE_SEED_MM, VENTRICLE_REACH_MM = 7.0, 13.0
NODS, SHIFTS_MM = np.deg2rad(np.arange(-12, 43, 6)), np.arange(-9, 10, 3)  # poses that are tried; forehead up is positive
BLUR_MM = 4.0  # so that a centreline beside a ventricle is drawn to it


def measure_volumes(volume: NDArray, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Ventricular and brain volume of a T1w volume.

    The bias field is divided out. The brain is the middle one of the bright parts. Ventricles are what is dark, deep below
    the brain's surface and connected with the lateral ventricle's centreline. Voxels at their borders count with the part
    that their intensity says is fluid (or tissue), so that partial volume and noise hardly move the sums. Blur does: on 4.5 mm
    phantoms half a voxel of it takes a tenth off the ventricles and adds 4 % to the brain.

    Args:
        volume: (X, Y, Z) in [0, 1], RAS+; with or without skull.
        spacing_mm: of its voxels.

    Returns:
        ventricular_volume_ml (both lateral ventricles) and brain_volume_ml (grey and white matter). Both NaN where no
        brain of 50 ml is found (nor three axes of finite values); 0 ventricles where nothing dark lies
        in their place. Nothing is raised.
    """
    nothing = {"ventricular_volume_ml": float("nan"), "brain_volume_ml": float("nan")}
    volume = np.asarray(volume, dtype=np.float32)
    if volume.ndim != 3 or not volume.size or not np.isfinite(volume).all() or np.ptp(volume) < 1e-3 or volume.max() <= 0:
        return nothing
    spacing_mm, voxel_ml = np.asarray(spacing_mm, dtype=float), float(np.prod(spacing_mm)) / 1000
    volume = volume / _white_matter(volume, spacing_mm)
    brain, scalp = _brain(volume > TISSUE_LEVEL)
    bright = volume[brain & (volume > 0.6)]
    if brain.sum() * voxel_ml < 50 or not bright.size:
        return nothing
    ventricular = _fluid(volume, _ventricles(volume, brain, spacing_mm)) * voxel_ml

    tissue = _tissue(volume, _grey(bright))
    return {"ventricular_volume_ml": ventricular, "brain_volume_ml": float(tissue[_near(brain, scalp)].sum()) * voxel_ml}


def tissue_change(before: NDArray, after: NDArray, spacing_mm: Sequence[float]) -> NDArray:
    """The share of each voxel that became tissue, or (below 0) ceased to be: a map of local change of volume.

    Both are judged by the grey and white matter of `before`, as in `measure_volumes`; nothing is registered, so there is no
    Jacobian. Its sum times a voxel's volume is the change of brain volume.

    Args:
        before, after: (X, Y, Z) in [0, 1], of one brain, in place.
        spacing_mm: of the voxels.

    Returns:
        (X, Y, Z) in [-1, 1]; 0 everywhere where no brain is found in `before`.
    """
    before, after = (np.asarray(volume, dtype=np.float32) for volume in (before, after))
    spacing = np.asarray(spacing_mm, dtype=float)
    if np.ptp(before) < 1e-3 or before.max() <= 0:
        return np.zeros_like(before)
    white = _white_matter(before, spacing)
    brain, scalp = _brain(before / white > TISSUE_LEVEL)
    bright = (before / white)[brain & (before / white > 0.6)]
    if not bright.size:
        return np.zeros_like(before)
    first, second = (_tissue(volume / white, _grey(bright)) for volume in (before, after))
    return np.where(_near(brain, scalp), second - first, 0).astype(np.float32)


def _grey(bright: NDArray) -> float:
    """Cortex is as bright as it looks in this image: where voxels are large, white matter shines into it."""
    return float(np.percentile(bright, 38))


def _tissue(volume: NDArray, grey: float) -> NDArray:
    """The part of each voxel that is no fluid, by its intensity."""
    return ((volume - FLUID_LEVEL) / (grey - FLUID_LEVEL)).clip(0, 1)


def _near(brain: NDArray, scalp: NDArray) -> NDArray:
    """The brain with the voxels around it that hold some of it."""
    return ndimage.binary_dilation(brain, iterations=2) & ~ndimage.binary_dilation(scalp)


def _white_matter(volume: NDArray, spacing_mm: NDArray) -> NDArray:
    """Local intensity of white matter, (X, Y, Z): normalised convolution (Knutsson and Westin 1993) of the brightest."""
    top = np.percentile(volume[volume > 0.1 * volume.max()], 98)
    white = np.full_like(volume, top)
    for _ in range(3):
        weight = (volume > 0.82 * white).astype(np.float32)
        total, weight = (
            ndimage.gaussian_filter(v, BIAS_FIELD_MM / spacing_mm, truncate=2) + 1e-3 * level
            for v, level in ((volume * weight, top), (weight, 1))
        )
        white = total / weight
    return np.maximum(white, 1e-6)


def _brain(tissue: NDArray) -> tuple[NDArray, NDArray]:
    """The part of `tissue` in the middle after bridges one voxel wide are cut, and other large parts; (X, Y, Z) masks."""
    parts, count = ndimage.label(ndimage.binary_erosion(tissue))
    if not count:
        return np.zeros_like(tissue), tissue
    # By distance to the middle as well as by size: a scalp may have more voxels than a brain
    middle = np.exp(-8 * sum(a**2 for a in np.ix_(*(np.linspace(-0.5, 0.5, n) for n in tissue.shape))))
    largest = 1 + int(np.argmax(ndimage.sum_labels(middle, parts, range(1, count + 1))))
    brain = ndimage.binary_dilation(parts == largest) & tissue
    sizes = np.bincount(parts.ravel())
    other = sizes > 0.05 * sizes[largest]  # smaller parts are gyri that were cut off
    other[[0, largest]] = False
    return brain, ndimage.binary_dilation(other[parts]) & tissue & ~brain


def _ventricles(volume: NDArray, brain: NDArray, spacing_mm: NDArray) -> NDArray:
    """What is dark, deep and connected with the lateral ventricles' centreline; (X, Y, Z) mask."""
    # Deep: inside of the closed brain, with brain on either side along every axis
    n = max(round(CLOSING_MM / spacing_mm.max()), 1)
    inside = ndimage.binary_closing(np.pad(brain, n + 1), iterations=n)[(slice(n + 1, -n - 1),) * 3]
    for axis in range(3):
        before, after = (np.maximum.accumulate(b, axis) for b in (inside, np.flip(inside, axis)))
        inside = before & np.flip(after, axis)
    deep = ndimage.distance_transform_edt(np.pad(inside, 1), spacing_mm)[1:-1, 1:-1, 1:-1] > DEPTH_MM

    # In place: near the centreline, and off the midline wherever that may be a fissure or the third ventricle
    fluid = deep & (volume > AIR_LEVEL)
    dark = ((SEED_LEVEL - volume) / (SEED_LEVEL - FLUID_LEVEL)).clip(0, 1) * fluid
    x, y, z = _centreline_coordinates(brain, ndimage.gaussian_filter(dark, BLUR_MM / spacing_mm))
    callosum = (((y + 1) / 50) ** 2 + ((z - 1) / 32) ** 2 < 1) & (z > -1)
    distance_mm = _distance_to_centreline(np.abs(x), y, z)
    seeded = distance_mm < VENTRICLE_SEED_MM
    candidates = fluid & (volume < np.where(seeded, SEED_LEVEL, VENTRICLE_LEVEL))
    candidates &= (distance_mm < VENTRICLE_REACH_MM) & ((np.abs(x) > 5) | callosum)
    return ndimage.binary_propagation(candidates & seeded, mask=candidates)


def _centreline_coordinates(brain: NDArray, dark: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Coordinates x, y, z in mm of every voxel in the frame of the centreline.

    Centre and size are the brain's; a nod of the head and a shift are those that put the centreline where it is darkest
    (template matching by exhaustive search), with a quadratic price on both.
    """
    voxels = np.argwhere(brain)
    centre, scale = voxels.mean(axis=0), (voxels.std(axis=0) + 1e-6) / BRAIN_DEVIATION_MM  # voxel = centre + scale * mm
    line = np.array([(1 - t) * a + t * b for a, b in _segments() for t in np.arange(0, 1, 0.1)])
    line = np.concatenate([line, line * (-1, 1, 1)])
    poses = np.array([(a, dy, dz) for a in NODS for dy in SHIFTS_MM for dz in SHIFTS_MM])
    cos, sin = np.cos(poses[:, :1]), np.sin(poses[:, :1])
    y, z = (cos * line[:, 1] - sin * line[:, 2] + poses[:, 1:2], sin * line[:, 1] + cos * line[:, 2] + poses[:, 2:])
    points = np.stack([np.broadcast_to(line[:, 0], y.shape), y, z], axis=-1)  # (poses, points, 3)
    index = np.rint(centre + points * scale).astype(int).clip(0, np.array(brain.shape) - 1)
    price = 0.1 * ((poses[:, 0] / 0.5) ** 2 + (poses[:, 1:] ** 2).sum(axis=1) / 81)
    angle, dy, dz = poses[np.argmax(dark[tuple(np.moveaxis(index, -1, 0))].mean(axis=1) - price)]

    x, y, z = np.ix_(*((np.arange(n) - c) / s for n, c, s in zip(brain.shape, centre, scale)))
    y, z = y - dy, z - dz
    return x, np.cos(angle) * y + np.sin(angle) * z, np.cos(angle) * z - np.sin(angle) * y


def _segments() -> list[tuple[NDArray, NDArray]]:
    return [(np.array(a), np.array(b)) for chain in (BODY, TEMPORAL_HORN) for a, b in pairwise(chain)]


def _distance_to_centreline(x: NDArray, y: NDArray, z: NDArray) -> NDArray:
    squared = np.inf
    for start, end in _segments():
        along = end - start
        offset = [p - a for p, a in zip((x, y, z), start)]
        t = np.clip(sum(o * a for o, a in zip(offset, along)) / (along @ along), 0, 1)
        squared = np.minimum(squared, sum((o - t * a) ** 2 for o, a in zip(offset, along)))
    return np.sqrt(squared)


def _fluid(volume: NDArray, mask: NDArray) -> float:
    """Voxels of fluid in and up to two voxels around the mask, against the tissue further out."""
    if not mask.any():
        return 0.0
    rim = ndimage.binary_dilation(mask, iterations=2)
    around = ndimage.binary_dilation(rim, iterations=2) & ~rim & (volume > VENTRICLE_LEVEL)
    tissue = float(np.median(volume[around])) if around.any() else 1.0
    rim &= mask | (volume > VENTRICLE_LEVEL)  # other fluid nearby is not theirs
    return float(((tissue - volume) / (tissue - FLUID_LEVEL)).clip(0, 1)[rim].sum())


Measure = Callable[[NDArray, Sequence[float]], Mapping[str, float]]


def apply_measure(measure: Measure, volume: NDArray, spacing_mm: Sequence[float]) -> Mapping[str, float]:
    """What a measure, which looks at one image (X, Y, Z), finds in a volume (C, X, Y, Z): in its first channel."""
    return measure(volume[0], spacing_mm)


def load_measure(name: str, device: str = "cpu") -> Measure:
    """The function "package.module:function" of the same form as `measure_volumes`, or the network of "segmenter:FOLDER".

    Args:
        name: of either; FOLDER may be a model's, or the name of a shipped model, for the segmenter beside its networks.
        device: where a network computes.

    Raises:
        InputError: it cannot be imported, or no segmenter is in the folder.
    """
    module, _, function = name.partition(":")
    if module == "segmenter":
        from ldm3d.rulers.segmenter import Segmenter

        return Segmenter.from_pretrained(function, device)
    return imported(name, "measure")
