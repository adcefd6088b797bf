"""Is synthetic data of use? The same regressor trained on real volumes, on synthetic ones and on both, tested on real people.

The regressor is that of `ldm3d.rulers.regression`, solved exactly: none of the three can have trained longer. Synthetic
volumes come with the value that was asked of them as their label. Real and synthetic training sets are of one size. They are
drawn anew in every repeat, and the people it is tested on are drawn by the bootstrap, so that intervals hold both chances.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm3d.errors import InputError
from ldm3d.randomness import generator
from ldm3d.rulers.regression import LEAST, fit_ridge
from ldm3d.statistics.bootstrap import SAMPLES, Interval, interval, resamples

REPEATS = 20
PART = 0.8  # of the volumes there are that a repeat trains on
KINDS = ("real", "synthetic", "both")


@dataclass(frozen=True)
class Usefulness:
    """What was found for one covariate.

    Attributes:
        covariate: that is predicted.
        tested: held-out real volumes.
        volumes: kind of training ("real", "synthetic", "both") -> volumes in it.
        mae: kind -> mean absolute error on held-out people, over repeats.
        intervals: kind -> 95% of it.
        ratio: "synthetic" and "both" -> their error relative to "real"; ratio_intervals: 95% of that.
        errors: kind -> mean absolute error on each tested volume, over repeats; (N,).
    """

    covariate: str
    tested: int
    volumes: dict[str, int]
    mae: dict[str, float]
    intervals: dict[str, Interval]
    ratio: dict[str, float]
    ratio_intervals: dict[str, Interval]
    errors: dict[str, NDArray]

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "errors"}


Set = tuple[NDArray, NDArray]  # features (N, D), values (N,)


def usefulness(
    covariate: str,
    real: Set,
    synthetic: Set,
    tested: Set,
    people: Sequence[Hashable],
    repeats: int = REPEATS,
    seed: int = 0,
) -> Usefulness:
    """Train on real, on synthetic and on both; test on held-out real volumes.

    Args:
        covariate: its name.
        real, synthetic: to train on; the larger one is cut to the size of the smaller in every repeat.
        tested: volumes of people who are in none of them.
        people: whom each of those shows.
        repeats: training sets that are drawn.
        seed: of all draws.

    Raises:
        InputError: too few volumes to train on, or none to test on.
    """
    size = int(PART * min(len(real[1]), len(synthetic[1])))
    if size < LEAST or not len(tested[1]):
        raise InputError(
            f"{len(real[1])} real and {len(synthetic[1])} synthetic volumes to train on, {len(tested[1])} to test on: "
            f"{-(-LEAST * 10 // 8)} of each are needed; generate more (--num), or evaluate with the data that was trained on"
        )
    errors: dict[str, list[NDArray]] = {kind: [] for kind in KINDS}
    for repeat in range(repeats):
        drawn = [_draw(one, size, seed, repeat, name) for one, name in ((real, "real"), (synthetic, "synthetic"))]
        both = tuple(np.concatenate(parts) for parts in zip(*drawn))
        for kind, (features, values) in zip(KINDS, (*drawn, both)):
            errors[kind].append(abs(fit_ridge(features, values)(tested[0]) - tested[1]))
    weights = resamples(people, seed=seed)  # (B, N)
    weights /= weights.sum(axis=1, keepdims=True)
    chosen = torch.randint(repeats, (SAMPLES,), generator=generator("downstream", seed)).numpy()
    # One draw of all three is of the same repeat and the same people, so that ratios are of pairs
    spread = {kind: (weights * np.stack(rows)[chosen]).sum(axis=1) for kind, rows in errors.items()}  # (B,)
    mae = {kind: float(np.mean(rows)) for kind, rows in errors.items()}
    return Usefulness(
        covariate,
        len(tested[1]),
        {"real": size, "synthetic": size, "both": 2 * size},
        mae,
        {kind: interval(values) for kind, values in spread.items()},
        {kind: mae[kind] / mae["real"] for kind in KINDS[1:]},
        {kind: interval(spread[kind] / spread["real"]) for kind in KINDS[1:]},
        {kind: np.mean(rows, axis=0) for kind, rows in errors.items()},
    )


def _draw(one: Set, size: int, *position: int | str) -> Set:
    chosen = torch.randperm(len(one[1]), generator=generator("downstream", *position))[:size].numpy()
    return one[0][chosen], one[1][chosen]
