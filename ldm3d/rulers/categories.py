"""Classification of volumes, by sex for example: is the requested category recognised?

One-versus-rest ridge regression (for two categories Fisher's linear discriminant, up to the threshold). As in regression.py it
is fitted to real volumes and to their reconstructions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.rulers.regression import fit_ridge
from ldm3d.statistics.bootstrap import Interval, interval, means, resamples


@dataclass(frozen=True)
class Hits:
    """How often the recognised category is the one of the table, or the requested one.

    Attributes:
        covariate, kind: what was recognised on which volumes, "real", "reconstructed" or "generated".
        n: volumes.
        share: accuracy; interval: its 95% interval, by bootstrap over people.
        commonest: accuracy of always choosing the commonest category.
        by_category: category -> share of its volumes that are recognised.
        right: of each volume, 1 if it is recognised; (n,).
        draws: the share in each resample of people, (B,).
    """

    covariate: str
    kind: str
    n: int
    share: float
    interval: Interval
    commonest: float
    by_category: dict[str, float]
    right: NDArray = field(repr=False)
    draws: NDArray = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("right", "draws")}


class Reader:
    """Recognises categories by features.

    Args:
        features: of training volumes, as they are and after the autoencoder, (N, D).
        values: their categories, (N,).
        people: the person in each.

    Raises:
        InputError: too few people, or a single category.
    """

    def __init__(self, features: NDArray, values: Sequence[str], people: Sequence[Hashable]):
        self.categories = sorted(set(values))
        self.ridges = [fit_ridge(features, [value == one for value in values], people) for one in self.categories]

    def __call__(self, features: NDArray) -> list[str]:
        """(N, D) -> N categories."""
        return [self.categories[i] for i in np.stack([ridge(features) for ridge in self.ridges]).argmax(axis=0)]


def count_hits(covariate: str, kind: str, found: Sequence[str], asked: Sequence[str], people: Sequence[Hashable]) -> Hits:
    """Hits among N recognised categories, given the right ones; `people`: the person in each volume."""
    right = np.array([a == b for a, b in zip(found, asked)], dtype=float)
    of = {one: np.array([each == one for each in asked]) for one in sorted(set(asked))}
    draws = means(right, resamples(people))
    commonest = max(float(own.mean()) for own in of.values())
    by_category = {one: float(right[own].mean()) for one, own in of.items()}
    share = float(right.mean()), interval(draws)
    return Hits(covariate, kind, len(right), *share, commonest, by_category, right, draws)
