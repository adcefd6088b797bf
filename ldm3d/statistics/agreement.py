"""How measured values of a covariate agree with reference values; every figure has a 95% interval."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ldm3d.errors import InputError
from ldm3d.statistics.bootstrap import Interval, interval, resamples

BAND = 25  # points along the reference at which the interval of the fitted line is computed


@dataclass(frozen=True)
class Agreement:
    """How measured values follow reference values.

    Attributes:
        n: pairs in which both are finite.
        r: Pearson's correlation; r_low, r_high its 95% interval (Fisher's transformation).
        slope, intercept: of the least-squares line measured = slope * reference + intercept.
        bias: mean of measured - reference.
        mae: mean absolute difference.
    """

    n: int
    r: float
    r_low: float
    r_high: float
    slope: float
    intercept: float
    bias: float
    mae: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def agreement(reference: Sequence[float], measured: Sequence[float]) -> Agreement:
    """Agreement of two lists; pairs with a missing or non-finite value are left out.

    Raises:
        InputError: fewer than 3 pairs are left, or one of the lists is constant.
    """
    pairs = np.array([(a, m) for a, m in zip(reference, measured) if a is not None and m is not None], dtype=float)
    pairs = pairs[np.isfinite(pairs).all(axis=1)] if len(pairs) else pairs.reshape(0, 2)
    if len(pairs) < 3 or np.ptp(pairs, axis=0).min() == 0:
        raise InputError(
            f"{len(pairs)} pairs of reference and measured values are left, and agreement needs 3 that vary; "
            "give more held-out subjects with this covariate"
        )
    a, m = pairs.T
    line, correlation = stats.linregress(a, m), stats.pearsonr(a, m)
    low, high = correlation.confidence_interval(0.95) if len(pairs) > 3 else (math.nan, math.nan)
    return Agreement(
        n=len(pairs),
        r=float(correlation.statistic),
        r_low=float(low),
        r_high=float(high),
        slope=float(line.slope),
        intercept=float(line.intercept),
        bias=float((m - a).mean()),
        mae=float(np.abs(m - a).mean()),
    )


@dataclass(frozen=True)
class Comparison:
    """Measured values of one covariate beside their reference, and how they agree.

    Attributes:
        covariate: its name.
        kind: which volumes were measured, for example "generated".
        reference: values that were requested, or those of the table; (N,).
        measured: on the images; (N,). Both are finite: pairs with a missing value are left out.
        volumes: index of each pair's volume in its set, (N,).
        agreement: of the two.
        intervals: 95% intervals of r, slope, bias and mae, by the bootstrap over people.
        band: (3, BAND), points along the reference and the 95% interval of the fitted line there.
        draws: r, slope, bias and mae of each resample, (B,); intervals of ratios and differences follow from them.
    """

    covariate: str
    kind: str
    reference: NDArray
    measured: NDArray
    volumes: NDArray
    agreement: Agreement
    intervals: dict[str, Interval]
    band: NDArray
    draws: dict[str, NDArray] = field(repr=False)

    @property
    def error(self) -> NDArray:
        """Measured minus reference, (N,)."""
        return self.measured - self.reference

    def errors(self, volumes: int) -> NDArray:
        """The error on each of so many volumes, NaN if it is unknown."""
        found = np.full(volumes, np.nan)
        found[self.volumes] = self.error
        return found

    def to_dict(self) -> dict[str, Any]:
        """Names, figures, and `<figure>_low`, `<figure>_high` of those that have an interval."""
        values = {"covariate": self.covariate, "kind": self.kind, **self.agreement.to_dict()}
        for name, (low, high) in self.intervals.items():
            values |= {f"{name}_low": low, f"{name}_high": high}
        return values


def compare(
    covariate: str,
    kind: str,
    reference: Sequence[float | None],
    measured: Sequence[float],
    people: Sequence[Hashable],
    seed: int = 0,
) -> Comparison:
    """Compare two lists of N values.

    Args:
        covariate, kind: for titles.
        reference: None or NaN where it is missing.
        measured: NaN where nothing could be measured.
        people: the person in each volume, or whose covariates were requested.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than 3 pairs are left, or one of the lists is constant.
    """
    pairs = np.array([(np.nan if a is None else a, m) for a, m in zip(reference, measured)], dtype=float).reshape(-1, 2)
    volumes = np.flatnonzero(np.isfinite(pairs).all(axis=1))
    a, m = pairs[volumes].T
    found = agreement(a, m)
    weights = resamples([people[int(i)] for i in volumes], seed=seed)  # (B, N)
    draws, means = _resampled(a, m, weights)
    points = np.linspace(a.min(), a.max(), BAND)
    lines = means[1][:, None] + draws["slope"][:, None] * (points - means[0][:, None])  # (B, BAND)
    band = np.stack([points, *np.nanpercentile(lines, (2.5, 97.5), axis=0)])
    intervals = {name: interval(values) for name, values in draws.items()}
    return Comparison(covariate, kind, a, m, volumes, found, intervals, band, draws)


def _resampled(a: NDArray, m: NDArray, weights: NDArray) -> tuple[dict[str, NDArray], tuple[NDArray, NDArray]]:
    """r, slope, bias and mae, and the means of a and of m, of each resample, (B,)."""
    origin = a.mean(), m.mean()
    x, y = a - origin[0], m - origin[1]  # or squares of large values would swallow the deviations
    sums = weights @ np.stack([x, y, x * x, y * y, x * y, m - a, abs(m - a)], axis=1) / weights.sum(axis=1, keepdims=True)
    mx, my, xx, yy, xy, bias, mae = sums.T
    variance_x, variance_y, covariance = xx - mx**2, yy - my**2, xy - mx * my
    # A resample of one person has no line; rounding leaves a little variance in it
    none = (variance_x < 1e-12 * x.var()) | (variance_y < 1e-12 * y.var())
    with np.errstate(invalid="ignore", divide="ignore"):
        slopes = np.where(none, np.nan, covariance / variance_x)
        r = np.where(none, np.nan, covariance / np.sqrt(variance_x * variance_y))
    return {"r": r, "slope": slopes, "bias": bias, "mae": mae}, (mx + origin[0], my + origin[1])
