"""A network as a denoiser: times, types and targets."""

import pytest
import torch
from torch import nn

from ldm3d.diffusion.denoiser import NetworkDenoiser
from ldm3d.diffusion.process import TARGETS
from ldm3d.diffusion.schedules import PROCESSES, make_process
from ldm3d.models.conditioning import Conditions

X = torch.randn(3, 2, 2, 3, 2, generator=torch.Generator().manual_seed(0))
E = torch.randn(3, 2, 2, 3, 2, generator=torch.Generator().manual_seed(1))
CONDITIONS = Conditions(torch.ones(3, 1, 2))


class Recorder(nn.Module):
    """Answers with what it was made with; remembers what it was asked."""

    def __init__(self, answer, dtype=torch.float32):
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, z, timesteps, conditions):
        self.asked = z, timesteps, conditions
        return self.weight * self.answer.to(self.weight.dtype)


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_perfect_prediction_is_the_clean_latent(kind, target):
    """At one time for all as at one for each, in training as in sampling."""
    process = make_process(kind)
    for t in (0.4, torch.tensor([0.2, 0.5, 0.9])):
        network = Recorder(process.target(target, X, E, t))
        denoise = NetworkDenoiser(network, process, target).given(CONDITIONS)
        torch.testing.assert_close(denoise(process.add_noise(X, E, t), t), X, rtol=1e-4, atol=1e-4)


def test_times_are_told_in_thousandths_and_never_rounded():
    """bfloat16 has steps of 4 between 512 and 1000."""
    network = Recorder(X, torch.bfloat16)
    denoise = NetworkDenoiser(network, make_process("flow"), "data")
    for t in (0.9989, torch.full((3,), 0.9989)):
        denoise(X, t, CONDITIONS)
        z, timesteps, conditions = network.asked
        torch.testing.assert_close(timesteps, torch.full((3,), 998.9))
        assert z.dtype == torch.bfloat16 and conditions.covariates.dtype == torch.float32
    assert denoise(X, 0.5, CONDITIONS).dtype == torch.float32


def test_a_learned_schedules_network_is_told_the_noise_level():
    process = make_process("vdm", gamma=(-10.0, 0.0, 10.0 / 3, 10.0))
    network = Recorder(X)
    NetworkDenoiser(network, process, "data")(X, 1 / 3, CONDITIONS)
    torch.testing.assert_close(network.asked[1], torch.full((3,), 500.0))


def test_gradients_reach_latent_and_network():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, z, timesteps, conditions):
            return self.weight * z

    network, z = Twice(), X.clone().requires_grad_()
    NetworkDenoiser(network, make_process("flow"), "data").given(CONDITIONS)(z, 0.5).sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(X, 2.0))
    torch.testing.assert_close(network.weight.grad, X.sum())
