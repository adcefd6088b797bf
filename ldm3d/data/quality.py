"""Simple measures of image quality of prepared volumes, and how odd each is among all of them. Numbers only.

The measures compare the scans of one experiment, which all have the same Grid. They are not those of the raw scans: resampling
onto a coarser Grid averages noise away.

Legend: x a voxel's intensity in [0, 1]; the foreground are voxels with x > 0.1; sigma the standard deviation of noise.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm3d.files import write_atomic
from ldm3d.geometry import slices

VERSION = 1  # raise it when what `look_at` returns changes: every volume is then looked at again
FOREGROUND = 0.1
MEASURES = ("snr", "cnr", "efc", "foreground")
ODD = 3.5  # robust deviations from which a scan is called odd (Iglewicz & Hoaglin 1993)
BINS = 50  # of the histogram that is kept
LOOK_BYTES = 16_000  # of a file of `write_look`, about

_FINE_BINS = 4096  # of the histogram from which the measures follow: a pass over the voxels for all of them
_SIDE = 16  # blocks along a side of the coarse volume, at most
_WIDTH = 280  # pixels across the picture, about: three slices
_STEP = 2.0**-12  # least noise: the rounding of half precision, in which volumes are stored
_MOST_FOR_MEDIAN = 1000  # volumes that the median is taken over


def look_at(volume: NDArray, spacing_mm: Sequence[float]) -> dict[str, NDArray]:
    """What is kept of a volume to compare it with others.

    Args:
        volume: (C, X, Y, Z) in [0, 1]; the first channel is looked at.
        spacing_mm: of its voxels.

    Returns:
        measures: float64, in the order of MEASURES; NaN where there is no foreground.
            snr: median of the foreground / sigma. sigma is 1.4826 times the median of absolute Haar coefficients that are
                differences along all three axes, in the foreground (Coupé et al. 2010, eq. 7, without their correction of
                Rician noise).
            cnr: difference between the means of the brighter and the darker part of the foreground, as Otsu's (1979)
                threshold parts it, / sigma (after Magnotta & Friedman 2006).
            efc: entropy focus criterion (Atkinson et al. 1997), as a share of its largest value: 1 where all voxels are alike,
                0 where one holds all intensity. Ghosts, blur and noise around the head raise it.
            foreground: its share of the Grid.
        histogram: (BINS,) share of the foreground's voxels in each bin of (FOREGROUND, 1].
        coarse: float16, means of blocks, at most 16 on a side.
        picture: uint8 (rows, columns), the middle slices.
    """
    x = np.asarray(volume[0], np.float32)
    filled = x[x > 0]  # often a quarter of the voxels
    counts = np.bincount((filled * (_FINE_BINS - 1) + 0.5).astype(np.int32), minlength=_FINE_BINS)
    counts[0] += x.size - filled.size
    values = np.arange(_FINE_BINS) / (_FINE_BINS - 1)
    inside = values > FOREGROUND
    measures = np.full(len(MEASURES), np.nan)
    if counts[inside].any():
        sigma = max(_noise(x), _STEP)
        bright, dark = _parts(values[inside], counts[inside])
        middle = values[inside][np.searchsorted(np.cumsum(counts[inside]), counts[inside].sum() / 2)]
        measures[:] = middle / sigma, (bright - dark) / sigma, _focus(values, counts), counts[inside].sum() / x.size
    edges = np.linspace(FOREGROUND, 1, BINS + 1)
    histogram, _ = np.histogram(values[inside], edges, weights=counts[inside])
    return {
        "measures": measures,
        "histogram": histogram / max(counts[inside].sum(), 1),
        "coarse": _block_means(x).astype(np.float16),
        "picture": _picture(volume, spacing_mm),
    }


def _noise(x: NDArray) -> float:
    """Standard deviation of noise in the foreground of (X, Y, Z)."""
    x = x[tuple(slice(n - n % 2) for n in x.shape)]
    detail, mean = x, x
    for axis in range(3):
        even, odd = (tuple(slice(first, None, 2) if k == axis else slice(None) for k in range(3)) for first in (0, 1))
        detail, mean = detail[even] - detail[odd], mean[even] + mean[odd]
    inside = mean > 8 * FOREGROUND
    return 1.4826 * float(np.median(np.abs(detail[inside]))) / math.sqrt(8) if inside.any() else 0.0


def _parts(values: NDArray, counts: NDArray) -> tuple[float, float]:
    """Means above and below the threshold with the largest variance between both parts of a histogram (Otsu 1979, eq. 18)."""
    below, total = np.cumsum(counts)[:-1], counts.sum()
    sums = np.cumsum(counts * values)
    with np.errstate(invalid="ignore", divide="ignore"):
        dark, bright = sums[:-1] / below, (sums[-1] - sums[:-1]) / (total - below)
        between = below * (total - below) * (bright - dark) ** 2.0
    if not np.isfinite(between).any():
        return values[0], values[0]
    best = np.nanargmax(between)
    return float(bright[best]), float(dark[best])


def _focus(values: NDArray, counts: NDArray) -> float:
    """Entropy focus criterion of a histogram, 0 to 1."""
    n, energy = counts.sum(), math.sqrt(np.sum(counts * values**2))
    share = values[1:] / energy
    return float(-np.sum(counts[1:] * share * np.log(share)) / (math.sqrt(n) * math.log(math.sqrt(n))))


def _block_means(x: NDArray) -> NDArray:
    """(X, Y, Z) in blocks, at most _SIDE on a side; the last ones are filled up with background."""
    for axis, n in enumerate(x.shape):
        size = -(-n // _SIDE)
        x = np.add.reduceat(x, np.arange(0, n, size), axis) / size
    return x


def _picture(volume: NDArray, spacing_mm: Sequence[float]) -> NDArray:
    image = slices(np.asarray(volume[:1], np.float32), spacing_mm)
    by = max(1, round(image.shape[1] / _WIDTH))
    image = image[tuple(slice(n - n % by) for n in image.shape)]
    image = image.reshape(image.shape[0] // by, by, -1, by).mean((1, 3))
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


# Files


def write_look(path: Path, look: dict[str, NDArray]) -> None:
    """Write what `look_at` returns, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, version=VERSION, **look)
    write_atomic(path, buffer.getvalue())


