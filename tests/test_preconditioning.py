"""Channels of different scales: the network sees and predicts unit variance, and Gaussian data are sampled exactly."""

import pytest
import torch
from torch import nn

from ldm3d.diffusion.denoiser import NetworkDenoiser
from ldm3d.diffusion.objective import Denoising
from ldm3d.diffusion.preconditioning import Preconditioning
from ldm3d.diffusion.samplers import sample
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.training.scales import deviations, voxel_scales

SCALES = (3.0, 1.0, 0.1)
RANDOM = torch.Generator().manual_seed(0)
E = torch.randn(64, 3, 6, 6, 6, generator=RANDOM)
X = torch.randn(64, 3, 6, 6, 6, generator=RANDOM) * torch.tensor(SCALES).view(3, 1, 1, 1)
T = torch.linspace(0.02, 0.98, 64)
KINDS = ("flow", "vp-cosine")


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_targets_have_unit_variance_in_every_channel_at_every_time(kind):
    process = make_process(kind)
    conditioning = Preconditioning(process, "v", SCALES)
    for t in (0.05, 0.5, 0.95):
        seen, wanted = conditioning.input(process.add_noise(X, E, t), t), conditioning.target_of(X, E, t)
        for values in (seen, wanted):
            torch.testing.assert_close(values.std(dim=(0, 2, 3, 4)), torch.ones(3), rtol=0.03, atol=0)
        assert abs((seen * wanted).mean()) < 0.02  # so the network need not pass on its input


@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_latent_is_found_again(kind):
    process = make_process(kind)
    conditioning = Preconditioning(process, "v", SCALES)
    z = process.add_noise(X, E, T)
    torch.testing.assert_close(conditioning.to_data(conditioning.target_of(X, E, T), z, T), X, rtol=1e-4, atol=1e-4)


def test_scales_of_1_change_nothing_where_the_variance_is_preserved():
    process = make_process("vp-cosine")
    ones, plain = Preconditioning(process, "v", (1.0, 1.0, 1.0)), Preconditioning(process, "v")
    z = process.add_noise(X, E, T)
    torch.testing.assert_close(ones.input(z, T), plain.input(z, T))
    torch.testing.assert_close(ones.target_of(X, E, T), plain.target_of(X, E, T))
    torch.testing.assert_close(ones.to_data(E, z, T), plain.to_data(E, z, T))
    for weight in ("none", "min-snr"):
        torch.testing.assert_close(ones.loss(weight, T, E.square()), plain.loss(weight, T, E.square()))


def test_weight_noise_is_the_loss_of_the_noise():
    """An error d of the target is one of b s d in x, and so of alpha b s / sigma d in the noise, which is a d."""
    process = make_process("flow")
    conditioning = Preconditioning(process, "v", SCALES)
    z, target = process.add_noise(X, E, T), conditioning.target_of(X, E, T)
    off = target + 0.1
    t = T.view(-1, 1, 1, 1, 1)
    errors = [(z - (1 - t) * conditioning.to_data(output, z, T)) / t for output in (target, off)]
    expected = (errors[0] - errors[1]).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(conditioning.loss("noise", T, (off - target).square()), expected, rtol=1e-3, atol=1e-5)


def test_weight_level_counts_every_time_alike_and_channels_as_noise_does():
    conditioning = Preconditioning(make_process("flow"), "v", SCALES)
    ones = torch.ones_like(X)
    torch.testing.assert_close(conditioning.loss("level", T, ones), torch.ones_like(T))
    one_channel = ones * (torch.arange(len(SCALES)) == 1)[:, None, None, None]
    shares = [conditioning.loss(weight, T, one_channel) / conditioning.loss(weight, T, ones) for weight in ("level", "noise")]
    torch.testing.assert_close(*shares)
    assert conditioning.loss("noise", T, ones).max() > 2 * conditioning.loss("noise", T, ones).min()


class Zero(nn.Module):
    """The best network for Gaussian data of independent channels: given z, the target's mean is 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, z, time, conditions):
        return torch.zeros_like(z)


def test_gaussian_channels_are_sampled_with_their_scales():
    process = make_process("flow")
    denoise = NetworkDenoiser(Zero(), process, "v", SCALES).given(None)
    found = sample("heun", denoise, E, process, 64)
    torch.testing.assert_close(found.std(dim=(0, 2, 3, 4)), torch.tensor(SCALES), rtol=0.03, atol=0)


def test_the_objective_s_best_network_has_the_loss_of_its_target():
    losses = Denoising(make_process("flow"), "v", "none", "uniform", scales=SCALES).losses(
        lambda z, time: torch.zeros_like(z), X, E, T
    )
    torch.testing.assert_close(losses.mean(), torch.tensor(1.0), rtol=0.02, atol=0)


def test_scales_need_target_v():
    with pytest.raises(InputError, match=r"target noise: .*need target v"):
        Preconditioning(make_process("flow"), "noise", SCALES)


class Gains(LatentSpace):
    """A decoder that adds up its channels, each with a gain of its own."""

    def __init__(self, gains=(4.0, 1.0, 0.25)):
        super().__init__(1, 3, 1)
        self.gains = torch.tensor(gains)

    def encode(self, x):
        return torch.cat([x * torch.ones(3, 1, 1, 1), torch.full((len(x), 3, *x.shape[2:]), -20.0)], dim=1)

    def decode(self, z):
        return (z * self.gains.view(3, 1, 1, 1)).sum(dim=1, keepdim=True)


def test_scales_of_a_decoder_are_its_gains():
    volumes = torch.rand(2, 1, 12, 12, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(voxel_scales(Gains(), volumes), torch.tensor([4.0, 1.0, 0.25]), rtol=0.05, atol=0)
    half = Gains((2.0, 2.0, 0.125))
    half.latent_std.copy_(torch.tensor([1.0, 1.0, 4.0]))  # a unit of a normalised latent is more of the latent itself
    torch.testing.assert_close(voxel_scales(half, volumes), torch.tensor([2.0, 2.0, 0.5]) / 2 ** (1 / 3), rtol=0.05, atol=0)


def test_deviations_are_of_posterior_samples():
    autoencoder = Gains()
    autoencoder.latent_std.copy_(torch.tensor([1.0, 2.0, 4.0]))
    mean = torch.randn(5, 3, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    moments = torch.cat([mean, torch.zeros_like(mean)], dim=1).numpy()  # variance 1 of the posterior, 1 of the means
    assert deviations(autoencoder, moments, [0, 1, 2, 3]) == pytest.approx([2**0.5, 2**0.5 / 2, 2**0.5 / 4], rel=0.03)
