"""What an evaluation says of two sets of volumes as a whole."""

import numpy as np
import pytest
from scipy import ndimage

from ldm3d.data.phantoms import make_phantom
from ldm3d.evaluation.features import RandomFeatures
from ldm3d.evaluation.likeness import IN_PAIRS, compare_all, look_at
from ldm3d.evaluation.measures import MEASURES, WORSE

SHAPE = (24, 28, 24)


@pytest.fixture(scope="module")
def phantoms():
    volumes = [make_phantom(SHAPE, seed=5, index=i)[0] for i in range(48)]
    return [(volume / np.percentile(volume, 99.8)).clip(0, 1) for volume in volumes]


def seen(volumes):
    extractor = RandomFeatures()
    return [look_at(volume.astype(np.float32), i, extractor, "cpu") for i, volume in enumerate(volumes)]


def test_phantoms_are_like_phantoms_and_blurred_ones_are_not(phantoms):
    real, others = seen(phantoms[:24]), phantoms[24:]
    alike = compare_all(real, seen(others), range(24))
    assert {finding.name for finding in alike} == {
        name for name, measure in MEASURES.items() if measure.kind != "probabilities"
    }
    assert not {finding.name for finding in alike if finding.verdict == WORSE}
    blurred = compare_all(real, seen([ndimage.gaussian_filter(volume, 1.5) for volume in others]), range(24))
    worse = {finding.name for finding in blurred if finding.verdict == WORSE}
    assert {"frechet", "kernel_distance", "precision", "density"} <= worse


def test_what_cannot_be_measured_is_said(phantoms):
    with pytest.warns(UserWarning, match="not measured in full"):
        found = compare_all(seen(phantoms[:5]), seen(phantoms[5:10]), range(5))
    assert {finding.name for finding in found} == {"ms_ssim", "four_g_r_ssim"}


def test_volumes_are_kept_for_pairs_only(phantoms):
    extractor = RandomFeatures()
    assert look_at(phantoms[0], IN_PAIRS - 1, extractor, "cpu").volume.dtype == np.float16
    assert look_at(phantoms[0], IN_PAIRS, extractor, "cpu").volume is None
    assert look_at(phantoms[0], 0, lambda volumes: volumes.flatten(1)[:, :3], "cpu").maps is None
