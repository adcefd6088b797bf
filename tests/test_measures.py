"""Intervals that hold what they should, nulls of real against real, and verdicts; on Gaussians with known answers."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch

from ldm3d.errors import InputError
from ldm3d.evaluation.distribution import rbf_mmd
from ldm3d.evaluation.measures import AS_REAL, CLOSER, MEASURES, UNDECIDED, WORSE, Finding, Measure, compare, compare_pairs

BANDWIDTH = 2.0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found(figures: list[Finding]) -> dict[str, Finding]:
    return {figure.name: figure for figure in figures}


MMD = Measure(
    "", "features", "low", lambda pair: rbf_mmd(pair.real, pair.other, BANDWIDTH), "", ""
)  # with a width of its own, so that its expectation is known


def test_intervals_hold_the_known_mmd_of_two_gaussians_in_95_percent_of_repeats():
    """See test_distribution.py for the closed form; the estimator is unbiased, so its interval must hold it."""
    shift = torch.tensor([1.0, 0.0], dtype=torch.float64)
    width = BANDWIDTH**2 + 2
    exact = 2 * BANDWIDTH**2 / width * (1 - math.exp(-1 / (2 * width)))
    holds, values, repeats = 0, [], 200
    for i in range(repeats):
        (figure,) = compare(
            normal(60, 2, seed=2 * i), normal(60, 2, seed=2 * i + 1) + shift, splits=40, seed=i, measures={"m": MMD}
        )
        holds += figure.low <= exact <= figure.high
        values.append(figure.value)
    assert 0.91 <= holds / repeats <= 0.985
    assert abs(np.mean(values) - exact) < 3 * np.std(values) / math.sqrt(repeats)


def test_real_against_real_is_seldom_worse_than_real():
    """All measures on 15 pairs of samples of one distribution; and a shift that every measure must see."""
    worse, alike, repeats = 0, 0, 15
    for i in range(repeats):
        figures = compare(normal(100, 6, seed=2 * i), normal(100, 6, seed=2 * i + 1), splits=40, seed=i)
        worse += sum(figure.verdict in (WORSE, CLOSER) for figure in figures)
        alike += sum(figure.verdict == AS_REAL for figure in figures)
    assert worse <= 0.02 * repeats * len(figures) and alike >= 0.7 * repeats * len(figures)
    off = compare(normal(100, 6), normal(100, 6, seed=1) + 1.5, splits=40)
    assert {figure.name for figure in off if figure.verdict != WORSE} == set()


def test_bias_by_the_number_of_volumes_is_in_both():
    """64 features: the distance of one distribution to itself is far from 0, and no verdict comes of it."""
    for n in (40, 120):
        figure = found(compare(normal(n, 64), normal(n, 64, seed=1), splits=40))["frechet"]
        assert figure.null_low > 10 and figure.verdict in (AS_REAL, UNDECIDED)
        assert (figure.real, figure.synthetic) == (n // 2, n // 2)


def test_what_goes_wrong_moves_its_measure():
    real = torch.cat([normal(80, 4), normal(80, 4, seed=1) + 6])
    one_mode = found(compare(real, normal(160, 4, seed=2), splits=40))
    assert one_mode["recall"].verdict == one_mode["coverage"].verdict == WORSE
    assert one_mode["precision"].verdict != WORSE and one_mode["nearest_ratio"].verdict != WORSE
    copies = found(compare(real, real + 0.01 * normal(160, 4, seed=3), splits=40))
    assert copies["nearest_ratio"].verdict == WORSE and copies["nearest_ratio"].value < 0.7
    assert copies["frechet"].verdict != WORSE and copies["precision"].verdict != WORSE
    wide = found(compare(real, 2 * real[torch.randperm(160)] - 3, splits=40))
    assert wide["precision"].verdict == wide["nearest_ratio"].verdict == WORSE and wide["nearest_ratio"].value > 1.2


def test_same_seed_same_figures():
    real, synthetic = normal(30, 3), normal(25, 3, seed=1)
    assert compare(real, synthetic, splits=10) == compare(real, synthetic.numpy(), splits=10)
    assert compare(real, synthetic, splits=10) != compare(real, synthetic, splits=10, seed=1)


@pytest.mark.parametrize("real, synthetic, sizes", [(40, 30, (20, 15)), (31, 90, (15, 16)), (41, 41, (20, 20))])
def test_numbers_of_volumes_are_the_same_in_the_null(monkeypatch, real, synthetic, sizes):
    seen = set()
    spy = Measure("", "features", "low", lambda pair: seen.add((len(pair.real), len(pair.other))) or 0.0, "", "")
    (figure,) = compare(normal(real, 2), normal(synthetic, 2), splits=5, measures={"spy": spy})
    assert seen == {sizes} == {(figure.real, figure.synthetic)}


def test_all_scans_of_a_subject_stay_on_one_side():
    people = [i // 3 for i in range(60)]
    real = torch.tensor(people, dtype=torch.float64)[:, None] * torch.ones(2)
    overlaps, sizes = [], []

    def spy(pair):
        overlaps.append(set(pair.real[:, 0].tolist()) & set(pair.other[:, 0].tolist()))
        sizes.append((len(pair.real), len(pair.other)))
        return 0.0

    measure = {"spy": Measure("", "features", "low", spy, "", "")}
    compare(real, normal(60, 2) + 1000, subjects=people, splits=20, measures=measure)
    assert not any(overlaps) and set(sizes) == {(30, 28)}
    compare(real, normal(60, 2) + 1000, splits=5, measures=measure)
    assert any(overlaps)  # the same scans taken for as many subjects
    with pytest.raises(InputError, match="one subject has 30 of 32"):
        compare(normal(32, 2), normal(32, 2), subjects=[0] * 30 + [1, 2])
    with pytest.raises(InputError, match="2 subjects are given for 32"):
        compare(normal(32, 2), normal(32, 2), subjects=[0, 1])


@pytest.mark.parametrize(
    "direction, value, verdict",
    [
        ("low", 5.0, WORSE),
        ("low", 0.5, CLOSER),
        ("high", 5.0, CLOSER),
        ("high", 0.5, WORSE),
        ("real", 5.0, WORSE),
        ("real", 0.5, WORSE),
        ("low", 2.0, AS_REAL),
        ("low", 2.9, UNDECIDED),
    ],
)
def test_verdicts(direction, value, verdict):
    figure = Finding("x", value, value - 0.7, value + 0.7, 1.0, 3.0, direction, 60, 50)
    assert figure.verdict == verdict
    if verdict == AS_REAL:
        assert dataclasses.replace(figure, synthetic=49).verdict == UNDECIDED  # too few to say so
        assert dataclasses.replace(figure, high=3.6).verdict == UNDECIDED  # too uncertain
    assert json.loads(json.dumps(figure.to_dict())) == {**dataclasses.asdict(figure), "verdict": verdict}


def test_every_measure_of_the_table_computes_and_says_where_it_comes_from():
    rows = {
        "features": normal(40, 5),
        "maps": normal(40, 20),
        "probabilities": torch.softmax(normal(40, 4), dim=1),
    }
    figures = [figure for kind, x in rows.items() for figure in compare(x, x.flip(0), kind, splits=3)]
    volumes = torch.rand(8, 12, 12, 12).numpy()
    figures += compare_pairs(volumes, volumes)
    assert [figure.name for figure in figures] == list(MEASURES)
    for figure in figures:
        values = (figure.value, figure.low, figure.high, figure.null_low, figure.null_high)
        assert np.isfinite(values).all() and figure.low <= figure.value <= figure.high, figure.name
        assert (
            MEASURES[figure.name].title
            and MEASURES[figure.name].says
            and any(map(str.isdigit, MEASURES[figure.name].reference))
        )
    with pytest.raises(InputError, match="no measure looks at 'voxels'"):
        compare(normal(40, 5), normal(40, 5), "voxels")
    with pytest.raises(InputError, match="11 real volumes are too few; give 12"):
        compare(normal(11, 5), normal(40, 5))


def same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A similarity s with log(1 - s) the mean of both volumes: of pairs of independent numbers, of known distribution."""
    return 1 - ((one.mean(dim=(1, 2, 3, 4)) + other.mean(dim=(1, 2, 3, 4))) / 2).exp()


