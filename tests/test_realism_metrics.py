"""Intervals that hold what they should, nulls of real against real, and verdicts; on Gaussians with known answers."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch

from ldm3d.errors import InputError
from ldm3d.evaluation.realism_metrics import REALISM_METRICS, Metric
from ldm3d.evaluation.realism_pairs import diversity_metrics
from ldm3d.evaluation.realism_sets import distribution_metrics
from ldm3d.metrics.distances import rbf_mmd
from ldm3d.statistics.equivalence import BEYOND, CLOSER, FEW, WITHIN, Finding

BANDWIDTH = 2.0


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found(figures: list[Finding]) -> dict[str, Finding]:
    return {figure.name: figure for figure in figures}


MMD = Metric(
    "", "features", "low", lambda pair: rbf_mmd(pair.real, pair.other, BANDWIDTH), "", ""
)  # with a width of its own, so that its expectation is known


def test_intervals_hold_the_known_mmd_of_two_gaussians_in_95_percent_of_repeats():
    """See test_distribution.py for the closed form; the estimator is unbiased, so its interval must hold it."""
    shift = torch.tensor([1.0, 0.0], dtype=torch.float64)
    width = BANDWIDTH**2 + 2
    exact = 2 * BANDWIDTH**2 / width * (1 - math.exp(-1 / (2 * width)))
    holds, values, repeats = 0, [], 100
    for i in range(repeats):
        (figure,) = distribution_metrics(
            normal(60, 2, seed=2 * i), normal(60, 2, seed=2 * i + 1) + shift, splits=60, seed=i, metrics={"m": MMD}
        )
        holds += figure.low <= exact <= figure.high
        values.append(figure.value)
    assert 0.91 <= holds / repeats <= 0.985
    assert abs(np.mean(values) - exact) < 3 * np.std(values) / math.sqrt(repeats)


def test_real_against_real_is_seldom_called_unlike():
    """All measures on 8 pairs of samples of one distribution; and a shift that every measure of unlikeness must see."""
    alarms, alike, repeats = 0, 0, 8
    for i in range(repeats):
        figures = distribution_metrics(normal(200, 6, seed=2 * i), normal(200, 6, seed=2 * i + 1), splits=40, seed=i)
        alarms += sum(figure.verdict in (BEYOND, CLOSER) for figure in figures)
        deciding = [figure.verdict for figure in figures if REALISM_METRICS[figure.name].decides]
        alike += deciding == [WITHIN] * 5
    assert alarms <= 0.02 * repeats * len(figures) and alike >= 6
    off = distribution_metrics(normal(200, 6), normal(200, 6, seed=1) + 1.5, splits=40)
    assert {figure.name for figure in off if figure.verdict != BEYOND} == {"spread"}


def test_fewer_volumes_never_make_it_easier():
    """A tenth too little spread is the margin itself: at any number, one repeat in twenty at most says it lies within."""
    within = {n: 0 for n in (20, 100, 300)}
    for n in within:
        for i in range(20):
            real, synthetic = normal(n, 6, seed=2 * i), 0.9 * normal(n, 6, seed=2 * i + 1)
            (figure,) = distribution_metrics(real, synthetic, splits=15, seed=i, metrics={"spread": REALISM_METRICS["spread"]})
            within[n] += figure.verdict == WITHIN
            assert figure.margin == pytest.approx(0.1, abs=0.02)
    assert within[20] == 0 and max(within.values()) <= 4  # 1 expected; more than 4 have a chance of 1 in 400


def test_margins_of_distances_do_not_depend_on_the_number_of_volumes():
    """A shift by a quarter of the spread adds its square to the Fréchet distance: of 6 features of variance 1, 6 / 16."""
    for n in (60, 600):
        figures = found(distribution_metrics(normal(n, 6), normal(n, 6, seed=1), splits=20))
        assert figures["frechet"].margin == pytest.approx(6 / 16, rel=0.25)
        assert figures["rbf_mmd"].margin == pytest.approx(0.018, rel=0.3)


def test_how_many_volumes_would_tell():
    few = Finding("x", 2.0, 1.3, 2.7, 1.0, 3.0, 0.0, -0.4, 0.4, 0.2, "real", 30, 30)
    assert few.verdict == FEW and few.needed == 120  # twice as wide as it may be
    assert dataclasses.replace(few, excess=0.2, excess_low=-0.2, excess_high=0.6).needed is None  # on the margin itself
    assert dataclasses.replace(few, excess_low=-0.1, excess_high=0.1).needed == 50  # narrow enough, and too few to trust
    assert dataclasses.replace(few, excess_low=-0.1, excess_high=0.1, real=60, synthetic=60).needed is None


def test_bias_by_the_number_of_volumes_is_in_both():
    """64 features: the distance of one distribution to itself is far from 0, and no verdict comes of it."""
    for n in (40, 120):
        figure = found(distribution_metrics(normal(n, 64), normal(n, 64, seed=1), splits=40))["frechet"]
        assert figure.null_low > 10 and figure.verdict in (WITHIN, FEW)
        assert (figure.real, figure.synthetic) == (n // 2, n // 2)


def test_what_goes_wrong_moves_its_measure():
    real = torch.cat([normal(80, 4), normal(80, 4, seed=1) + 6])
    one_mode = found(distribution_metrics(real, normal(160, 4, seed=2), splits=40))
    assert one_mode["recall"].verdict == one_mode["coverage"].verdict == BEYOND
    assert one_mode["precision"].verdict != BEYOND and one_mode["nearest_ratio"].verdict != BEYOND
    copies = found(distribution_metrics(real, real + 0.01 * normal(160, 4, seed=3), splits=40))
    assert copies["nearest_ratio"].verdict == BEYOND and copies["nearest_ratio"].value < 0.7
    assert copies["frechet"].verdict != BEYOND and copies["precision"].verdict != BEYOND
    wide = found(distribution_metrics(real, 2 * real[torch.randperm(160)] - 3, splits=40))
    assert wide["precision"].verdict == wide["nearest_ratio"].verdict == BEYOND and wide["nearest_ratio"].value > 1.2


def test_same_seed_same_figures():
    real, synthetic = normal(30, 3), normal(25, 3, seed=1)
    assert distribution_metrics(real, synthetic, splits=10) == distribution_metrics(real, synthetic.numpy(), splits=10)
    assert distribution_metrics(real, synthetic, splits=10) != distribution_metrics(real, synthetic, splits=10, seed=1)


@pytest.mark.parametrize("real, synthetic, sizes", [(40, 30, (20, 15)), (31, 90, (15, 16)), (41, 41, (20, 20))])
def test_numbers_of_volumes_are_the_same_in_the_null(monkeypatch, real, synthetic, sizes):
    seen = set()
    spy = Metric("", "features", "low", lambda pair: seen.add((len(pair.real), len(pair.other))) or 0.0, "", "")
    (figure,) = distribution_metrics(normal(real, 2), normal(synthetic, 2), splits=5, metrics={"spy": spy})
    assert seen == {sizes} == {(figure.real, figure.synthetic)}


def test_a_person_stands_in_a_split_with_one_scan_and_who_is_asked_for_is_not_met():
    """Rows are the number of the person, so that a split says who stands where; synthetic ones are 1000 more."""
    people = [i // 3 for i in range(90)]
    asked = [2 * (i % 15) for i in range(45)]  # the even ones, three times each
    real = torch.tensor(people, dtype=torch.float64)[:, None] * torch.ones(2)
    synthetic = 1000 + torch.tensor(asked, dtype=torch.float64)[:, None] * torch.ones(2)
    pairs = []

    def spy(pair):
        pairs.append([each[:, 0].tolist() for each in (pair.real, pair.other)])
        return 0.0

    measures = {"spy": Metric("", "features", "low", spy, "", "")}
    for whom, size in ((asked, 7), (None, 15)):
        pairs.clear()
        (figure,) = distribution_metrics(real, synthetic, subjects=people, splits=20, metrics=measures, requested=whom)
        assert (figure.real, figure.synthetic) == (15, size)
        for (one, made), (again, other) in zip(pairs[::2], pairs[1::2]):
            assert one == again and len({*one, *other}) == 15 + size
            if whom:
                assert sorted(made) == [1000 + person for person in sorted(other)]
        assert len({person for pair in pairs[1::2] for person in pair[1]}) == (15 if whom else 30)
    with pytest.raises(InputError, match="32 real and 32 synthetic volumes are of 3 people"):
        distribution_metrics(normal(32, 2), normal(32, 2), subjects=[0] * 30 + [1, 2])
    with pytest.raises(InputError, match="2 subjects are given for 32"):
        distribution_metrics(normal(32, 2), normal(32, 2), subjects=[0, 1])
    with pytest.raises(InputError, match="1 of them not among"):
        distribution_metrics(normal(32, 2), normal(32, 2), requested=[*range(31), 32])


def visits(people: int, scans: int, dimensions: int, seed: int) -> torch.Tensor:
    """Features of so many scans of each person, who differs from the others three times as much as from visit to visit."""
    own = 0.3**0.5 * normal(people * scans, dimensions, seed=seed)
    return own + 0.7**0.5 * normal(people, dimensions, seed=seed + 1).repeat_interleave(scans, dim=0)


@pytest.mark.parametrize("asked_for", [60, 300])
def test_five_visits_of_sixty_people(asked_for):
    """A perfect generator is neither closer than real nor beyond the margin, and garbage is not as good as real."""
    people = [i // 5 for i in range(300)]
    asked = [i % 60 for i in range(asked_for)]
    alarms, said = 0, 0
    for seed in range(3):
        real, made = visits(60, 5, 8, 10 * seed), normal(asked_for, 8, seed=10 * seed + 2)
        figures = distribution_metrics(real, made, subjects=people, splits=40, seed=seed, requested=asked)
        alarms += sum(figure.verdict in (CLOSER, BEYOND) for figure in figures)
        said += len(figures)
        off = found(distribution_metrics(real, made + 3, subjects=people, splits=40, seed=seed, requested=asked))
        assert {name for name, figure in off.items() if figure.verdict != BEYOND} == {"spread"}
    assert alarms <= 0.05 * said


@pytest.mark.parametrize(
    "direction, value, excess, verdict",
    [
        ("low", 5.0, 3.0, BEYOND),
        ("low", 0.5, 0.0, CLOSER),
        ("low", 2.0, -3.0, CLOSER),
        ("high", 5.0, 0.0, CLOSER),
        ("high", 2.0, 3.0, CLOSER),
        ("high", 0.5, -3.0, BEYOND),
        ("real", 5.0, 3.0, BEYOND),
        ("real", 0.5, -3.0, BEYOND),
        ("low", 2.0, 0.2, WITHIN),
        ("low", 2.9, 0.6, FEW),
        ("high", 2.9, -0.6, FEW),
    ],
)
def test_verdicts(direction, value, excess, verdict):
    figure = Finding(
        "x", value, value - 0.7, value + 0.7, 1.0, 3.0, excess, excess - 0.7, excess + 0.7, 1.0, direction, 60, 50
    )
    assert figure.verdict == verdict
    if verdict == WITHIN:
        assert dataclasses.replace(figure, synthetic=49).verdict == FEW  # too few to say so
        assert dataclasses.replace(figure, excess_high=1.1).verdict == FEW  # too uncertain
        assert dataclasses.replace(figure, excess_low=-1.1).verdict == FEW
    known = {"verdict": figure.verdict, "needed": figure.needed}
    assert json.loads(json.dumps(figure.to_dict())) == {**dataclasses.asdict(figure), **known}


def test_every_measure_of_the_table_computes_and_says_where_it_comes_from():
    rows = {
        "features": normal(40, 5),
        "maps": normal(40, 20),
        "probabilities": torch.softmax(normal(40, 4), dim=1),
    }
    figures = [figure for kind, x in rows.items() for figure in distribution_metrics(x, x.flip(0), kind, splits=3)]
    volumes = torch.rand(8, 1, 12, 12, 12).numpy()
    figures += diversity_metrics(volumes, volumes)
    assert [figure.name for figure in figures] == list(REALISM_METRICS)
    for figure in figures:
        values = (figure.value, figure.low, figure.high, figure.null_low, figure.null_high)
        assert np.isfinite(values).all() and figure.low <= figure.value <= figure.high, figure.name
        assert (
            REALISM_METRICS[figure.name].title
            and REALISM_METRICS[figure.name].says
            and any(map(str.isdigit, REALISM_METRICS[figure.name].reference))
        )
    with pytest.raises(InputError, match="no metric takes 'voxels'"):
        distribution_metrics(normal(40, 5), normal(40, 5), "voxels")
    with pytest.raises(InputError, match="11 real volumes are too few; give 12"):
        distribution_metrics(normal(11, 5), normal(40, 5))


def same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A similarity s with log(1 - s) the mean of both volumes: of pairs of independent numbers, of known distribution."""
    return 1 - ((one.mean(dim=(1, 2, 3, 4)) + other.mean(dim=(1, 2, 3, 4))) / 2).exp()


