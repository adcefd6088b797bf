"""Whether people held out are like those that train: covariates by split, as standardised differences."""

import numpy as np
import pandas as pd

from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.data.splits import TEST, TRAIN, VALIDATION

UNEVEN = 0.5  # standard deviations; what is called a medium effect
FEWEST = 5  # known values in a split, for a difference to be told


def uneven_splits(scans: pd.DataFrame, schema: CovariateSchema) -> dict[str, str]:
    """Covariate -> how a held-out split differs from the training split, for those that differ by more than UNEVEN.

    Args:
        scans: a row for each, with the columns `subject`, `split` and one for each covariate; the first row of a person
            counts.
        schema: the covariates.
    """
    people = scans.drop_duplicates("subject")
    found = {}
    for covariate in schema:
        values = {split: people.loc[people["split"] == split, covariate.name].dropna() for split in (TRAIN, VALIDATION, TEST)}
        for split in (VALIDATION, TEST):
            if min(len(values[TRAIN]), len(values[split])) >= FEWEST:
                text = _difference(covariate, values[TRAIN], values[split], split)
                if text:
                    found.setdefault(covariate.name, text)
    return found


def _difference(covariate: Covariate, train: pd.Series, held: pd.Series, split: str) -> str:
    """What differs by more than UNEVEN, in words; "" where nothing does."""
    if covariate.kind == "continuous":
        if abs(_standardised(train.to_numpy(float), held.to_numpy(float))) <= UNEVEN:
            return ""
        return f"mean {train.mean():.3g} in {TRAIN}, {held.mean():.3g} in {split}"
    for category in covariate.categories:
        one, other = (train == category).to_numpy(float), (held == category).to_numpy(float)
        if abs(_standardised(one, other)) > UNEVEN:
            return f"{category} {one.mean():.0%} in {TRAIN}, {other.mean():.0%} in {split}"
    return ""


def _standardised(one: np.ndarray, other: np.ndarray) -> float:
    """Difference of the means in units of the mean standard deviation; infinite where neither varies and they differ."""
    deviation, difference = np.sqrt((one.var() + other.var()) / 2), one.mean() - other.mean()
    return difference / deviation if deviation else np.copysign(np.inf, difference) if difference else 0.0
