"""Spectra of latents: white noise, waves, blurred noise."""

import torch
import torch.nn.functional as F

from ldm3d.metrics.spectrum import high_frequency_share, neighbour_correlation


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_white_noise_has_the_share_of_frequencies_above_half_of_nyquist():
    z = noise(8, 2, 16, 16, 16)
    expected = 1 - (9 / 16) ** 3  # frequencies -4..4 of -8..7 are not above half
    torch.testing.assert_close(high_frequency_share(z), torch.full((2,), expected, dtype=torch.float64), rtol=0, atol=0.01)
    assert neighbour_correlation(z).abs().max() < 0.02


def test_a_slow_wave_has_none_and_a_chequerboard_has_all():
    x = torch.arange(16.0)
    slow, fast = torch.cos(2 * torch.pi * x / 16), torch.cos(torch.pi * x)
    z = torch.stack([slow, fast])[None, :, :, None, None].expand(1, 2, 16, 16, 16)
    torch.testing.assert_close(high_frequency_share(z), torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-9, rtol=0)
    correlation = neighbour_correlation(z)  # constant along two of the axes
    assert correlation[0] > 0.95 and abs(correlation[1] - 1 / 3) < 0.05


def test_channels_are_apart_and_blur_lowers_the_share():
    z = noise(4, 1, 16, 16, 16)
    both = torch.cat([z, F.avg_pool3d(F.pad(z, (1,) * 6, mode="circular"), 3, stride=1)], dim=1)
    share = high_frequency_share(both)
    assert share[0] > 0.8 and share[1] < 0.4
    assert neighbour_correlation(both)[1] > 0.5
