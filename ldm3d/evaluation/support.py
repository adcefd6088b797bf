"""Which requests lie outside of the training data: by one covariate, or by a combination of values?

The ventricles of a 90-year-old in a 25-year-old are within both ranges, but the combination is not in the data. The
Mahalanobis distance detects this. It needs the table of the training data, as a pipeline stores mean, deviation and range of
each covariate only; without the table covariates are checked one by one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.covariates import Covariate, CovariateSchema, Value, describe

PERCENT_WITHIN = 99  # of the training volumes
MIN_VOLUMES = 30  # in training, to estimate a covariance


@dataclass(frozen=True)
class OutsideTraining:
    """A request outside of the training data: its number, its covariates, and the reason."""

    number: int
    asked: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def outside_training(
    schema: CovariateSchema, requests: Sequence[Mapping[str, Value]], training: Sequence[Mapping[str, Any]] | None
) -> list[OutsideTraining]:
    """Requests for which generation is extrapolation.

    Args:
        schema: fitted on the training split.
        requests: parsed.
        training: covariates of the training volumes; None if they are not available.

    Returns:
        Those with a value outside of the training range, and those whose continuous covariates together are further from the
        training volumes' mean (Mahalanobis 1936) than `PERCENT_WITHIN` % of the training volumes.
    """
    continuous = [c for c in schema if c.seen]
    known = None
    if training is not None:
        known = np.array([[np.nan if (v := c.parse(row[c.name])) is None else v for c in continuous] for row in training])
    found = []
    for number, row in enumerate(requests):
        given = [c for c in continuous if row[c.name] is not None]
        reasons = [f"{c.name}: training range {c.seen[0]:g} to {c.seen[1]:g}" for c in given if not _within(c, row[c.name])]
        if not reasons and known is not None and len(given) > 1:
            places = [continuous.index(c) for c in given]
            far, limit = _distance(np.array([row[c.name] for c in given]), known[:, places])
            if far > limit:
                together = ", ".join(c.name for c in given)
                reasons.append(f"{together} together: distance {far:.1f}, {PERCENT_WITHIN}% of training within {limit:.1f}")
        if reasons:
            found.append(OutsideTraining(number, describe(row), "; ".join(reasons)))
    return found


def _within(covariate: Covariate, value: float) -> bool:
    return covariate.seen[0] <= value <= covariate.seen[1]


def _distance(asked: NDArray, known: NDArray) -> tuple[float, float]:
    """Mahalanobis distance of values (K,) from training volumes (N, K), and the `PERCENT_WITHIN` percentile of theirs."""
    known = known[np.isfinite(known).all(axis=1)]
    if len(known) < MIN_VOLUMES:
        return 0.0, np.inf
    centre = known.mean(axis=0)
    inverse = np.linalg.pinv(np.cov(known, rowvar=False))

    def distance(values: NDArray) -> NDArray:
        return np.sqrt(np.einsum("...i,ij,...j->...", values - centre, inverse, values - centre))

    return float(distance(asked)), float(np.percentile(distance(known), PERCENT_WITHIN))
