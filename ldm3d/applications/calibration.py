"""What residuals mean: z and p of each voxel, by what the same procedure leaves in healthy people at that place.

No lesion takes part. Every healthy person is compared with the others as a patient will be with all of them; how large |z|
gets by chance, and the largest cluster in a person, are counted in these comparisons. So a p-value is right on healthy people
by construction: a share a of their voxels has p <= a (as in conformal prediction, Vovk et al. 2005), however residuals are
distributed.

Legend: N healthy people; residuals R (N, X, Y, Z), smoothed; z = (R - m) / (s sqrt(1 + 1/N)), m and s (X, Y, Z).
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ldm3d.errors import InputError
from ldm3d.files import write_atomic

LEAST_PEOPLE = 8
FWHM = 2.3548
SMOOTHING = 1.5  # voxels, full width at half maximum, of residuals
POOLING = 4.0  # of variances: N people tell little of a variance, their neighbourhood more
FLOOR = 0.005  # deviation, of the intensity range
BRAIN = 0.05  # mean intensity of healthy people above which a voxel is judged
FORMING = 0.001  # p-value of voxels that form clusters
TAIL = 4000  # quantiles of |z| that are kept, even in log(p)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is usual in healthy people.

    Attributes:
        mean, deviation: m and s, (X, Y, Z).
        brain: (X, Y, Z) bool, voxels that are judged.
        chances: (TAIL,) falling p-values, and `sizes` (TAIL,), the |z| that so large a share of healthy voxels exceeds.
        largest: (N,) voxels in the largest cluster of each healthy person, 0 for none.
        about: model, settings: what the residuals followed from.
    """

    mean: NDArray
    deviation: NDArray
    brain: NDArray
    chances: NDArray
    sizes: NDArray
    largest: NDArray
    about: Mapping[str, Any]

    @classmethod
    def fit(cls, residuals: Sequence[NDArray], volumes: Sequence[NDArray], about: Mapping[str, Any]) -> "Calibration":
        """From residuals and volumes of healthy people, N of (X, Y, Z); memory for about as much again.

        Raises:
            InputError: fewer than LEAST_PEOPLE.
        """
        count = len(residuals)
        if count < LEAST_PEOPLE:
            raise InputError(
                f"{count} healthy people are too few to say what is usual; give at least {LEAST_PEOPLE}, better 40"
            )
        brain = np.mean(volumes, axis=0) > BRAIN
        smoothed = np.stack([_smooth(residual, SMOOTHING).astype(np.float32) for residual in residuals])
        scores = _left_out(smoothed, brain)
        null = np.sort(np.abs(scores), axis=None)[::-1]
        # The k-th largest of n is exceeded by chance with (k + 1) / (n + 1), itself included
        chances = np.geomspace(2 / (len(null) + 1), 1, TAIL)
        sizes = null[(chances * (len(null) + 1)).astype(int).clip(2, len(null)) - 2]
        cut = float(np.interp(np.log(FORMING), np.log(chances), sizes))
        largest = [max(_clusters(_in_place(score, brain), brain, cut)[1], default=0) for score in scores]
        mean = smoothed.mean(axis=0, dtype=np.float64)
        return cls(mean, _usual(_squares(smoothed, mean), count), brain, chances, sizes, np.array(largest), dict(about))

    @property
    def people(self) -> int:
        """N."""
        return len(self.largest)

    def score(self, residual: NDArray) -> NDArray:
        """z of a residual (X, Y, Z); 0 outside of the brain."""
        found = _score(_smooth(residual, SMOOTHING), self.mean, self.deviation, self.people)
        return np.where(self.brain, found, 0).astype(np.float32)

    def p_values(self, score: NDArray) -> NDArray:
        """Two-sided p of z (X, Y, Z), not corrected; 1 outside of the brain."""
        size = np.abs(score)
        # Sizes fall while chances rise; np.interp wants them to rise
        log_p = np.interp(size, self.sizes[::-1], np.log(self.chances)[::-1])
        p = np.where(size >= self.sizes[0], self.chances[0], np.exp(log_p))
        return np.where(self.brain, p, 1.0).astype(np.float32)

    def clusters(self, score: NDArray) -> tuple[NDArray, list[dict[str, Any]]]:
        """Clusters of voxels with p < FORMING: their numbers (X, Y, Z), 0 for none, and a row for each, the largest first.

        A row has voxels, peak (z), p: the share of healthy people, the person included, with a cluster as large (corrected
        for the number of clusters), and centre, in voxels.
        """
        cut = float(np.interp(np.log(FORMING), np.log(self.chances), self.sizes))
        labels, sizes = _clusters(score, self.brain, cut)
        order = np.argsort(sizes)[::-1]
        numbered, rows = np.zeros_like(labels), []
        for number, which in enumerate(order, start=1):
            inside = labels == which + 1
            numbered[inside] = number
            peak = float(score[inside][np.abs(score[inside]).argmax()])
            p = float((1 + (self.largest >= sizes[which]).sum()) / (1 + self.people))
            centre = [round(float(c), 1) for c in np.argwhere(inside).mean(axis=0)]
            rows.append(
                {"number": number, "voxels": int(sizes[which]), "peak_z": round(peak, 2), "p": round(p, 4), "centre": centre}
            )
        return numbered, rows

    def save(self, path: Path) -> None:
        """Write as one .npz file."""
        buffer = io.BytesIO()
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        np.savez_compressed(buffer, about=np.array(json.dumps(dict(self.about))), **arrays)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, about: Mapping[str, Any]) -> "Calibration":
        """Read a file of `save`; InputError where there is none, or it is not of `about`, see `check`."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = {name: stored[name] for name in _ARRAYS}
                own = json.loads(str(stored["about"]))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: is no calibration ({error}); write one with ldm3d calibrate") from None
        calibration = cls(**found, about=own)
        calibration.check(about, str(path))
        return calibration

    def check(self, about: Mapping[str, Any], name: str = "the calibration") -> None:
        """Raise InputError where residuals are made by another model or otherwise than those of the healthy people."""
        own = self.about
        if wrong := [f"{key}: {own.get(key)}, not {value}" for key, value in about.items() if own.get(key) != value]:
            raise InputError(f"{name} is of another procedure ({'; '.join(wrong)}); calibrate again, or ask for the same")

    @property
    def identity(self) -> str:
        """Names the calibration."""
        return hashlib.sha256(b"".join(np.ascontiguousarray(getattr(self, name)).tobytes() for name in _ARRAYS)).hexdigest()[
            :16
        ]


_ARRAYS = ("mean", "deviation", "brain", "chances", "sizes", "largest")


def _left_out(smoothed: NDArray, brain: NDArray) -> NDArray:
    """z of each person against all others, (N, voxels of the brain), without adding these up anew for each."""
    count, mean = len(smoothed), smoothed.mean(axis=0, dtype=np.float64)
    squares = _squares(smoothed, mean)
    scores = np.empty((count, int(brain.sum())), np.float32)
    for person in range(count):
        away = smoothed[person] - mean
        others = mean - away / (count - 1), squares - count / (count - 1) * away**2
        scores[person] = _score(smoothed[person], others[0], _usual(others[1], count - 1), count - 1)[brain]
    return scores


def _squares(smoothed: NDArray, mean: NDArray) -> NDArray:
    """Sum of squared differences from the mean over people, (X, Y, Z), one person at a time."""
    total = np.zeros(mean.shape)
    for each in smoothed:
        total += (each - mean) ** 2
    return total


def _usual(squares: NDArray, count: int) -> NDArray:
    """s from the sum of squares of N people; variances are pooled over a neighbourhood."""
    deviation: NDArray = np.sqrt(_smooth(squares / (count - 1), POOLING).clip(0) + FLOOR**2)
    return deviation


def _in_place(values: NDArray, brain: NDArray) -> NDArray:
    """Voxels of the brain as a volume, 0 outside of it."""
    volume = np.zeros(brain.shape, values.dtype)
    volume[brain] = values
    return volume


def _score(smoothed: NDArray, mean: NDArray, deviation: NDArray, count: int) -> NDArray:
    return (smoothed - mean) / (deviation * np.sqrt(1 + 1 / count))


def _clusters(score: NDArray, brain: NDArray, cut: float) -> tuple[NDArray, list[int]]:
    """Connected voxels beyond the cut, bright and dark ones apart: labels (X, Y, Z) from 1 on, and the sizes of all."""
    bright, count = ndimage.label(brain & (score > cut))
    dark, more = ndimage.label(brain & (score < -cut))
    labels = np.where(dark > 0, dark + count, bright)
    return labels, np.bincount(labels.ravel(), minlength=count + more + 1)[1:].tolist()


def _smooth(volume: NDArray, fwhm: float) -> NDArray:
    smoothed: NDArray = ndimage.gaussian_filter(volume.astype(np.float64), fwhm / FWHM, mode="nearest")
    return smoothed