PAIRS = {"mean": Metric("", "volumes", "real", same, "", "")}


def test_pairs_hold_the_known_mean_and_seldom_differ_without_cause():
    """log(1 - s) of a pair of N(0, 1) is N(0, 1/2): intervals must hold s = 0, and like volumes seldom come out as unlike."""
    holds, apart, repeats = 0, 0, 200
    for i in range(repeats):
        real, synthetic = (normal(n, 1, 1, 1, 1, seed=3 * i + k).numpy() for k, n in enumerate((24, 16)))
        (figure,) = diversity_metrics(real, synthetic, seed=i, metrics=PAIRS)
        assert (figure.real, figure.synthetic) == (12, 8)
        holds += figure.low <= 0 <= figure.high
        apart += not figure.null_low <= figure.value <= figure.null_high
    assert 0.91 <= holds / repeats <= 0.985 and 0.015 <= apart / repeats <= 0.09
    real, synthetic = normal(40, 1, 1, 1, 1).numpy(), normal(40, 1, 1, 1, 1, seed=1).numpy() + 2
    assert diversity_metrics(real, synthetic, metrics=PAIRS)[0].verdict == BEYOND


def test_pairs_are_of_different_volumes_and_of_different_subjects():
    used = []

    def spy(one, other):
        used.append((one.item(), other.item()))
        return one.flatten()

    volumes = np.arange(30.0).reshape(30, 1, 1, 1, 1)
    measure = {"spy": Metric("", "volumes", "real", spy, "", "")}
    people, asked = [i // 3 for i in range(30)], [i % 8 for i in range(30)]
    diversity_metrics(volumes, volumes + 100, subjects=people, pairs=9, metrics=measure, requested=asked)
    real, synthetic, margin = used[:5], used[5:9], used[9:]
    assert min(v for pair in synthetic for v in pair) >= 100 > max(v for pair in real + margin for v in pair)
    assert len({people[int(v)] for pair in real for v in pair}) == 10  # nobody is in two pairs
    assert len({asked[int(v) - 100] for pair in synthetic for v in pair}) == 8
    for (a, b), (c, d) in zip(real, margin, strict=True):  # the same pairs, a tenth nearer to each other
        assert (d - c) == pytest.approx(0.9 * (b - a)) and a + b == pytest.approx(c + d)
    with pytest.raises(InputError, match="3 synthetic volumes make 1 pairs"):
        diversity_metrics(volumes, volumes[:3], metrics=measure)


@pytest.mark.slow
def test_a_thousand_volumes_of_512_features_in_a_minute():
    started = time.process_time()  # on one core, whatever else the machine does
    figures = distribution_metrics(normal(1000, 512), normal(1000, 512, seed=1))
    assert time.process_time() - started < 60
    assert len(figures) == sum(measure.kind == "features" for measure in REALISM_METRICS.values())
    assert not [figure for figure in figures if figure.verdict in (BEYOND, CLOSER)]
