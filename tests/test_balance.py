"""Rare values of covariates are drawn more often: by how much, and the same in any process, from any step."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import tiny_settings

from ldm3d.config.data import BalanceConfig
from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.data.balance import balanced_weights
from ldm3d.data.batches import TrainingBatches
from ldm3d.randomness import generator

SCHEMA = CovariateSchema(
    (Covariate("age", "continuous", "years", (0, 120)), Covariate("sex", "categorical", categories=("F", "M")))
)


def rows(**columns) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(values) for name, values in columns.items()})


def weights_of(table: pd.DataFrame, subjects=None, **settings) -> np.ndarray:
    settings = {"power": 1, "most": 100, **settings}
    return balanced_weights(table, BalanceConfig(**settings), subjects or [str(i) for i in range(len(table))], SCHEMA)


def test_with_power_one_all_categories_come_up_alike_and_with_zero_as_they_are():
    table = rows(sex=["F"] * 30 + ["M"] * 10)
    for power, ratio in ((1, 3), (0.5, 3**0.5), (0, 1)):
        weights = weights_of(table, by=["sex"], power=power)
        assert weights.mean() == pytest.approx(1) and weights[-1] / weights[0] == pytest.approx(ratio)


def test_numbers_are_counted_in_bins_and_missing_ones_are_average():
    table = rows(age=[20.0] * 6 + [21.0] * 2 + [80.0] * 2 + [np.nan])
    weights = weights_of(table, by=["age"], bins=10)
    assert weights[0] == weights[7] and weights[8] / weights[0] == pytest.approx(4)
    assert weights[-1] == pytest.approx(weights[:-1].mean())


def test_cells_may_be_text_as_the_cache_of_latents_has_them():
    typed = rows(age=[20.0, 20.0, 90.0, np.nan], sex=["F", "M", None, "F"])
    text = rows(age=["20.0", "20.0", "90.0", "n/a"], sex=["F", "M", "n/a", "F"])
    np.testing.assert_array_equal(weights_of(typed, by=["age", "sex"]), weights_of(text, by=["age", "sex"]))


def test_factors_multiply_and_no_weight_is_beyond_the_most():
    table = rows(age=[20.0] * 9 + [80.0], sex=["F"] * 9 + ["M"])
    assert weights_of(table, by=["age", "sex"])[-1] / weights_of(table, by=["age", "sex"])[0] == pytest.approx(81)
    capped = weights_of(table, by=["age", "sex"], most=5)
    assert capped[-1] / capped[0] == pytest.approx(5)


def test_a_person_counts_once():
    """Ten visits of one person do not make a category frequent."""
    table = rows(sex=["F"] * 10 + ["M"] * 2)
    weights = weights_of(table, ["a"] * 10 + ["b", "c"], by=["sex"])
    assert weights[0] / weights[-1] == pytest.approx(2)


def drawn(weights, subjects=None, epochs=1, world=1, first=0) -> list[int]:
    """The samples of so many epochs, in order; of all processes together."""
    size = 4
    parts = [TrainingBatches(None, len(weights), size, 1, 5, rank, world, subjects, weights) for rank in range(world)]
    turns = len(set(subjects)) if subjects else len(weights)
    return [i for step in range(first, epochs * turns // size) for i in parts[0].samples(step)]


def test_each_epoch_has_a_sample_as_often_as_its_weight_rounded():
    weights = [0.5] * 6 + [2.0, 3.0]  # mean 1
    once, often = Counter(drawn(weights)), Counter(drawn(weights, epochs=400))
    assert once[6] == 2 and once[7] == 3 and all(once[i] in (0, 1) for i in range(6)) and once.total() == 8
    for i, weight in enumerate(weights):
        assert often[i] / 400 == pytest.approx(weight, abs=0.08)
    assert drawn(weights, epochs=6)[32:] == drawn(weights, epochs=6, first=8)  # a run that goes on from step 8
    orders = drawn(weights, epochs=2)
    assert orders[:8] != orders[8:] and orders[:8] != sorted(orders[:8])


def test_equal_weights_are_a_permutation_and_none_are_the_order_of_before():
    assert sorted(drawn([1.0] * 8)) == list(range(8))
    plain = TrainingBatches(None, 8, 4, 1, 5)
    order = torch.randperm(8, generator=generator(5, 0)).tolist()
    assert [i for step in (0, 1) for i in plain.samples(step)] == order


def test_visits_take_turns_and_a_person_has_the_mean_weight():
    subjects = ["a", "a", "b", "c", "d"]
    counts = Counter(drawn([1.0, 3.0, 1.0, 0.5, 0.5], subjects, epochs=400))
    assert counts[0] + counts[1] == pytest.approx(800, abs=5) and abs(counts[0] - counts[1]) < 40


def test_balance_is_by_covariates(tmp_path, fails):
    settings = tiny_settings(tmp_path)
    settings["data"]["balance"] = {"by": ["agee"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "data.balance.by: 'agee' is no covariate; did you mean 'age'?" in fails("check", tmp_path / "config.yaml")
