"""Realism by group: a group that is drawn worse is found; a fair model has no gap, whoever its people are."""

import numpy as np
import pytest
import torch

from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.evaluation.realism import FeatureSet, VolumeFeatures
from ldm3d.evaluation.realism_by_group import realism_gaps
from ldm3d.evaluation.subgroups import GAP, MIN_GROUP, gaps

SCHEMA = CovariateSchema((Covariate("sex", "categorical", categories=("F", "M", "O")),))
BANDS = {"sex": []}


def volumes(
    features: torch.Tensor, labels: list[str], people: list | None = None, maps: torch.Tensor | None = None
) -> FeatureSet:
    seen = [VolumeFeatures(features[i : i + 1], None if maps is None else maps[i : i + 1]) for i in range(len(features))]
    return FeatureSet(seen, [{"sex": label} for label in labels], people or list(range(len(labels))))


def drawn(seed: int, shift: float = 0.0, spread: float = 1.0, count: int = 40) -> tuple[FeatureSet, FeatureSet]:
    """Real and generated volumes of `count` women and men. Men lie elsewhere and vary `spread` times as much."""
    rng = torch.Generator().manual_seed(seed)
    labels = ["F", "M"] * count
    men = torch.tensor([[label == "M"] for label in labels], dtype=torch.float64)
    real, made = (torch.randn(2 * count, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    real, made = (x * (1 + (spread - 1) * men) + 3 * men for x in (real, made))
    return volumes(real, labels), volumes(made + shift * men, labels)


def found(real: FeatureSet, synthetic: FeatureSet, **options) -> dict:
    options = {"splits": 40} | options
    return {gap.figure: gap for gap in gaps(SCHEMA, BANDS, [], realism_gaps(SCHEMA, BANDS, real, synthetic, **options))}


@pytest.mark.parametrize("figure", ("Fréchet distance", "kernel distance", "MMD, Gaussian kernel", "precision", "coverage"))
def test_a_group_that_is_drawn_worse_is_found(figure):
    gap = found(*drawn(0, shift=2.0))[f"{figure}, minus real"]
    assert (gap.worst, gap.best, gap.verdict) == ("M", "F", GAP)
    assert gap.low < gap.gap < gap.high and [(group.label, group.n) for group in gap.groups] == [("F", 40), ("M", 40)]


def test_a_shift_has_the_size_of_its_mmd():
    """Of two groups one is off by a known vector: its kernel distance is that of many more, the other's 0."""
    gap = found(*drawn(1, shift=1.0, count=200))["kernel distance, minus real"]
    real, made = (each.stack("features") for each in drawn(1, shift=1.0, count=20_000))
    mean, deviation = real[:400].mean(dim=0), real[:400].std(dim=0)
    men = [((x[1::2] - mean) / deviation)[:4000] for x in (real, made)]

    def kernel(x, y):
        return ((x @ y.T / 8 + 1) ** 3).mean()

    true = kernel(men[0], men[0]) + kernel(men[1], men[1]) - 2 * kernel(*men)
    assert gap.low < float(true) < gap.high and gap.groups[0].low < 0 < gap.groups[0].high


def test_a_fair_model_has_no_gap_though_a_group_varies_more():
    """40 models that draw men right, who vary twice as much: one in twenty may be called unfair."""
    alarms = sum(
        any(gap.verdict == GAP for gap in found(*drawn(10 + seed, spread=2.0), splits=20).values()) for seed in range(40)
    )
    assert alarms <= 6  # 2 expected; more than 6 have a chance of 1 in 200


def test_groups_of_few_people_are_left_out_whatever_their_scans():
    real, synthetic = drawn(2)
    few = [i % (MIN_GROUP - 1) if label["sex"] == "M" else 100 + i for i, label in enumerate(real.rows)]
    assert found(FeatureSet(real.volumes, real.rows, few), FeatureSet(synthetic.volumes, synthetic.rows, few)) == {}
    again = [i // 2 for i in range(len(few))]  # one of each sex: two groups of 40 people each
    assert found(FeatureSet(real.volumes, real.rows, again), FeatureSet(synthetic.volumes, synthetic.rows, again))


def test_maps_and_pairs_are_judged_too_where_they_are_kept():
    rng = np.random.default_rng(3)
    labels = ["F", "M"] * 20
    made = []
    for men in (0.05, 0.4):  # generated men vary more than real ones
        x = torch.from_numpy(rng.standard_normal((40, 8)))
        each = volumes(x, labels, maps=torch.from_numpy(rng.standard_normal((40, 5))))
        base = rng.random((1, 24, 24, 24))
        for seen, label in zip(each.volumes, labels):
            noise = rng.standard_normal(base.shape) * (men if label == "M" else 0.05)
            seen.volume = (base + noise).clip(0, 1).astype(np.float16)
        made.append(each)
    by_name = found(*made)
    assert "spatial Fréchet distance, minus real" in by_name
    gap = by_name["MS-SSIM of pairs, minus real"]
    assert gap.verdict == GAP and {group.label: group.value < -0.1 for group in gap.groups} == {"F": False, "M": True}
