"""Which requests lie beyond what training saw: one covariate alone, or values that never came together.

A 25-year-old with a 90-year-old's ventricles is within the range of both, and still nobody's. Mahalanobis' distance sees that.
A pipeline stores mean, deviation and range of each covariate and not how they hang together, so the joint part needs the table
that was trained on; without it covariates are judged one by one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.covariates import Covariate, CovariateSchema, Value, describe

SHARE = 99  # percent of the training volumes that lie within
LEAST = 30  # training volumes from which a covariance is taken


@dataclass(frozen=True)
class Beyond:
    """A request beyond what training saw: its number, what was asked, and why it is called so."""

    number: int
    asked: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def beyond_training(
    schema: CovariateSchema, requests: Sequence[Mapping[str, Value]], training: Sequence[Mapping[str, Any]] | None
) -> list[Beyond]:
    """Requests that training says nothing about.

    Args:
        schema: fitted on the training split.
        requests: parsed.
        training: covariates of the training volumes; None if they are not at hand.

    Returns:
        Those with a value outside of the range that training saw, and those whose continuous covariates together are further
        from the training volumes' mean (Mahalanobis 1936) than `SHARE` % of the training volumes are themselves.
    """
    continuous = [c for c in schema if c.seen]
    known = None
    if training is not None:
        known = np.array([[np.nan if (v := c.parse(row[c.name])) is None else v for c in continuous] for row in training])
    found = []
    for number, row in enumerate(requests):
        given = [c for c in continuous if row[c.name] is not None]
        reasons = [f"{c.name}: training saw {c.seen[0]:g} to {c.seen[1]:g}" for c in given if not _within(c, row[c.name])]
        if not reasons and known is not None and len(given) > 1:
            places = [continuous.index(c) for c in given]
            far, limit = _distance(np.array([row[c.name] for c in given]), known[:, places])
            if far > limit:
                together = ", ".join(c.name for c in given)
                reasons.append(f"{together} together: distance {far:.1f}, {SHARE}% of training within {limit:.1f}")
        if reasons:
            found.append(Beyond(number, describe(row), "; ".join(reasons)))
    return found


def _within(covariate: Covariate, value: float) -> bool:
    return covariate.seen[0] <= value <= covariate.seen[1]


def _distance(asked: NDArray, known: NDArray) -> tuple[float, float]:
    """Mahalanobis' distance of values (K,) from known volumes (N, K), and what `SHARE` % of these stay below."""
    known = known[np.isfinite(known).all(axis=1)]
    if len(known) < LEAST:
        return 0.0, np.inf
    centre = known.mean(axis=0)
    inverse = np.linalg.pinv(np.cov(known, rowvar=False))

    def distance(values: NDArray) -> NDArray:
        return np.sqrt(np.einsum("...i,ij,...j->...", values - centre, inverse, values - centre))

    return float(distance(asked)), float(np.percentile(distance(known), SHARE))
