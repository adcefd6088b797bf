"""Gaps between groups: planted ones are found, chance is not called a gap, small groups are not judged."""

import numpy as np
import pytest

from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.evaluation.fairness import FEW, GAP, NONE, SMALL, Judged, gaps, groupings, label, labels_of

SCHEMA = CovariateSchema(
    (Covariate("age", "continuous", "years"), Covariate("sex", "categorical", categories=("F", "M", "O")))
)


def rows(n: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [{"age": float(rng.uniform(20, 80)), "sex": "FM"[i % 2]} for i in range(n)]


def judged(values, given, better="low", tolerance=0.1, people=None) -> Judged:
    return Judged("error", np.asarray(values, dtype=float), given, people or range(len(given)), better, tolerance)


def test_bands_are_thirds_of_the_people_and_have_names():
    given = [{"age": float(age), "sex": None} for age in range(21, 81)]
    bands = groupings(SCHEMA, given)
    assert bands == {"age": [41.0, 60.0], "sex": []}
    age = SCHEMA["age"]
    names = ["below 41", "41 to 60", "60 and more"]
    assert labels_of(age, bands["age"]) == names and labels_of(SCHEMA["sex"], []) == ["F", "M", "O"]
    assert [label(age, bands["age"], value) for value in (40.9, 41, 59.9, 60, None)] == [*names[:2], *names[1:], None]
    counts = [sum(label(age, bands["age"], row["age"]) == name for row in given) for name in names]
    assert counts == [20, 19, 21]


@pytest.mark.parametrize("better, worst", [("low", "M"), ("high", "F"), ("neither", "M")])
def test_a_planted_gap_is_found_with_its_size_and_sign(better, worst):
    """Men get 3 more: worse if low is better. Of a figure with a sign, the larger one comes first."""
    given = rows(120)
    values = np.random.default_rng(1).standard_normal(120) + np.array([3.0 * (row["sex"] == "M") for row in given])
    (gap,) = gaps(SCHEMA, {"sex": []}, [judged(values, given, better)])
    means = [values[i::2].mean() for i in range(2)]
    assert gap.worst == worst and gap.gap == pytest.approx(abs(means[1] - means[0])) and gap.low < 3 < gap.high
    assert gap.high - gap.low == pytest.approx(2 * 1.96 * (2 / 60) ** 0.5, rel=0.15)
    by_chance = 1.96 * values.std(ddof=1) * (2 / 60) ** 0.5
    assert gap.verdict == GAP and gap.chance == pytest.approx(by_chance, rel=0.05)
    assert [(group.label, group.n) for group in gap.groups] == [("F", 60), ("M", 60)]


def test_a_certain_gap_within_the_tolerance_is_small_and_chance_is_none_or_unknown():
    given = rows(400)
    noise = np.random.default_rng(2).standard_normal(400)
    shifted = 0.1 * noise + np.array([0.2 * (row["sex"] == "M") for row in given])
    found = gaps(SCHEMA, {"sex": []}, [judged(shifted, given, tolerance=0.5), judged(noise, given, tolerance=1.0)])
    assert [gap.verdict for gap in found] == [SMALL, NONE]
    (few,) = gaps(SCHEMA, {"sex": []}, [judged(noise[:40], given[:40], tolerance=0.1)])
    assert few.verdict == FEW


def test_chance_makes_few_gaps():
    """60 pairs of tables, of 3 rows each, without any gap: one in twenty has one, after the correction for six."""
    rng, alarms = np.random.default_rng(3), 0
    given = rows(60)
    bands = groupings(SCHEMA, given)
    for seed in range(60):
        figures = [judged(rng.standard_normal(60), given, tolerance=0) for _ in range(3)]
        alarms += any(gap.verdict == GAP for gap in gaps(SCHEMA, bands, figures, seed=seed))
    assert alarms <= 8  # 3 expected; more than 8 have a chance of 1 in 200


def test_probabilities_are_corrected_by_holm():
    given = rows(60)
    base = np.random.default_rng(4).standard_normal(60)
    male = np.array([float(row["sex"] == "M") for row in given])
    found = gaps(SCHEMA, {"sex": []}, [judged(base + shift * male, given) for shift in (0.4, 0.6, 2.0)])
    p = [gap.p for gap in found]
    assert p[2] < p[1] < p[0]
    two = max(3 * p[2], 2 * p[1])
    assert [gap.p_corrected for gap in found] == pytest.approx([max(two, p[0]), two, 3 * p[2]])


def test_small_groups_are_shown_and_not_judged():
    given = [*rows(40), *({"age": 50.0, "sex": "O"} for _ in range(9))]
    values = np.r_[np.random.default_rng(5).standard_normal(40), [50.0] * 9]
    (gap,) = gaps(SCHEMA, {"sex": []}, [judged(values, given)])
    assert gap.groups[-1].label == "O" and "O" not in (gap.worst, gap.best) and gap.gap < 5
    (alone,) = gaps(SCHEMA, {"sex": []}, [judged(values[:12], given[:12])])
    assert alone.verdict == FEW and np.isnan(alone.gap) and len(alone.groups) == 2


def test_people_count_and_not_their_scans():
    """Ten scans each of six people are too few people to judge by."""
    given = rows(60)
    (gap,) = gaps(
        SCHEMA, {"sex": []}, [judged(np.ones(60), given, people=[f"{row['sex']}{i % 6}" for i, row in enumerate(given)])]
    )
    assert gap.verdict == FEW and [group.people for group in gap.groups] == [3, 3]
