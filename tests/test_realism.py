"""What an evaluation says of two sets of volumes as a whole."""

import inspect

import numpy as np
import pytest
import torch
from scipy import ndimage

from ldm3d.data.phantoms import make_phantom
from ldm3d.evaluation.assess import evaluate
from ldm3d.evaluation.realism import PAIRED_VOLUMES, FeatureSet, VolumeFeatures, assess_realism, features_of
from ldm3d.evaluation.realism_metrics import REALISM_METRICS
from ldm3d.metrics.features import RandomFeatures
from ldm3d.report.sections.realism import light, sections
from ldm3d.statistics.equivalence import BEYOND, ENOUGH, FEW

SHAPE = (24, 28, 24)


@pytest.fixture(scope="module")
def phantoms():
    volumes = [make_phantom(SHAPE, seed=5, index=i)[0] for i in range(48)]
    return [(volume / np.percentile(volume, 99.8)).clip(0, 1) for volume in volumes]


def seen(volumes, paired=True):
    extractor = RandomFeatures()
    features = [features_of(volume.astype(np.float32), paired, extractor, "cpu") for volume in volumes]
    return as_set(features)


def as_set(features):
    """Of different people, and of volumes generated for each of them."""
    return FeatureSet(features, [{}] * len(features), range(len(features)))


def test_phantoms_are_like_phantoms_and_blurred_ones_are_not(phantoms):
    real, others = seen(phantoms[:24]), phantoms[24:]
    alike = assess_realism(real, seen(others))
    assert {finding.name for finding in alike} == {
        name for name, measure in REALISM_METRICS.items() if measure.kind != "probabilities"
    }
    assert not {finding.name for finding in alike if finding.verdict == BEYOND}
    blurred = assess_realism(real, seen([ndimage.gaussian_filter(volume, (0, 1.5, 1.5, 1.5)) for volume in others]))
    worse = {finding.name for finding in blurred if finding.verdict == BEYOND}
    assert {"frechet", "kernel_distance", "precision", "density"} <= worse


def test_what_cannot_be_measured_is_said(phantoms):
    with pytest.warns(UserWarning, match="not measured in full"):
        found = assess_realism(seen(phantoms[:5]), seen(phantoms[5:10]))
    assert {finding.name for finding in found} == {"ms_ssim", "four_g_r_ssim"}


def test_volumes_are_kept_for_pairs_only(phantoms):
    extractor = RandomFeatures()
    assert features_of(phantoms[0], True, extractor, "cpu").volume.dtype == np.float16
    assert features_of(phantoms[0], False, extractor, "cpu").volume is None
    assert features_of(phantoms[0], True, lambda volumes: volumes.flatten(1)[:, :3], "cpu").maps is None


def test_as_many_pairs_are_made_as_a_verdict_asks_for():
    assert PAIRED_VOLUMES >= 2 * ENOUGH


def test_reconstructions_have_a_row_of_their_own_and_no_pairs(phantoms):
    """An autoencoder that blurs, and a diffusion model that draws what it is taught: the page says which of them errs."""
    blurred = [ndimage.gaussian_filter(volume, (0, 1.5, 1.5, 1.5)) for volume in phantoms[:24]]
    again = seen(blurred, paired=False)
    found = assess_realism(seen(phantoms[:24]), again)
    assert {finding.name for finding in found} == {
        name for name, m in REALISM_METRICS.items() if m.kind in ("features", "maps")
    }
    generated = assess_realism(seen(phantoms[:24]), seen(phantoms[24:]))
    (section,) = sections(generated, found)
    rows = {row[0].partition(":")[0].removesuffix(" *"): row for row in section.table["rows"]}
    assert [len(row) for row in rows.values()] == [len(section.table["columns"])] * len(generated)
    assert rows["Fréchet distance"][4] == BEYOND and rows["Fréchet distance"][2] == FEW
    assert rows["MS-SSIM of pairs"][3:5] == ["not measured", ""] and "12 + 12" in rows["precision"][1]
    assert sections([], []) == []


N = 200  # volumes that `ldm3d evaluate` generates by default


def drawn(seed: int, spread: float = 1.0, shift: float = 0.0, people: int = N) -> list[VolumeFeatures]:
    """Features of people, or of what a model draws for them; 8 that differ, and as many mixtures of these."""
    rng = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(people, 8, generator=rng, dtype=torch.float64) + shift
    mixed = x @ torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [VolumeFeatures(row[None]) for row in torch.cat([x, mixed], dim=1)]


def colour(real: list[VolumeFeatures], made: list[VolumeFeatures]) -> str:
    return light(assess_realism(as_set(real), as_set(made))).verdict[0]


def test_the_light_of_a_perfect_model_is_green_with_the_default_number_of_volumes():
    assert inspect.signature(evaluate).parameters["num_generated"].default == N
    found = [colour(drawn(2 * i), drawn(2 * i + 1)) for i in range(3)]
    assert found.count("green") >= 2 and "red" not in found


@pytest.mark.parametrize("broken", [{"spread": 0.7}, {"shift": 0.5}, {"spread": 1.5}])
def test_the_light_of_a_broken_model_is_red(broken):
    assert colour(drawn(0), drawn(1, **broken)) == "red"


def test_too_little_spread_is_never_green_and_few_volumes_are_grey():
    """15% less in every feature, which guidance does, with 100 + 100 volumes; and a perfect model with as few."""
    found = [colour(drawn(2 * i, people=100), drawn(2 * i + 1, spread=0.85, people=100)) for i in range(3)]
    assert "green" not in found
    assert colour(drawn(0, people=60), drawn(1, people=60)) == "grey"
