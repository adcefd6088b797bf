"""How often each training sample is drawn, so that rare ages, sites or other values of covariates are seen more often."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm3d.config.data import BalanceConfig
from ldm3d.covariates import Covariate, CovariateSchema


def balanced_weights(rows: pd.DataFrame, config: BalanceConfig, subjects: Sequence[str], schema: CovariateSchema) -> NDArray:
    """How often each sample is drawn in an epoch on average, (N,), with mean 1.

    The weight is a product over covariates: (people in the sample's bin or category, relative to their mean over all of
    these)^-power, at most `most` times the smallest. Where a value is missing, its factor is the mean of the others'.

    Args:
        rows: covariates of the training samples: numbers with NaN and categories with None, or all as text.
        config: by which covariates, and how much.
        subjects: of each sample. A person counts once, whatever the number of visits.
        schema: of the covariates.
    """
    weights = np.ones(len(rows))
    visits = pd.Series(subjects).map(pd.Series(subjects).value_counts()).to_numpy()
    for name in config.by:
        cell = _cells(rows[name], schema[name], config.bins)
        there = cell >= 0
        if not there.any():
            continue
        people = np.bincount(cell[there], weights=1 / visits[there])
        factor = (np.maximum(people, 1e-9) / people[people > 0].mean()) ** -config.power
        own = np.full(len(rows), np.nan)
        own[there] = factor[cell[there]]
        weights *= np.where(there, own, np.nanmean(own))
    weights = np.minimum(weights, config.most * weights.min())
    return weights / weights.mean()


def _cells(values: Iterable, covariate: Covariate, bins: int) -> NDArray:
    """The bin of each number (of equal width, over all values), or the number of each category; -1 where it is missing."""
    parsed = [covariate.parse(value) for value in values]
    if covariate.kind == "categorical":
        return np.array([covariate.categories.index(value) if value in covariate.categories else -1 for value in parsed])
    numbers = np.array(parsed, dtype=float)  # None is NaN
    there = np.isfinite(numbers)
    cells = np.full(len(numbers), -1)
    if there.any():
        low, high = numbers[there].min(), numbers[there].max()
        cells[there] = np.minimum((numbers[there] - low) / max(high - low, 1e-12) * bins, bins - 1).astype(int)
    return cells
