"""Samplers: against Gaussian data, whose denoiser and ODE solution are exact, and against diffusers' schedulers.

For x ~ N(mu, S) the expected clean latent is E[x | z] = mu + alpha S (alpha^2 S + sigma^2)^-1 (z - alpha mu), and the
probability-flow ODE keeps every principal component at the same number of standard deviations from its mean. So the
whole error is the sampler's.
"""

import math

import diffusers
import pytest
import torch

from ldm3d.diffusion.samplers import SAMPLERS, recommended_spacing, sample, sample_ddim, sample_ddpm, sample_unipc
from ldm3d.diffusion.schedules import PROCESSES, Flow, LinearBetas, ScaledLinearBetas, make_process
from ldm3d.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

VARIANCES = torch.tensor([0.01, 0.1, 1.0, 4.0], dtype=torch.float64)
AXES = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
MEAN = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
COVARIANCE = AXES @ VARIANCES.diag() @ AXES.T


def gaussian_denoiser(process):
    """Exact denoiser for N(MEAN, COVARIANCE) over the four elements of each sample, (N, 1, 2, 2, 1)."""

    def denoise(z, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = AXES @ (alpha * VARIANCES / (alpha**2 * VARIANCES + sigma**2)).diag() @ AXES.T
        return (MEAN.to(z) + (z.flatten(1) - alpha * MEAN.to(z)) @ gain.to(z)).reshape(z.shape)

    return denoise


def exact_ode(z, t, s, process):
    """Where the probability-flow ODE takes z from t to s."""

    def std(t):
        return (process.alpha(t) ** 2 * VARIANCES + process.sigma(t) ** 2).sqrt()

    flow = AXES @ (std(s) / std(t)).diag() @ AXES.T
    return (process.alpha(s) * MEAN + (z.flatten(1) - process.alpha(t) * MEAN) @ flow).reshape(z.shape)


def noise(k, n=16, dtype=torch.float64):
    return torch.randn(n, 1, 2, 2, 1, dtype=dtype, generator=torch.Generator().manual_seed(1000 + k))


@pytest.fixture(params=PROCESSES)
def process(request):
    return make_process(request.param)


# Known answers


@pytest.mark.parametrize(
    "name, options, order",
    [
        ("ddim", {}, 1),
        ("euler", {}, 1),
        ("heun", {}, 2),
        ("dpmpp-2m", {}, 2),
        ("unipc", {"order": 1}, 2),  # UniPC-p is of order p + 1, thanks to its corrector
        ("unipc", {"order": 2}, 3),
        ("unipc", {"order": 3}, 4),
    ],
)
def test_order_of_convergence(process, name, options, order):
    """Twice the steps, an error 2^order times smaller; even in lambda and away from the ends, where it is infinite."""
    error = {}
    for n in (40, 80, 160):
        times = process.t_of_lam(torch.linspace(-3, 3, n + 1, dtype=torch.float64)).tolist()
        z = SAMPLERS[name](gaussian_denoiser(process), noise(0), times, process, **options)
        error[n] = (z - exact_ode(noise(0), times[0], times[-1], process)).norm().item()
    for n in (40, 80):
        assert math.log2(error[n] / error[2 * n]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize(
    "name, options, steps, tolerance",
    [
        ("ddim", {}, 200, 0.05),
        ("euler", {}, 200, 0.05),
        ("heun", {}, 20, 0.03),
        ("dpmpp-2m", {}, 40, 0.02),
        ("unipc", {}, 40, 0.02),
        ("unipc", {"order": 3}, 20, 0.02),
    ],
)
def test_from_pure_noise_to_data(process, name, options, steps, tolerance):
    """The whole way, t = 1 to 0 exactly, with the recommended times: finite, and the ODE's solution."""
    z = sample(name, gaussian_denoiser(process), noise(0), process, steps, **options)
    assert (z - exact_ode(noise(0), 1.0, 0.0, process)).abs().max() < tolerance


@pytest.mark.parametrize(
    "name, options",
    [("ddpm", {}), ("ddpm", {"variance": "large"}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5}), ("unipc", {})],
)
def test_samples_have_the_mean_and_covariance_of_the_data(process, name, options):
    """20,000 samples: the standard error of the largest variance, 4, is 0.04, of its mean 0.014."""
    n = 20_000
    random = torch.Generator().manual_seed(0)

    def fresh(k):
        return torch.randn(n, 1, 2, 2, 1, dtype=torch.float64, generator=random)

    z = sample(name, gaussian_denoiser(process), fresh(0), process, 200, noise=fresh, **options).flatten(1)
    assert (z.mean(0) - MEAN).abs().max() < 0.06
    components = AXES.T @ z.T.cov() @ AXES
    torch.testing.assert_close(components, VARIANCES.diag(), rtol=0.12, atol=0.03)


def test_one_step_is_the_denoised_latent(process):
    for name in SAMPLERS:
        z = sample(name, gaussian_denoiser(process), noise(0), process, 1, noise=noise)
        torch.testing.assert_close(z, gaussian_denoiser(process)(noise(0), 1.0))


def test_euler_is_ddim(process):
    """Both are exact where x and e stay the same over a step."""
    euler, ddim = (sample(name, gaussian_denoiser(process), noise(0), process, 13) for name in ("euler", "ddim"))
    torch.testing.assert_close(euler, ddim)


def test_ddim_with_eta_1_is_ddpm(process):
    for times in (process.times(13), process.times(13, "karras")):
        ddim = sample_ddim(gaussian_denoiser(process), noise(0), times, process, eta=1.0, noise=noise)
        ddpm = sample_ddpm(gaussian_denoiser(process), noise(0), times, process, noise=noise)
        torch.testing.assert_close(ddim, ddpm)


def test_float32_is_enough(process):
    for name in SAMPLERS:
        double = sample(name, gaussian_denoiser(process), noise(0), process, 20, noise=noise)
        single = sample(name, gaussian_denoiser(process), noise(0).float(), process, 20, noise=lambda k: noise(k).float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


# diffusers as the oracle. Its trailing steps are our uniform times; its tables are rounded to float32.

STEPS = 20
CHAINS = [(LinearBetas(), "linear"), (ScaledLinearBetas(), "scaled_linear")]


def diffusers_sample(scheduler, process, z, prediction="sample", **step_options):
    """The latents of all steps of a diffusers scheduler, given our denoiser; `prediction` is what it expects."""
    denoise, path = gaussian_denoiser(process), []
    for k, step in enumerate(scheduler.timesteps):
        t = process.t_of_step(int(step))
        scaled = scheduler.scale_model_input(z, step)
        x = denoise(scaled, t)
        output = x if prediction == "sample" else (scaled - process.alpha(t) * x) / process.sigma(t)
        options = {name: value(k) if callable(value) else value for name, value in step_options.items()}
        z = scheduler.step(output, step, z, return_dict=False, **options)[0]
        path.append(z)
    return path


def chain_options(process, schedule, **more):
    return {
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "beta_schedule": schedule,
        "timestep_spacing": "trailing",
        "prediction_type": "sample",
        **more,
    }


def assert_agree(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("process, schedule", CHAINS)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_diffusers(process, schedule, variance):
    """It draws from a generator, in the order of the steps; ours is given the same draws.

    Compared before the last step: there diffusers adds the "large" variance to the clean latent unless the step's
    number is 0, which trailing steps never reach (Ho et al. 2020, algorithm 2, add none).
    """
    options = chain_options(process, schedule, clip_sample=False, variance_type=f"fixed_{variance}")
    scheduler = diffusers.DDPMScheduler(**options)
    scheduler.set_timesteps(STEPS)
    theirs = diffusers_sample(scheduler, process, noise(0), generator=torch.Generator().manual_seed(7))
    random = torch.Generator().manual_seed(7)
    ours = sample_ddpm(
        gaussian_denoiser(process),
        noise(0),
        process.times(STEPS)[:-1],
        process,
        variance=variance,
        noise=lambda k: torch.randn(noise(0).shape, dtype=torch.float64, generator=random),
    )
    assert_agree(ours, theirs[-2])


@pytest.mark.parametrize("process, schedule", CHAINS)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_diffusers(process, schedule, eta):
    scheduler = diffusers.DDIMScheduler(**chain_options(process, schedule, clip_sample=False))
    scheduler.set_timesteps(STEPS)
    theirs = diffusers_sample(scheduler, process, noise(0), eta=eta, variance_noise=noise)[-1]
    assert_agree(sample("ddim", gaussian_denoiser(process), noise(0), process, STEPS, eta=eta, noise=noise), theirs)


@pytest.mark.parametrize("process, schedule", CHAINS)
def test_euler_is_diffusers(process, schedule):
    """It integrates z / alpha over sigma / alpha, ours z / (alpha + sigma): an Euler step is the same in both."""
    scheduler = diffusers.EulerDiscreteScheduler(**chain_options(process, schedule, prediction_type="epsilon"))
    scheduler.set_timesteps(STEPS)
    theirs = diffusers_sample(scheduler, process, noise(0) / process.alpha(1.0), prediction="noise")[-1]
    assert_agree(sample("euler", gaussian_denoiser(process), noise(0), process, STEPS), theirs)


@pytest.mark.parametrize("process, schedule", CHAINS)
def test_dpmpp_2m_is_diffusers(process, schedule):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **chain_options(process, schedule), algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(STEPS)
    theirs = diffusers_sample(scheduler, process, noise(0))[-1]
    ours = sample("dpmpp-2m", gaussian_denoiser(process), noise(0), process, STEPS, spacing="uniform")
    assert_agree(ours, theirs)


@pytest.mark.parametrize("process, schedule", CHAINS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_diffusers(process, schedule, order):
    """But for order 3 it lowers the order before the last step, which ours does not: compared before that."""
    scheduler = diffusers.UniPCMultistepScheduler(**chain_options(process, schedule), solver_order=order)
    scheduler.set_timesteps(STEPS)
    theirs = diffusers_sample(scheduler, process, noise(0))
    done = STEPS if order < 3 else STEPS - 2
    ours = sample_unipc(gaussian_denoiser(process), noise(0), process.times(STEPS)[: done + 1], process, order=order)
    assert_agree(ours, theirs[done - 1])


@pytest.mark.parametrize(
    "name, theirs",
    [("euler", diffusers.FlowMatchEulerDiscreteScheduler), ("heun", diffusers.FlowMatchHeunDiscreteScheduler)],
)
def test_flow_matching_is_diffusers(name, theirs):
    """Its model gives the velocity, (z - x) / t; its own times, from 1 to 1 / 1000 and then 0."""
    scheduler = theirs()
    scheduler.set_timesteps(STEPS)
    times = scheduler.sigmas.double().unique().flip(0).tolist()
    z, denoise = noise(0, dtype=torch.float32), gaussian_denoiser(Flow())
    for step in scheduler.timesteps:
        t = step.item() / 1000
        z = scheduler.step((z - denoise(z, t)) / t, step, z, return_dict=False)[0]
    assert_agree(SAMPLERS[name](denoise, noise(0, dtype=torch.float32), times, Flow()), z)


# The interface


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_and_progress(process, name):
    """One denoiser call a step (two for Heun and a corrector, but for the last), at one of the times; all are reported."""
    calls, done = [], []

    def denoise(z, t):
        calls.append(t)
        return gaussian_denoiser(process)(z, t)

    sample(name, denoise, noise(0), process, 5, noise=noise, progress=done.append)
    if name != "sde-heun":  # it steps beyond the times and back; see test_sde.py
        assert len(calls) == (9 if name in ("heun", "sde-pc") else 5)
        assert set(calls) == set(process.times(5, recommended_spacing(name, process))[:-1])
    assert done == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(process, name):
    whole = sample(name, gaussian_denoiser(process), noise(0), process, 7, noise=noise)
    alone = sample(name, gaussian_denoiser(process), noise(0)[5:6], process, 7, noise=lambda k: noise(k)[5:6])
    torch.testing.assert_close(whole[5:6], alone)


def test_every_step_has_its_own_noise():
    asked = []

    def noted(k):
        asked.append(k)
        return noise(k)

    sample("ddpm", gaussian_denoiser(Flow()), noise(0), Flow(), 5, noise=noted)
    assert asked == [0, 1, 2, 3]  # none in the last step


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("dpm-2m", {}, "did you mean 'dpmpp-2m'"),
        ("ddim", {"etta": 1}, "did you mean 'eta'"),
        ("heun", {"eta": 1}, "known: none"),
        ("ddpm", {}, "give noise="),
        ("ddim", {"eta": 1.0}, "give noise="),
        ("ddpm", {"variance": "big", "noise": noise}, "known: small, large"),
        ("unipc", {"order": 4}, "order 4"),
        ("unipc", {"spacing": "trailing"}, "unknown spacing 'trailing'"),
    ],
)
def test_errors_name_the_way_out(name, options, message):
    with pytest.raises(InputError, match=message):
        sample(name, gaussian_denoiser(Flow()), noise(0), Flow(), 5, **options)


def test_times_must_be_in_order():
    with pytest.raises(InputError, match="must decrease"):
        sample_ddpm(gaussian_denoiser(Flow()), noise(0), [0.0, 0.5, 1.0], Flow(), noise=noise)
    for times in ([1.0, 0.2, 0.5], [1.0]):
        with pytest.raises(InputError, match="must decrease or increase"):
            sample_ddim(gaussian_denoiser(Flow()), noise(0), times, Flow())
