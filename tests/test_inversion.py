"""From data to noise and back, against Gaussian data whose ODE is solved exactly."""

import math

import pytest
import torch
from test_samplers import exact_ode, gaussian_denoiser, noise, process  # noqa: F401 (a fixture)

from ldm3d.diffusion.inversion import invert
from ldm3d.diffusion.samplers import SAMPLERS, follow, sample
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError

BOTH_WAYS = ("ddim", "euler", "heun", "dpmpp-2m", "unipc")


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp-2m", 2), ("unipc", 3)])
def test_order_towards_noise(process, name, order):  # noqa: F811
    """The same orders as towards data."""
    error = {}
    for n in (80, 160):
        times = process.t_of_lam(torch.linspace(3, -3, n + 1, dtype=torch.float64)).tolist()
        z = follow(name, gaussian_denoiser(process), noise(0), times, process)
        error[n] = (z - exact_ode(noise(0), times[0], times[-1], process)).norm().item()
    assert math.log2(error[80] / error[160]) == pytest.approx(order, abs=0.35)


def test_from_data_itself_to_pure_noise(process):  # noqa: F811
    """t = 0, where the noise that a latent holds has no value, and t = 1, where lambda may have none."""
    x = exact_ode(noise(0), 1.0, 0.0, process)
    denoise, wanted = gaussian_denoiser(process), exact_ode(x, 0.0, 1.0, process)
    assert (invert(denoise, x, process, 200) - wanted).abs().max() < 0.002
    for name in BOTH_WAYS:  # first steps of first order cost the others more
        assert (invert(denoise, x, process, 200, name=name) - wanted).abs().max() < 0.5


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp-2m", "unipc"])
def test_more_steps_are_nearer(name):
    flow = make_process("flow")
    x = exact_ode(noise(0), 1.0, 0.0, flow)
    denoise, wanted = gaussian_denoiser(flow), exact_ode(x, 0.0, 1.0, flow)
    few, many = ((invert(denoise, x, flow, n, name=name) - wanted).abs().max() for n in (50, 200))
    assert many < few / 3


def test_there_and_back_again():
    """20 steps of Heun either way bring a latent back."""
    flow = make_process("flow")
    denoise, x = gaussian_denoiser(flow), exact_ode(noise(0), 1.0, 0.0, flow)
    z = invert(denoise, x, flow, 20)
    again = sample("heun", denoise, z, flow, 20)
    assert (again - x).abs().max() < 0.05 * x.std()


def test_stops_on_the_way():
    flow = make_process("flow")
    denoise, x = gaussian_denoiser(flow), exact_ode(noise(0), 1.0, 0.0, flow)
    z = invert(denoise, x, flow, 40, until=0.51)
    torch.testing.assert_close(z, exact_ode(x, 0.0, 0.5, flow), rtol=0, atol=0.01)  # 0.5 is the nearest of its times


def test_samplers_with_noise_go_towards_data_alone():
    for name in set(SAMPLERS) - set(BOTH_WAYS):
        with pytest.raises(InputError, match="must decrease"):
            follow(name, gaussian_denoiser(make_process("flow")), noise(0), [0.2, 0.8], make_process("flow"), noise=noise)
    with pytest.raises(InputError, match="must decrease or increase"):
        follow("heun", gaussian_denoiser(make_process("flow")), noise(0), [0.2, 0.8, 0.5], make_process("flow"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients_pass(name):
    """From the latent back to the noise: what measurements and edits are steered by."""
    process = make_process("vp-cosine")  # noqa: F811
    z = noise(0).requires_grad_()
    sample(name, gaussian_denoiser(process), z, process, 4, noise=noise).sum().backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0