PAIRS = {"mean": Measure("", "volumes", "real", same, "", "")}


def test_pairs_hold_the_known_mean_and_seldom_differ_without_cause():
    """log(1 - s) of a pair of N(0, 1) is N(0, 1/2): intervals must hold s = 0, and like volumes seldom come out as unlike."""
    holds, apart, repeats = 0, 0, 200
    for i in range(repeats):
        real, synthetic = (normal(n, 1, 1, 1, seed=3 * i + k).numpy() for k, n in enumerate((24, 16)))
        (figure,) = compare_pairs(real, synthetic, seed=i, measures=PAIRS)
        assert (figure.real, figure.synthetic) == (12, 8)
        holds += figure.low <= 0 <= figure.high
        apart += figure.verdict == WORSE
    assert 0.91 <= holds / repeats <= 0.985 and 0.015 <= apart / repeats <= 0.09
    real, synthetic = normal(40, 1, 1, 1).numpy(), normal(40, 1, 1, 1, seed=1).numpy() + 2
    assert compare_pairs(real, synthetic, measures=PAIRS)[0].verdict == WORSE


def test_pairs_are_of_different_volumes_and_of_different_subjects():
    used = []

    def spy(one, other):
        used.append((one.item(), other.item()))
        return one.flatten()

    volumes = np.arange(30.0).reshape(30, 1, 1, 1)
    measure = {"spy": Measure("", "volumes", "real", spy, "", "")}
    compare_pairs(volumes, volumes + 100, subjects=[i // 10 for i in range(30)], pairs=9, measures=measure)
    real, synthetic = ([p for p in used if (p[0] >= 100) == late] for late in (False, True))
    assert len(synthetic) == 9 and 2 <= len(real) <= 9
    assert len({v for pair in used for v in pair}) == 2 * len(used)
    assert all(a // 10 != b // 10 for a, b in real)
    with pytest.raises(InputError, match="3 synthetic volumes make 1 pairs"):
        compare_pairs(volumes, volumes[:3], measures=measure)


@pytest.mark.slow
def test_a_thousand_volumes_of_512_features_in_a_minute():
    started = time.process_time()  # on one core, whatever else the machine does
    figures = compare(normal(1000, 512), normal(1000, 512, seed=1))
    assert time.process_time() - started < 60
    assert len(figures) == sum(measure.kind == "features" for measure in MEASURES.values())
    assert not [figure for figure in figures if figure.verdict in (WORSE, CLOSER)]
