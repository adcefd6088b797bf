"""Downstream utility: does a regressor trained on synthetic volumes predict as well on real people?

The ridge regression of `ldm3d.rulers.regression` is fitted to real volumes, to synthetic volumes and to both, and tested on
held-out real people. The label of a synthetic volume is the value that was requested. Real and synthetic training sets have
the same size. They are drawn anew in every repeat, and the tested people by the bootstrap, so that intervals include both.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm3d.errors import InputError
from ldm3d.randomness import generator
from ldm3d.rulers.regression import MIN_PEOPLE, fit_ridge
from ldm3d.statistics.bootstrap import SAMPLES, Interval, interval, resamples

REPEATS = 20
TRAINING_PART = 0.8  # of the available volumes, in every repeat
KINDS = ("real", "synthetic", "both")


@dataclass(frozen=True)
class Utility:
    """Downstream utility for one covariate.

    Attributes:
        covariate: that is predicted.
        tested: held-out real volumes.
        volumes: training set ("real", "synthetic", "both") -> volumes in it.
        mae: training set -> mean absolute error on held-out people, over repeats.
        intervals: training set -> its 95% interval.
        ratio: "synthetic" and "both" -> error relative to "real"; ratio_intervals: its 95% intervals.
        errors: training set -> mean absolute error on each tested volume, over repeats; (N,).
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


def downstream_utility(
    covariate: str, real: Set, synthetic: Set, tested: Set, people: Sequence[Hashable], repeats: int = REPEATS, seed: int = 0
) -> Utility:
    """Train on real, on synthetic and on both; test on held-out real volumes.

    Args:
        covariate: its name.
        real, synthetic: to train on; the larger one is cut to the size of the smaller in every repeat.
        tested: volumes of other people.
        people: the person in each of these.
        repeats: number of training sets.
        seed: of all draws.

    Raises:
        InputError: too few volumes to train on, or none to test on.
    """
    size = int(TRAINING_PART * min(len(real[1]), len(synthetic[1])))
    if lacking := _lacking(covariate, len(real[1]), len(synthetic[1]), len(tested[1])):
        raise InputError(lacking)
    errors: dict[str, list[NDArray]] = {kind: [] for kind in KINDS}
    for repeat in range(repeats):
        drawn = [_draw(one, size, seed, repeat, name) for one, name in ((real, "real"), (synthetic, "synthetic"))]
        both = tuple(np.concatenate(parts) for parts in zip(*drawn))
        for kind, (features, values) in zip(KINDS, (*drawn, both)):
            errors[kind].append(abs(fit_ridge(features, values)(tested[0]) - tested[1]))
    weights = resamples(people, seed=seed)  # (B, N)
    weights /= weights.sum(axis=1, keepdims=True)
    chosen = torch.randint(repeats, (SAMPLES,), generator=generator("downstream", seed)).numpy()
    # A draw has the same repeat and the same people in all three, so that ratios are paired
    draws = {kind: (weights * np.stack(rows)[chosen]).sum(axis=1) for kind, rows in errors.items()}  # (B,)
    mae = {kind: float(np.mean(rows)) for kind, rows in errors.items()}
    volumes = {"real": size, "synthetic": size, "both": 2 * size}
    intervals = {kind: interval(values) for kind, values in draws.items()}
    ratio = {kind: mae[kind] / mae["real"] for kind in KINDS[1:]}
    ratio_intervals = {kind: interval(draws[kind] / draws["real"]) for kind in KINDS[1:]}
    mean_errors = {kind: np.mean(rows, axis=0) for kind, rows in errors.items()}
    return Utility(covariate, len(tested[1]), volumes, mae, intervals, ratio, ratio_intervals, mean_errors)


def _lacking(covariate: str, real: int, synthetic: int, tested: int) -> str:
    """What there is too little of, and what can be done; "" for nothing."""
    needed = math.ceil(MIN_PEOPLE / TRAINING_PART)
    if real < needed:
        return (
            f"--data has {real} training scans with {covariate}, and {needed} are needed. Give all scans of the training in "
            "--data; if these are all, the training is too small for this comparison: leave --downstream out"
        )
    if synthetic < needed:
        return f"{synthetic} volumes were generated for people with {covariate}, and {needed} are needed: --num generates more"
    return "" if tested else f"no held-out scan has {covariate}: give held-out people with it in --data"


def _draw(one: Set, size: int, *position: int | str) -> Set:
    chosen = torch.randperm(len(one[1]), generator=generator("downstream", *position))[:size].numpy()
    return one[0][chosen], one[1][chosen]
