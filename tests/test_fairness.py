"""Gaps between groups: planted ones are found, chance is not called a gap, small groups are not judged."""

import tracemalloc

import numpy as np
import pytest
import torch

from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.data.batches import generator
from ldm3d.evaluation import subgroups
from ldm3d.evaluation.fidelity import group_scores
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.subgroups import FEW, GAP, NO_GAP, SMALL_GAP, VolumeScores, gaps, groupings, label, labels_of, minus_real
from ldm3d.report.sections.evaluation import lights
from ldm3d.statistics.agreement import compare
from ldm3d.statistics.bootstrap import numbered

SCHEMA = CovariateSchema(
    (Covariate("age", "continuous", "years"), Covariate("sex", "categorical", categories=("F", "M", "O")))
)


def rows(n: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [{"age": float(rng.uniform(20, 80)), "sex": "FM"[i % 2]} for i in range(n)]


def judged(values, given, better="low", tolerance=0.1, people=None) -> VolumeScores:
    return VolumeScores("error", np.asarray(values, dtype=float), given, people or range(len(given)), better, tolerance)


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
    assert [gap.verdict for gap in found] == [SMALL_GAP, NO_GAP]
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


# The light of the page: an age is read off by regression, with r = 0.7 as honest regressors reach it


def read_off(shown: np.ndarray, rng: np.random.Generator, r: float = 0.7) -> np.ndarray:
    """What a regressor says of volumes that show these ages (those of the training set lie evenly from 20 to 80)."""
    return 50 + r**2 * (shown - 50) + r * (1 - r**2) ** 0.5 * 60 / 12**0.5 * rng.standard_normal(len(shown))


def evaluation(seed: int, shown=lambda age: age, requests: int = 200) -> Evaluation:
    """200 held-out people, and volumes for their ages that show what `shown` says."""
    rng, given = np.random.default_rng(seed), rows(200, seed)
    psnr_db, ssim = 30 + rng.standard_normal(200), 0.95 + 0.01 * rng.standard_normal(200)
    found = Evaluation(psnr_db, ssim, psnr_db, ssim, subjects=given, people=list(range(200)), order=list(range(200)))
    found.requests = [given[i % 200] for i in range(requests)]
    age, asked = (np.array([row["age"] for row in each]) for each in (given, found.requests))
    for kind, table, values, whom in (
        ("real", age, age, found.people),
        ("generated", asked, shown(asked), found.requested_people),
    ):
        found.comparisons.append(compare("age", kind, table, read_off(values, rng), whom))
    found.scores = group_scores(found)
    found.analyse_subgroups(SCHEMA)
    return found


def light(found: Evaluation) -> str:
    (goal,) = [goal for goal in lights(found) if goal.name == "Gaps between groups of people"]
    return goal.verdict[0]


def test_an_honest_ruler_and_a_perfect_model_have_no_gap():
    """Regression draws the old to the young: of the ruler's own rows a gap is seen, and no light counts it."""
    found = [evaluation(seed) for seed in range(4)]
    assert [light(each) for each in found].count("green") >= 3 and "red" not in map(light, found)
    own = {gap.figure: gap.verdict for gap in found[0].gaps if gap.grouping == "age"}
    assert own["age, real: bias"] == GAP and own["age, generated minus real: bias"] == NO_GAP


@pytest.mark.parametrize(
    "shown", [lambda age: age + 16 * (age > 60), lambda age: np.where(age > 60, 45, age), lambda age: np.full(len(age), 50.0)]
)
def test_a_model_that_is_off_for_the_old_or_does_not_follow_is_red(shown):
    found = evaluation(1, shown)
    by_age = {gap.figure: gap for gap in found.gaps if gap.grouping == "age"}["age, generated minus real: bias"]
    assert light(found) == "red" and by_age.verdict == GAP and "60 and more" in (by_age.worst, by_age.best)


def test_a_model_that_is_off_for_women_is_red():
    found = evaluation(2)
    women = 12.0 * np.array([row["sex"] == "F" for row in found.subjects])
    found.comparisons[1] = compare(
        "age", "generated", found.comparisons[1].reference, found.comparisons[1].measured + women, range(200)
    )
    found.scores = group_scores(found)
    found.analyse_subgroups(SCHEMA)
    assert light(found) == "red"


def test_generated_volumes_are_judged_beyond_the_real_ones_they_were_asked_for():
    np.testing.assert_array_equal(
        minus_real(np.array([5.0, 6, 7, np.nan]), np.array([1.0, np.nan]), [0, 1, 0, 0])[[0, 2]], [4, 6]
    )
    found = evaluation(3, requests=230)  # thirty people are asked for twice
    figure = {each.name: each for each in found.scores}["age, generated minus real: bias"]
    real, made = (c.error for c in found.comparisons)
    np.testing.assert_allclose(figure.values[200:], made[200:] - real[:30])
    assert list(figure.people) == [*range(200), *range(30)] and found.sources[201] == 1


# Random groupings, a block at a time


def all_at_once(values, labels, people, seed):
    """As it was: every random grouping in memory together."""
    unit = numbered(list(zip(people, labels)))
    sums, counts = np.bincount(unit, values), np.bincount(unit)
    group = np.empty(len(counts), dtype=int)
    group[unit] = numbered(labels)
    random = torch.rand(subgroups.PERMUTATIONS, len(group), generator=generator("fairness", seed, len(group)))
    inside = group[random.argsort(dim=1).numpy()][:, None] == np.arange(group.max() + 1)[:, None]
    return np.ptp((inside @ sums) / (inside @ counts), axis=1)


@pytest.mark.parametrize("block, kept", [(2**20, 2**24), (7 * 60 + 1, 2**24), (7 * 60 + 1, 0), (1, 0)])
def test_blocks_change_no_permutation(monkeypatch, block, kept):
    for name, value in (("PERMUTATIONS", 500), ("BLOCK", block), ("CACHED_ORDERS", kept)):
        monkeypatch.setattr(subgroups, name, value)
    subgroups._cached_orders.cache_clear()
    values, labels = np.random.default_rng(6).standard_normal(80), ["abc"[i % 3] for i in range(60)] + ["a"] * 20
    people = [*range(60), *range(20)]
    found = subgroups._chance(values, labels, people, 4)
    np.testing.assert_allclose(found, all_at_once(values, labels, people, 4), rtol=1e-12)
    subgroups._cached_orders.cache_clear()


def test_many_people_take_no_more_memory_than_few(monkeypatch):
    """3 groups of 3,000 people took 1 GB: all random groupings at once, and as floating-point numbers."""
    monkeypatch.setattr(subgroups, "PERMUTATIONS", 1000)  # a tenth of it
    monkeypatch.setattr(subgroups, "CACHED_ORDERS", 2**20)
    values, labels = np.random.default_rng(7).standard_normal(3000), ["abc"[i % 3] for i in range(3000)]
    tracemalloc.start()
    subgroups._chance(values, labels, range(3000), 0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 50 * 2**20