def read_look(path: Path) -> dict[str, NDArray] | None:
    """What `write_look` wrote; None if it is not there, damaged or of another version."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files if name != "version"} if file["version"] == VERSION else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


# Among all


def distances(coarse: NDArray) -> NDArray:
    """How far each volume is from the median of all, voxel by voxel: root mean square, in units of the median's own.

    Like the check of a sample's homogeneity in CAT12 (Gaser et al. 2024), with the median in place of the mean.

    Args:
        coarse: (N, ...), of one Grid.
    """
    median = np.median(coarse[:: -(-len(coarse) // _MOST_FOR_MEDIAN)].astype(np.float32), axis=0)
    size = max(math.sqrt(np.mean(median**2)), 1e-9)
    return np.array([math.sqrt(np.mean((volume - median) ** 2)) / size for volume in coarse])


def deviations(measures: pd.DataFrame) -> pd.DataFrame:
    """How many robust standard deviations (1.4826 MAD) each value lies from the median of its column.

    Of ratios to noise, logarithms are compared. A distance below the median is no deviation, and a value that could not
    be measured is infinitely far.

    Args:
        measures: columns of MEASURES and distance, a row a scan.
    """
    found = {}
    for name in measures:
        x = measures[name].to_numpy(float)
        known = np.isfinite(x)
        if name in ("snr", "cnr"):
            x = np.log(np.maximum(x, 1e-6))
        off = x - np.median(x[known]) if known.any() else x
        size = np.abs(off[known])
        spread = 1.4826 * np.median(size) if len(size) else 0.0
        spread = spread or 1.2533 * (size.mean() if len(size) else 0.0)  # more than half are alike
        z = off / spread if spread else np.zeros(len(x))
        found[name] = np.where(known, z.clip(0) if name == "distance" else z, np.inf)
    return pd.DataFrame(found, index=measures.index)
