"""Have synthetic volumes as much variety as real ones? Similarity of random pairs of volumes of each set."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ldm3d.errors import InputError
from ldm3d.evaluation.realism_metrics import REALISM_METRICS, Metric
from ldm3d.evaluation.realism_sets import QUANTILES, one_scan_each, subject_numbers
from ldm3d.randomness import generator
from ldm3d.statistics.equivalence import Z_90, Finding

MIN_DISSIMILARITY = 1e-6  # 1 - similarity of a pair, so that the logarithm of equal volumes is finite
MARGIN_PAIRS, MARGIN_BLEND = 10, 0.9  # pairs in which a margin is measured; the part of their difference that is left


def diversity_metrics(
    real: Sequence[NDArray],
    synthetic: Sequence[NDArray],
    subjects: Sequence[Any] | None = None,
    pairs: int = 100,
    device: str | torch.device = "cpu",
    seed: int = 0,
    metrics: dict[str, Metric] = REALISM_METRICS,
    requested: Sequence[Any] | None = None,
) -> list[Finding]:
    """Similarity of random pairs of synthetic volumes beside that of random pairs of real ones.

    A person is in one pair at most, so pairs are independent and Student's intervals hold: that of the mean over synthetic
    pairs, and as null that in which the mean of as many further real pairs would lie (a prediction interval). Means are of
    log(1 - similarity), which is near a normal distribution, and are transformed back: similarities crowd below 1, and of 12
    pairs of one distribution 8% instead of 5% came out as different by their plain means. The excess and its margin are of
    these means too, brought to the scale of similarities by the slope there.

    Args:
        real, synthetic: volumes (C, X, Y, Z) in [0, 1], all of one shape; anything with a length and an index.
        pairs: at most, of each.
        subjects, requested, seed, metrics: as in `distribution_metrics`.

    Raises:
        InputError: fewer than 2 pairs of either, or volumes of different shapes.
    """
    chosen = {name: metric for name, metric in metrics.items() if metric.kind == "volumes"}
    found = [
        log_dissimilarities(name, volumes, people, pairs, device, seed, chosen)
        for name, volumes, people in (("real", real, subjects), ("synthetic", synthetic, requested))
    ]
    blended = log_dissimilarities("real", real, subjects, min(pairs, MARGIN_PAIRS), device, seed, chosen, MARGIN_BLEND)
    figures = []
    for name, metric in chosen.items():
        on_real, on_synthetic = (values[name] for values in found)
        own = _t(len(on_synthetic)) * on_synthetic.std(ddof=1) * math.sqrt(1 / len(on_synthetic))
        usual = _t(len(on_real)) * on_real.std(ddof=1) * math.sqrt(1 / len(on_synthetic) + 1 / len(on_real))
        mean, expected = on_synthetic.mean(), on_real.mean()
        ends = [1 - math.exp(end) for end in (mean, mean + own, mean - own, expected + usual, expected - usual)]
        slope, excess = math.exp(expected), expected - mean
        error = math.hypot(*(values.std(ddof=1) / math.sqrt(len(values)) for values in (on_real, on_synthetic)))
        reach = float(stats.t.ppf(stats.norm.cdf(Z_90), min(len(on_real), len(on_synthetic)) - 1)) * error
        margin = abs(float(np.mean(blended[name] - on_real[: len(blended[name])])))
        scaled = [float(slope * value) for value in (excess, excess - reach, excess + reach, margin)]
        figures.append(Finding(name, *ends, *scaled, metric.direction, len(on_real), len(on_synthetic)))
    return figures


def log_dissimilarities(
    name: str,
    volumes: Sequence[NDArray],
    subjects: Sequence[Any] | None,
    pairs: int,
    device: str | torch.device,
    seed: int,
    metrics: dict[str, Metric] = REALISM_METRICS,
    blend: float = 1.0,
) -> dict[str, NDArray]:
    """log(1 - similarity) of random pairs of volumes, (P,), by each metric of pairs; `name` is of the set.

    The two volumes of a pair are first brought nearer to each other, so that the part `blend` of their difference is left.

    Raises:
        InputError: fewer than 2 pairs.
    """
    matched = _pairs(subject_numbers(subjects, len(volumes)), pairs, generator(seed, name))
    if len(matched) < 2:
        raise InputError(f"{len(volumes)} {name} volumes make {len(matched)} pairs, and 2 are needed; give more volumes")
    values = {key: [] for key, metric in metrics.items() if metric.kind == "volumes"}
    for i, j in matched:
        one, other = (torch.as_tensor(np.ascontiguousarray(volumes[k], np.float32), device=device)[None] for k in (i, j))
        if blend != 1:
            one, other = (torch.lerp(*both, (1 - blend) / 2) for both in ((one, other), (other, one)))
        for key, similarities in values.items():
            similarities.append(float(metrics[key].compute(one, other)))
    return {key: np.log((1 - np.array(each)).clip(MIN_DISSIMILARITY)) for key, each in values.items()}


def _t(values: int) -> float:
    return float(stats.t.ppf(QUANTILES[1], values - 1))


def _pairs(subjects: Tensor, pairs: int, rng: torch.Generator) -> list[tuple[int, int]]:
    """Up to `pairs` pairs of rows of different people; no person is in two of them."""
    people = torch.randperm(len(subjects.unique()), generator=rng)
    rows = one_scan_each(subjects, people, rng).tolist() if len(people) else []
    return list(zip(rows[::2], rows[1::2]))[:pairs]
