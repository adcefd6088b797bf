"""The SDE view (Song et al. 2021): samplers that follow the reverse-time SDE of any process.

For w = z / sqrt(alpha^2 + sigma^2), whose alpha^2 + sigma^2 = 1, every process is the same SDE on its own clock
tau = -2 log alpha_w: dw = -w / 2 dtau + dW. Backwards in time (Anderson 1982; Song et al., eq. 6),

    dw = (w / 2 + score) dtau + dW,    score = grad log p_t(w) = (alpha_w x - w) / sigma_w^2,

where x is the denoised latent. The ODE with the same marginals, half the score and no dW (eq. 13), is what
`ldm3d.diffusion.samplers` follow without noise.

tau is infinite at pure noise (flow: alpha(1) = 0), where a step of the SDE does not depend on z. A step of dtau from t to s
has the noise beta = 1 - exp(-dtau) = 1 - (alpha_w(t) / alpha_w(s))^2, which is dtau for small steps and never above 1.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.ode import Noise, Progress, forward_step, heun_step, ode_share, walk
from ldm3d.diffusion.process import Process
from ldm3d.errors import InputError

LARGEST_RATIO = 10  # of sigma / (alpha + sigma) over a step of Heun's


def sample_sde_euler(
    denoise: Denoiser,
    z: Tensor,
    times: Sequence[float],
    process: Process,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Euler-Maruyama for the reverse SDE: order 1 in distribution, one denoiser call a step.

    Args:
        denoise: expected clean latent of z at time t.
        z: noise at times[0], (N, C, X, Y, Z).
        times: decreasing, to 0 for a clean latent; len(times) - 1 steps.
        process: gives alpha(t) and sigma(t).
        noise: noise(i) is N(0, 1) noise like z, independent for every i; the caller keeps one stream per sample. The last
            step, to t = 0, draws none and is the denoised latent, without noise.
        progress: called after each step with the number of steps done.

    Returns:
        The clean latent, same shape as z.

    Raises:
        InputError: no `noise`, or times that do not decrease.
    """
    noise = check_noise(noise, "Euler-Maruyama")
    for k, t, s in walk(times, progress):
        z = _euler_step(denoise, z, t, s, process, noise, k)
    return z


def sample_sde_heun(
    denoise: Denoiser,
    z: Tensor,
    times: Sequence[float],
    process: Process,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The reverse SDE as the ODE and fresh noise in turn (cf. Karras et al. 2022, algorithm 2): order 2, two calls a step.

    The reverse SDE of a stretch in lambda is the ODE over that stretch and Langevin dynamics, and these are the ODE over as
    much again and the forward process back (Karras et al., eq. 6-8). So a step from t to s is Heun's to the time r beyond s
    with lambda(r) - lambda(s) = lambda(s) - lambda(t), then the forward step from r to s. Both keep the marginals, so that
    only Heun's error is left. From pure noise r is 0, and the step does not depend on z, as in the SDE. Arguments as
    `sample_sde_euler`.
    """
    noise = check_noise(noise, "the stochastic Heun sampler")
    for k, t, s in walk(times, progress):
        r = process.t_of_lam(2 * process.lam(s) - process.lam(t)) if s > 0 else 0.0
        # Heun's second slope multiplies errors of z by u_t / u_r: Euler's step where that ratio is large
        z = heun_step(denoise, z, t, r, process, correct=ode_share(process, r) > ode_share(process, t) / LARGEST_RATIO)
        if s > 0:
            ratio, variance = forward_step(process, s, r)
            z = ratio * z + math.sqrt(variance) * noise(k)
    return z


def sample_predictor_corrector(
    denoise: Denoiser,
    z: Tensor,
    times: Sequence[float],
    process: Process,
    *,
    noise: Noise | None = None,
    corrections: int = 1,
    snr: float = 0.16,
    progress: Progress | None = None,
) -> Tensor:
    """Predictor-corrector sampling (Song et al. 2021, algorithm 1): Langevin steps after each step of `sample_sde_euler`.

    A Langevin step is z + eps score + sqrt(2 eps) noise with eps = 2 (snr |noise| / |score|)^2 (algorithms 4 and 5). Here the
    norms are those expected where x is known, |noise| / |score| = sigma: a sample must not depend on its batch. Where the
    data vary less than the noise, the corrector's own error makes the variance 1 / (1 - snr^2) times too large.

    Args:
        corrections: Langevin steps at each time but t = 0; each costs a denoiser call.
        snr: r of the paper, in (0, 1): more corrects more, and with a larger error.

    Other arguments as `sample_sde_euler`.

    Raises:
        InputError: also for corrections < 0 or an snr outside (0, 1).
    """
    noise = check_noise(noise, "predictor-corrector sampling")
    if corrections < 0 or not 0 < snr < 1:
        raise InputError(f"corrections {corrections}, snr {snr}: must be >= 0 and in (0, 1); 1 and 0.16 are usual")
    for k, t, s in walk(times, progress):
        first = k * (corrections + 1)
        z = _euler_step(denoise, z, t, s, process, noise, first)
        for i in range(corrections if s > 0 else 0):
            alpha, sigma = process.alpha(s), process.sigma(s)
            step = 2 * (snr * sigma) ** 2
            score = (alpha * denoise(z, s) - z) / sigma**2
            z = z + step * score + math.sqrt(2 * step) * noise(first + 1 + i)
    return z


def _euler_step(denoise: Denoiser, z: Tensor, t: float, s: float, process: Process, noise: Noise, number: int) -> Tensor:
    """Euler-Maruyama from t to s; the denoised latent where s = 0."""
    x = denoise(z, t)
    if s == 0:
        return x
    alpha, sigma = process.alpha(t), process.sigma(t)
    size, next_size = math.hypot(alpha, sigma), math.hypot(process.alpha(s), process.sigma(s))
    beta = 1 - (alpha / size * next_size / process.alpha(s)) ** 2
    w, score = z / size, (alpha * x - z) * (size / sigma**2)
    return next_size * (w + beta * (w / 2 + score) + math.sqrt(beta) * noise(number))


def check_noise(noise: Noise | None, what: str) -> Noise:
    if noise is None:
        raise InputError(f"{what} draws noise at every step: give noise=..., or use heun, which needs none")
    return noise
