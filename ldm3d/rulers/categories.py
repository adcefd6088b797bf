"""Do generated volumes show the category that was asked, sex for example? Read off by regression, as ages are.

One ridge regression a category on whether a training volume is of it, and the largest answer decides (for two categories this
is Fisher's linear discriminant, up to the threshold). It is fitted on real volumes and on the same after the autoencoder, as
ages are, see predictors.py. What is reached on held-out real people, and on their reconstructions, stands beside.
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
    """How often the category that is read off a volume is the one asked for.

    Attributes:
        covariate, kind: what was read off which volumes, "real", "reconstructed" or "generated".
        n: volumes.
        share: of them that are right; interval: 95% of it, by bootstrap over people.
        commonest: what always saying the commonest category would reach.
        by_category: category -> share of its volumes that are right.
        right: of each volume, 1 if it is; (n,).
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
    """Tells categories by features.

    Args:
        features: of training volumes, as they are and after the autoencoder, (N, D).
        values: their categories, (N,).
        people: whom each shows.

    Raises:
        InputError: too few people, or one category alone.
    """

    def __init__(self, features: NDArray, values: Sequence[str], people: Sequence[Hashable]):
        self.categories = sorted(set(values))
        self.ridges = [fit_ridge(features, [value == one for value in values], people) for one in self.categories]

    def __call__(self, features: NDArray) -> list[str]:
        """(N, D) -> N categories."""
        return [self.categories[i] for i in np.stack([ridge(features) for ridge in self.ridges]).argmax(axis=0)]


def count_hits(covariate: str, kind: str, said: Sequence[str], asked: Sequence[str], people: Sequence[Hashable]) -> Hits:
    """Compare N categories that were read off with those asked for; `people`: whom each volume shows."""
    right = np.array([a == b for a, b in zip(said, asked)], dtype=float)
    of = {one: np.array([each == one for each in asked]) for one in sorted(set(asked))}
    draws = means(right, resamples(people))
    return Hits(
        covariate,
        kind,
        len(right),
        float(right.mean()),
        interval(draws),
        max(float(own.mean()) for own in of.values()),
        {one: float(right[own].mean()) for one, own in of.items()},
        right,
        draws,
    )
