"""Measures with known answers."""

import numpy as np
import pytest
import torch
from scipy import stats

from ldm3d import figures
from ldm3d.errors import InputError
from ldm3d.evaluation.metrics import agreement, psnr, ssim
from ldm3d.report.evaluation import Goal


def test_psnr_of_a_known_error():
    reference = torch.full((2, 1, 8, 8, 8), 0.5)
    volume = reference.clone()
    volume[0] += 0.1  # mean squared error 0.01: 20 dB
    volume[1, 0, :4] += 0.02  # half of the voxels: 0.0002
    torch.testing.assert_close(psnr(volume, reference), torch.tensor([20.0, 36.9897]), atol=1e-3, rtol=0)
    assert psnr(reference, reference).tolist() == pytest.approx([120, 120])
    assert psnr(reference + 9, reference)[0] == pytest.approx(10 * np.log10(4), abs=1e-4)  # clipped to 1 first


def test_ssim_is_1_for_equal_volumes_and_falls_with_noise():
    rng = torch.Generator().manual_seed(0)
    volume = torch.rand(2, 1, 16, 14, 12, generator=rng)
    torch.testing.assert_close(ssim(volume, volume), torch.ones(2))
    noisy = [ssim((volume + s * torch.randn(volume.shape, generator=rng)).clamp(0, 1), volume) for s in (0.05, 0.2)]
    assert (noisy[0] > noisy[1]).all() and (noisy[0] < 1).all() and noisy[0].shape == (2,)


def test_agreement_against_closed_forms():
    rng = np.random.default_rng(0)
    asked = rng.uniform(0, 100, 500)
    measured = 0.8 * asked + 5 + rng.standard_normal(500)
    found = agreement(asked, measured)
    assert found.n == 500
    assert found.slope == pytest.approx(0.8, abs=0.01) and found.intercept == pytest.approx(5, abs=0.5)
    assert found.bias == pytest.approx((measured - asked).mean()) and found.mae == pytest.approx(abs(measured - asked).mean())
    assert found.r == pytest.approx(stats.pearsonr(asked, measured)[0]) and found.r_low < found.r < found.r_high


def test_agreement_leaves_out_what_is_missing_and_refuses_what_says_nothing():
    assert agreement([1, 2, None, 3, 4], [1, 2, 5, np.nan, 4]).n == 3
    for asked, measured in (([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([], [])):
        with pytest.raises(InputError, match="agreement needs 3"):
            agreement(asked, measured)


def test_goals():
    assert Goal("a", 0.95, low=0.95).reached and not Goal("a", 0.949, low=0.95).reached
    assert not Goal("a", float("nan"), low=0.95).reached
    assert Goal("slope", 1.1, 0.8, 1.2).wanted == "0.8 to 1.2"


def test_slices_are_upright():
    """A bright front right top corner: right in the axial and coronal picture, front right in the sagittal, all on top."""
    volume = np.zeros((20, 24, 16))
    volume[15:, 18:, 8] = 1  # axial: right and front
    image = figures.slices(volume)
    axial = image[:24, :20]
    assert axial[:6, 15:].all() and not axial[6:].any() and not axial[:, :15].any()
    volume = np.zeros((20, 24, 16))
    volume[:5, 12, 12:] = 1  # coronal: left and top
    coronal = figures.slices(volume)[4:20, 20:40]
    assert coronal[:4, :5].all() and not coronal[4:].any() and not coronal[:, 5:].any()


def test_slices_have_true_proportions():
    assert figures.slices(np.zeros((10, 20, 10)), (2, 1, 1)).shape == (20, 20 + 20 + 20)
