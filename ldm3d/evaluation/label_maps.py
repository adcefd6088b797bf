"""How good drawn label maps are beside the true one: Dice, and whether their probabilities are as sure as they may be."""

import numpy as np
from numpy.typing import NDArray

from ldm3d.metrics.labels import calibration_error, dice, energy_distance, negative_log_likelihood, with_background

SCORES = {
    "dice": "Dice of the most probable labels, mean of the groups",
    "calibration_error": "expected calibration error: how far the largest probability is from how often it is right",
    "negative_log_likelihood": "of the true labels, in nats",
    "energy_distance": "generalised energy distance of the samples to the truth",
}


def label_scores(samples: NDArray, truth: NDArray, where: NDArray) -> NDArray:
    """`SCORES` of samples (S, G, X, Y, Z) beside the true shares (G, X, Y, Z), in the voxels `where` (X, Y, Z) that count."""
    drawn = np.stack([with_background(each) for each in samples])
    p, y, classes = drawn.mean(axis=0), with_background(truth).argmax(axis=0), len(truth) + 1
    overlap = float(np.nanmean(dice(p.argmax(axis=0), y, classes)))
    sure = calibration_error(p, y, where), negative_log_likelihood(p, y, where)
    return np.array([overlap, *sure, energy_distance([each.argmax(axis=0) for each in drawn], y, classes)])
