"""Label maps as shares or probabilities of classes: how near to the truth, and whether they know how sure they may be.

Legend: p probabilities (K, X, Y, Z) of K classes, background among them, which sum to 1; y the true class of each voxel,
(X, Y, Z), 0 to K - 1; w which voxels count, (X, Y, Z).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BINS = 10  # of confidence
LEAST = 1e-4  # probability: 8 samples cannot tell less from 0


def with_background(shares: NDArray) -> NDArray:
    """Shares of groups (G, X, Y, Z), with what none fills in front: (1 + G, X, Y, Z), in [0, 1], summing to 1."""
    shares = np.clip(shares, 0, 1)
    shares = shares / np.maximum(shares.sum(axis=0, keepdims=True), 1)
    return np.concatenate([1 - shares.sum(axis=0, keepdims=True), shares])


def dice(found: NDArray, truth: NDArray, classes: int) -> NDArray:
    """Dice coefficient of each class but the background, (K - 1,); NaN for a class that is in neither map (X, Y, Z)."""
    pairs = [((found == k), (truth == k)) for k in range(1, classes)]
    return np.array([2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else np.nan for a, b in pairs])


def calibration_error(p: NDArray, y: NDArray, w: NDArray) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): |accuracy - confidence| over `BINS` bins of confidence, weighed
    by the voxels in each; the confidence is the largest probability of a voxel."""
    confidence, right = p.max(axis=0)[w], (p.argmax(axis=0) == y)[w]
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, weights=each, minlength=BINS) for each in (confidence, right.astype(float))]
    return float(np.abs(sums[0] - sums[1]).sum() / count.sum())


def negative_log_likelihood(p: NDArray, y: NDArray, w: NDArray) -> float:
    """Mean of -log p of the true class, in nats; probabilities below `LEAST` count as that."""
    return float(-np.log(np.maximum(np.take_along_axis(p, y[None], axis=0)[0][w], LEAST)).mean())


def energy_distance(samples: Sequence[NDArray], truth: NDArray, classes: int) -> float:
    """Squared generalised energy distance of sampled label maps to one true map (Kohl et al. 2018, eq. 3), with
    d = 1 - mean Dice: 2 E d(sample, truth) - E d(sample, another sample). Over pairs of different samples, so that few of them
    are no better than many."""

    def d(a: NDArray, b: NDArray) -> float:
        return 1 - float(np.nanmean(dice(a, b, classes)))

    to_truth = np.mean([d(sample, truth) for sample in samples])
    pairs = [d(a, b) for i, a in enumerate(samples) for b in samples[:i]]
    return float(2 * to_truth - (np.mean(pairs) if pairs else 0))
