"""Intervals against closed forms and explicit resamples; requests beyond training against planted ones."""

import numpy as np
import pytest
from scipy import stats

from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.errors import InputError
from ldm3d.evaluation.support import outside_training
from ldm3d.statistics.agreement import BAND, _resampled, agreement, compare
from ldm3d.statistics.bootstrap import interval, mean_interval, numbered, resamples


def test_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = np.random.default_rng(0).standard_normal(200)
    low, high = mean_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.08)
    assert low < values.mean() < high and mean_interval(values) == (low, high)


def test_scans_of_one_person_count_once():
    """Every value twice, by the same person: no more is known than before."""
    values, people = np.random.default_rng(1).standard_normal(60), list(range(60))
    once, twice = mean_interval(values, people), mean_interval(np.tile(values, 2), people * 2)
    assert twice == pytest.approx(once)
    low, high = mean_interval(np.tile(values, 2))
    assert (high - low) * 2**0.5 == pytest.approx(once[1] - once[0], rel=0.1)


def test_resamples_draw_people():
    weights = resamples(["b", "a", "b", "c"], samples=500)
    assert numbered(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(axis=1), 3)
    assert abs(weights.mean(axis=0) - 1).max() < 0.15


def test_an_interval_of_what_is_mostly_missing_is_missing():
    assert np.isnan(interval(np.array([1.0, np.nan] * 50))).all()
    assert np.isfinite(interval(np.r_[np.arange(95.0), [np.nan] * 5])).all()


def test_weighted_figures_are_those_of_the_resample_written_out():
    """Large values, little spread: what a sum of squares would lose."""
    rng = np.random.default_rng(2)
    a = 1e5 + rng.uniform(0, 10, 15)
    m = 0.7 * a + 3e4 + rng.standard_normal(15)
    weights = resamples(range(15), samples=1)
    drawn = np.repeat(np.arange(15), weights[0].astype(int))
    expected = agreement(a[drawn], m[drawn])
    found, means = _resampled(a, m, weights)
    for name in ("r", "slope", "bias", "mae"):
        assert found[name][0] == pytest.approx(getattr(expected, name), rel=1e-6), name
    assert [float(mean[0]) for mean in means] == pytest.approx([a[drawn].mean(), m[drawn].mean()])


def test_intervals_of_a_line_are_those_of_least_squares():
    rng = np.random.default_rng(3)
    a = rng.uniform(0, 100, 150)
    m = 0.8 * a + 5 + 6 * rng.standard_normal(150)
    found = compare("volume", "generated", a, m, range(150))
    line = stats.linregress(a, m)
    low, high = found.intervals["slope"]
    assert high - low == pytest.approx(2 * 1.96 * line.stderr, rel=0.15) and low < 0.8 < high
    r = stats.pearsonr(a, m).confidence_interval()
    assert found.intervals["r"] == pytest.approx((r.low, r.high), abs=0.015)
    assert found.intervals["bias"][0] < found.agreement.bias < found.intervals["bias"][1]
    places, below, above = found.band
    assert found.band.shape == (3, BAND) and (places[0], places[-1]) == (a.min(), a.max())
    fitted = line.intercept + line.slope * places
    assert (below < fitted).all() and (fitted < above).all()
    middle, end = np.argmin(abs(places - a.mean())), -1
    assert (above - below)[middle] == pytest.approx(2 * 1.96 * 6 / 150**0.5, rel=0.15)
    assert (above - below)[end] > 1.5 * (above - below)[middle]


def test_pairs_with_a_missing_value_are_left_out_and_the_others_know_their_volume():
    found = compare("age", "real", [60, None, 70, 65, 50.0], [61, 30, np.nan, 66, 52], "vwxyz")
    assert found.volumes.tolist() == [0, 3, 4] and found.error.tolist() == [1, 1, 2]
    values = found.to_dict()
    assert values["n"] == 3 and values["bias"] == pytest.approx(4 / 3) and values["bias_low"] <= values["bias_high"]
    with pytest.raises(InputError, match="needs 3"):
        compare("age", "real", [60, None, 70], [61, 2, 3], "xyz")


@pytest.fixture
def known():
    """People whose ventricles follow their age closely, and the schema fitted on them."""
    rng = np.random.default_rng(4)
    age = rng.uniform(20, 90, 300)
    rows = [{"age": a, "ml": 0.8 * a + 3 * e, "sex": "F"} for a, e in zip(age, rng.standard_normal(300))]
    covariates = (
        Covariate("age", "continuous", "years"),
        Covariate("ml", "continuous", "ml"),
        Covariate("sex", "categorical", categories=("F", "M")),
    )
    return CovariateSchema(covariates).fit(rows), rows


def test_requests_beyond_training(known):
    """Too old; an old brain in a young head, which is within both ranges; two that are as all are; half a request."""
    schema, rows = known
    asked = [(110, 60), (25, 65), (50, 40), (80, 64), (25, None)]
    requests = [{"age": a, "ml": None if v is None else float(v), "sex": None} for a, v in asked]
    found = outside_training(schema, requests, rows)
    assert [each.number for each in found] == [0, 1]
    assert "training range" in found[0].reason and "age, ml together" in found[1].reason
    assert [each.number for each in outside_training(schema, requests, None)] == [0]


def test_one_in_a_hundred_of_the_training_volumes_is_called_beyond(known):
    schema, rows = known
    assert len(outside_training(schema, rows, rows)) == 3
