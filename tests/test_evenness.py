"""Splits that are not alike are told, with figures; those that are alike are not."""

import numpy as np
import pandas as pd

from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.data.evenness import uneven_splits

SCHEMA = CovariateSchema((Covariate("age", "continuous", "years"), Covariate("sex", "categorical", categories=("F", "M"))))


def people(*groups) -> pd.DataFrame:
    """A row for each: (split, age, sex, how many); ages spread by 10 years."""
    rows = [
        {"subject": f"{split}{age}{sex}{i}", "split": split, "age": age + 10 * np.cos(np.pi * i), "sex": sex}
        for split, age, sex, count in groups
        for i in range(count)
    ]
    return pd.DataFrame(rows)


def test_alike_is_silent():
    scans = people(*[(split, 50, sex, 20) for split in ("train", "validation", "test") for sex in "FM"])
    assert uneven_splits(scans, SCHEMA) == {}


def test_a_difference_is_told_with_its_figures():
    scans = people(("train", 40, "F", 20), ("train", 40, "M", 20), ("test", 50, "F", 18), ("test", 50, "M", 2))
    assert uneven_splits(scans, SCHEMA) == {
        "age": "mean 40 in train, 50 in test",
        "sex": "F 50% in train, 90% in test",
    }


def test_a_category_that_is_never_held_out_is_told_and_few_people_tell_nothing():
    scans = people(("train", 40, "F", 10), ("validation", 40, "M", 6), ("test", 90, "M", 4))
    assert uneven_splits(scans, SCHEMA) == {"sex": "F 100% in train, 0% in validation"}


def test_visits_of_a_person_count_once_and_missing_values_not():
    scans = people(("train", 40, "F", 20), ("test", 40, "F", 6))
    again = scans[scans["split"] == "test"].iloc[:1]
    scans = pd.concat([scans, *[again.assign(age=90.0)] * 40, again.assign(subject="x", age=None)])
    assert uneven_splits(scans, SCHEMA) == {}
