"""Regression of covariates on features, and what synthetic volumes are worth to it, where the answer is known."""

import numpy as np
import pytest
import torch

from ldm3d.errors import InputError
from ldm3d.evaluation.utility import downstream_utility
from ldm3d.report.page import GREEN, RED
from ldm3d.report.sections.regression import utility_light
from ldm3d.rulers.regression import TrainingFeatures, _left_out, fit_predictor, fit_ridge, together

WEIGHTS = np.array([3.0, -2.0, 0.5, 0, 0, 0])


def people(n: int, seed: int, noise: float = 0.1, shift: float = 0.0):
    """Features whose scales differ by far, and a value that follows from them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 6))
    return (x + shift) * [1, 100, 0.01, 1, 1, 1], 50 + x @ WEIGHTS + noise * rng.standard_normal(n)


def test_ridge_finds_a_linear_function_whatever_the_scales():
    ridge = fit_ridge(*people(80, 0))
    features, values = people(50, 1, noise=0)
    assert abs(ridge(features) - values).max() < 0.2
    np.testing.assert_allclose(ridge.weights, WEIGHTS * ridge.deviation / [1, 100, 0.01, 1, 1, 1], atol=0.08)


def test_ridge_says_the_mean_where_nothing_is_to_be_learnt():
    rng = np.random.default_rng(2)
    ridge = fit_ridge(rng.standard_normal((60, 40)), rng.standard_normal(60) + 70)
    found = ridge(rng.standard_normal((100, 40)))
    assert ridge.penalty >= 100 and found.std() < 0.4 and abs(found.mean() - 70) < 0.4


def test_errors_of_people_left_out_are_those_of_fits_without_them():
    rng = np.random.default_rng(3)
    x, y, penalty, own = rng.standard_normal((12, 4)), rng.standard_normal(12), 0.7, [2, 5]
    x -= x.mean(axis=0)

    def fit(a, b):
        """Ridge with an offset that is not penalised."""
        design = np.c_[np.ones(len(a)), a]
        return np.linalg.solve(design.T @ design + penalty * np.diag([0, 1, 1, 1, 1]), design.T @ b)

    hat = np.c_[np.ones(12), x] @ np.stack([fit(x, e) for e in np.eye(12)], axis=1)
    found = _left_out((y - hat @ y)[own], hat[np.ix_(own, own)])
    others = np.delete(np.arange(12), own)
    expected = y[own] - np.c_[np.ones(2), x[own]] @ fit(x[others], y[others])
    np.testing.assert_allclose(found, expected)


def test_two_scans_of_a_person_do_not_vouch_for_each_other():
    """Features that name the person and say nothing of age: a fit that has the other scan of everybody looks perfect."""
    rng = np.random.default_rng(4)
    features, values = rng.standard_normal((40, 60)), rng.standard_normal(40)
    twice = np.tile(features, (2, 1)) + 0.01 * rng.standard_normal((80, 60)), np.tile(values, 2)
    assert fit_ridge(*twice).penalty < 1
    assert fit_ridge(*twice, list(range(40)) * 2).penalty >= 100


def test_ridge_refuses_what_nothing_can_be_learnt_from():
    features, values = people(19, 5)
    with pytest.raises(InputError, match="needs 20"):
        fit_ridge(features, values)
    with pytest.raises(InputError, match="vary"):
        fit_ridge(np.ones((30, 3)), np.ones(30))


def brightness(volumes: torch.Tensor) -> torch.Tensor:
    return torch.stack([volumes.mean(dim=(1, 2, 3, 4)), volumes[:, 0, 0, 0, 0]], dim=1)


def test_predictor_reads_a_covariate_off_volumes_and_leaves_out_what_is_too_rare():
    """The age is the brightness; the score of five people is too little to learn from."""
    rng = np.random.default_rng(6)
    age = rng.uniform(20, 80, 60)
    rows = [{"age": a, "score": 1.0 if i < 5 else None} for i, a in enumerate(age)]
    corner = rng.uniform(0, 1, 60)  # reconstructions are darker and differ in the corner, which is not to be taken for youth
    real, again = np.stack([age / 100, corner], axis=1), np.stack([age / 100 - 0.1, corner - 5], axis=1)
    learnt = TrainingFeatures(real, again, rows, list(range(60)))
    with pytest.warns(UserWarning, match="score is not predicted"):
        predictor = fit_predictor(learnt, ["age", "score"], brightness)
    volume = np.full((4, 4, 4), 0.6, np.float32)
    assert list(predictor(volume, (1, 1, 1))) == ["age"]
    volume[0, 0, 0] = 0.5
    assert predictor(volume, (1, 1, 1))["age"] == pytest.approx(60, abs=2)
    smooth = np.full((4, 4, 4), 0.5, np.float32)
    smooth[0, 0, 0] = -4.5
    assert predictor(smooth, (1, 1, 1))["age"] == pytest.approx(60, abs=10)


def test_measures_together():
    both = together(lambda v, s: {"age": 1.0, "ml": 2.0}, lambda v, s: {"ml": 3.0})
    assert both(np.zeros(3), (1, 1, 1)) == {"age": 1.0, "ml": 3.0}


def test_synthetic_volumes_that_are_like_real_ones_are_as_good():
    found = downstream_utility("age", people(60, 7, 1), people(80, 8, 1), people(50, 9, 1), range(50), repeats=5)
    assert found.volumes == {"real": 48, "synthetic": 48, "both": 96} and found.tested == 50
    low, high = found.ratio_intervals["synthetic"]
    assert low < 1.1 and high > 0.9 and found.ratio["synthetic"] == pytest.approx(1, abs=0.15)
    assert found.mae["both"] < found.mae["real"] * 1.02
    assert found.mae["real"] == pytest.approx((2 / np.pi) ** 0.5, rel=0.25)  # of the noise, which nothing can predict
    assert found.intervals["real"][0] < found.mae["real"] < found.intervals["real"][1]


def test_synthetic_volumes_that_do_not_show_their_label_are_of_no_use():
    features, values = people(80, 10)
    shuffled = features, np.random.default_rng(11).permutation(values)
    found = downstream_utility("age", people(60, 7), shuffled, people(50, 9), range(50), repeats=5)
    assert found.ratio_intervals["synthetic"][0] > 5
    assert found.ratio["both"] > 1.2


def test_too_few_volumes_to_learn_from():
    with pytest.raises(InputError, match=r"24 training scans with age, and 25 are needed.*leave --downstream out"):
        downstream_utility("age", people(24, 0), people(60, 1), people(10, 2), range(10))
    with pytest.raises(InputError, match=r"24 volumes were generated .* --num generates more"):
        downstream_utility("age", people(60, 0), people(24, 1), people(10, 2), range(10))
    with pytest.raises(InputError, match="no held-out scan has age"):
        downstream_utility("age", people(60, 0), people(60, 1), people(0, 2), range(10))


def test_the_light_of_usefulness_with_the_default_number_of_volumes():
    """Synthetic volumes drawn as real ones are: green. Labels that have nothing to do with the volumes: red."""
    made = people(200, 8, 1)
    shuffled = made[0], np.random.default_rng(0).permutation(made[1])
    good, bad = (
        utility_light(downstream_utility("age", people(200, 7, 1), synthetic, people(200, 9, 1), range(200)))
        for synthetic in (made, shuffled)
    )
    assert good.verdict[0] == GREEN and bad.verdict[0] == RED
