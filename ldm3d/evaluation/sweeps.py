"""Does a volume follow one covariate if nothing else is requested?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ldm3d.description import Sampling
from ldm3d.evaluation.samples import Measure
from ldm3d.pipeline import Pipeline
from ldm3d.processes import ALONE, Processes, share_work
from ldm3d.rulers.volumetry import apply_measure

VALUES, REPEATS = 6, 4  # of a sweep, and noises at each value


@dataclass
class Sweep:
    """One covariate requested at several values with the same noise, all others left open (or fixed, if they are required).

    Attributes:
        covariate, values: what was requested, (V,).
        measured: quantity -> (V, repeats).
        rank_correlation: quantity -> Spearman's correlation of the requested value with the mean over repeats.
        volumes: of the first repeat, for pictures.
    """

    covariate: str
    values: list[float]
    measured: dict[str, NDArray]
    rank_correlation: dict[str, float]
    volumes: list[NDArray]

    def to_dict(self) -> dict[str, Any]:
        means = {name: values.mean(axis=1).tolist() for name, values in self.measured.items()}
        own = {"covariate": self.covariate, "values": self.values}
        return own | {"measured_mean": means, "rank_correlation": self.rank_correlation}


def evenly(low: float, high: float, count: int) -> list[float]:
    """`count` values from low to high, rounded to three significant digits of the range, and none outside of it."""
    digits = 2 - math.floor(math.log10(high - low)) if high > low else 15
    return np.linspace(low, high, count).round(digits).clip(low, high).tolist()


def sweep(
    pipeline: Pipeline,
    covariate: str,
    measure: Measure,
    sampling: Sampling,
    quantities: Sequence[str],
    processes: Processes = ALONE,
) -> Sweep:
    """Request evenly spaced values between the 5th and 95th percentile of a normal with the covariate's mean and deviation.

    Args:
        quantities: to keep of what `measure` returns.
        processes: that share the work.
    """
    known = pipeline.schema[covariate]
    low, high = (max(known.seen[0], known.mean - 1.64 * known.std), min(known.seen[1], known.mean + 1.64 * known.std))
    values = evenly(low, high, VALUES)

    def work(value: float) -> tuple:
        requests = pipeline.parse([{**pipeline.schema.middle(), covariate: value}] * REPEATS)
        volumes = list(pipeline.volumes(requests, sampling))
        return [apply_measure(measure, volume, pipeline.grid.spacing_mm) for volume in volumes], volumes[0]

    answers, pictures = zip(*share_work(work, values, processes, f"sweep {covariate}, {REPEATS} volumes a value", "value"))
    measured = {name: np.array([[answer[name] for answer in row] for row in answers]) for name in quantities}  # (V, repeats)
    ranks = {name: float(stats.spearmanr(values, m.mean(axis=1)).statistic) for name, m in measured.items()}
    return Sweep(covariate, values, measured, ranks, list(pictures))
