"""Measures with known answers."""

import numpy as np
import pytest
import torch
from scipy import stats

from ldm3d import figures
from ldm3d.errors import InputError
from ldm3d.evaluation.sweeps import evenly
from ldm3d.metrics.reconstruction import foreground, psnr, ssim
from ldm3d.report.page import Goal
from ldm3d.statistics.agreement import agreement


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


def test_ssim_is_monais():
    from monai.metrics import SSIMMetric

    rng = torch.Generator().manual_seed(1)
    for shape in ((16, 14, 12), (9, 12, 8)):
        x, y = torch.rand(2, 2, 1, *shape, generator=rng)
        side = min(11, *shape) - (min(11, *shape) + 1) % 2
        torch.testing.assert_close(ssim(x, y), SSIMMetric(3, data_range=1.0, win_size=side)(x, y).flatten())


def test_air_makes_figures_of_the_whole_grid_better_and_those_of_the_foreground_not():
    """A cube of noise in a small and in a large grid, the same errors in both: by 27 / 8 more volume, 5.3 dB."""
    rng = torch.Generator().manual_seed(2)
    cube, error = 0.2 + 0.6 * torch.rand(16, 16, 16, generator=rng), 0.05 * torch.randn(16, 16, 16, generator=rng)
    found = {}
    for side in (24, 36):
        volume, again = torch.zeros(2, 1, 1, side, side, side)
        inside = (0, 0, *[slice(side // 2 - 8, side // 2 + 8)] * 3)
        volume[inside], again[inside] = cube, cube + error
        where = foreground(volume)
        assert int(where.sum()) == 20**3  # two voxels around
        found[side] = [figure(again, volume, at).item() for at in (None, where) for figure in (psnr, ssim)]
    assert found[36][0] - found[24][0] == pytest.approx(10 * np.log10(3.375), abs=1e-3) and found[36][1] > found[24][1]
    assert found[36][2] == pytest.approx(found[24][2], abs=1e-4) and found[36][3] == pytest.approx(found[24][3], abs=0.03)
    assert found[24][2] == pytest.approx(-10 * np.log10(0.0025 * 16**3 / 20**3), abs=0.2)
    assert found[36][3] < found[36][1]


def test_what_spills_over_the_edge_counts_and_an_empty_volume_is_all_foreground():
    volume = torch.zeros(2, 1, 12, 12, 12)
    volume[0, 0, 4:8, 4:8, 4:8] = 1
    again = volume.clone()
    again[0, 0, 3, 4:8, 4:8] = 0.5  # beside the edge
    again[1] = 0.1
    where = foreground(volume)
    noise = foreground(volume[:1] + 0.05 * torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(noise, where[:1])  # noise in air is no foreground
    assert psnr(again, volume, where)[0] < 40 and psnr(again, volume, where)[1].item() == pytest.approx(20, abs=1e-4)


def test_values_of_a_sweep_have_three_digits_of_their_range():
    assert evenly(0.6, 0.82, 6) == [0.6, 0.644, 0.688, 0.732, 0.776, 0.82]
    assert evenly(0.0213, 0.0388, 6) == [0.0213, 0.0248, 0.0283, 0.0318, 0.0353, 0.0388]
    assert evenly(20, 80, 6) == [20, 32, 44, 56, 68, 80]
    assert evenly(1.2e6, 1.8e6, 3) == [1.2e6, 1.5e6, 1.8e6]
    assert evenly(5.123456, 5.123456, 2) == [5.123456] * 2
    low, high = 0.123456, 0.234567
    assert min(evenly(low, high, 6)) >= low and max(evenly(low, high, 6)) <= high


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
    volume = np.zeros((1, 20, 24, 16))
    volume[0, 15:, 18:, 8] = 1  # axial: right and front
    image = figures.slices(volume)
    axial = image[:24, :20]
    assert axial[:6, 15:].all() and not axial[6:].any() and not axial[:, :15].any()
    volume = np.zeros((1, 20, 24, 16))
    volume[0, :5, 12, 12:] = 1  # coronal: left and top
    coronal = figures.slices(volume)[4:20, 20:40]
    assert coronal[:4, :5].all() and not coronal[4:].any() and not coronal[:, 5:].any()


def test_slices_have_true_proportions():
    assert figures.slices(np.zeros((1, 10, 20, 10)), (2, 1, 1)).shape == (20, 20 + 20 + 20)
