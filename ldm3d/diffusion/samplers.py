"""Samplers: from noise to a latent, given a denoiser.

Every sampler is a function of `denoise(z, t) -> x`, the expected clean latent (guidance, target type and conditioning
are already inside it), and of a list of times. None of them knows a network, a file or a configuration.

Decreasing times lead from noise to data. Those samplers that draw no noise follow the probability-flow ODE and take
increasing times, too, which lead from data to the noise that it came from (`ldm3d.diffusion.inversion`). Gradients pass
through all of them, unless the caller disables them.

Legend: x clean latent, z noisy latent, both (N, C, X, Y, Z); t -> s one step; z_t = alpha x + sigma e;
lambda = log(alpha / sigma). Step k of n is times[k] -> times[k + 1].

Where the process begins with pure noise (flow: alpha(1) = 0), lambda(1) is -inf. Every formula here has a finite limit
there, which is used, so no sampler has to start from t = 0.999 instead.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.ode import Noise, Progress, ddim_step, forward_step, heun_step, ode_scale, ode_share, ode_slope, walk
from ldm3d.diffusion.process import Process
from ldm3d.diffusion.schedules import VDM, Flow
from ldm3d.diffusion.sde import sample_predictor_corrector, sample_sde_euler, sample_sde_heun
from ldm3d.errors import InputError, choose


def sample_ddpm(
    denoise: Denoiser,
    z: Tensor,
    times: Sequence[float],
    process: Process,
    *,
    noise: Noise | None = None,
    variance: str = "small",
    progress: Progress | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): one draw a step from q(z_s | z_t, x) at the denoised x.

    Args:
        denoise: expected clean latent of z at time t.
        z: noise at times[0], (N, C, X, Y, Z).
        times: decreasing, to 0 for a clean latent; len(times) - 1 steps.
        process: gives alpha(t) and sigma(t).
        noise: noise(k) is N(0, 1) noise like z for step k, independent of z and of the other steps'. The caller keeps
            one stream per sample, so that no sample depends on its batch. The last step, to t = 0, draws none.
        variance: "small", the posterior's own (right where x is known), or "large", the forward step's (right where
            the data are N(0, 1)); Ho et al. 2020, sec. 3.2.
        progress: called after each step with the number of steps done.

    Returns:
        The clean latent, same shape as z.
    """
    choose("variance", variance, ("small", "large"))
    if noise is None:
        raise InputError("DDPM sampling draws noise at every step: give noise=..., or use ddim, which needs none")
    for k, t, s in walk(times, progress):
        x = denoise(z, t)
        ratio, forward = forward_step(process, t, s)
        kept = (process.sigma(s) / process.sigma(t)) ** 2
        # Eq. 7, the mean of q(z_s | z_t, x), written for any alpha and sigma
        z = ratio * kept * z + process.alpha(s) * forward / process.sigma(t) ** 2 * x
        if s > 0:
            z = z + math.sqrt(forward * kept if variance == "small" else forward) * noise(k)
    return z


def sample_ddim(
    denoise: Denoiser,
    z: Tensor,
    times: Sequence[float],
    process: Process,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): first order, one denoiser call a step.

    eta = 0 is deterministic, needs no `noise` and takes times in either direction; eta = 1 is `sample_ddpm`. Other
    arguments as there.
    """
    if eta and noise is None:
        raise InputError(f"DDIM with eta {eta} draws noise at every step: give noise=..., or eta 0")
    for k, t, s in walk(times, progress, rising=not eta):
        if s > t:
            z = ddim_step(denoise(z, t) if t > 0 else z, z, t, s, process)
            continue
        x = denoise(z, t)
        e = (z - process.alpha(t) * x) / process.sigma(t)
        _, forward = forward_step(process, t, s)
        fresh = eta * math.sqrt(forward) * process.sigma(s) / process.sigma(t)  # eq. 16
        z = process.alpha(s) * x + math.sqrt(max(process.sigma(s) ** 2 - fresh**2, 0.0)) * e
        if noise is not None and fresh > 0:
            z = z + fresh * noise(k)
    return z


def sample_euler(
    denoise: Denoiser, z: Tensor, times: Sequence[float], process: Process, *, progress: Progress | None = None
) -> Tensor:
    """Euler's method for the probability-flow ODE: first order, one denoiser call a step. Arguments as `sample_ddpm`.

    With y = z / (alpha + sigma) and u = sigma / (alpha + sigma), y = (1 - u) x + u e for every process, and the ODE is
    dy/du = e - x = (y - x) / u: finite all the way up to pure noise, u = 1. For the flow process y = z and u = t, which
    is flow matching's Euler step along the velocity (Lipman et al. 2023). Euler is exact where x and e stay the same,
    and so is DDIM: in these variables the two are the same step.
    """
    y = z / ode_scale(process, times[0])
    for _, t, s in walk(times, progress, rising=True):
        y = y + (ode_share(process, s) - ode_share(process, t)) * ode_slope(denoise, y, t, process)
    return y * ode_scale(process, times[-1])


def sample_heun(
    denoise: Denoiser, z: Tensor, times: Sequence[float], process: Process, *, progress: Progress | None = None
) -> Tensor:
    """Heun's method for the ODE of `sample_euler` (cf. Karras et al. 2022, algorithm 1): second order.

    Two denoiser calls a step; one in a step to t = 0, where the slope is undefined and Euler's step is the denoised
    latent.
    """
    for _, t, s in walk(times, progress, rising=True):
        z = heun_step(denoise, z, t, s, process)
    return z


def sample_dpmpp_2m(
    denoise: Denoiser, z: Tensor, times: Sequence[float], process: Process, *, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one denoiser call a step.

    Gains over DDIM only with times that are even in lambda; see `Process.times`. Arguments as in `sample_ddpm`.
    """
    previous, previous_step = None, math.inf
    for _, t, s in walk(times, progress, rising=True):
        x = denoise(z, t) if t > 0 else z
        step = process.lam(s) - process.lam(t)  # infinite from and to t = 0 and pure noise
        if step == -math.inf:
            z = ddim_step(x, z, t, s, process)
            continue
        direction = x
        if previous is not None and math.isfinite(step):
            slope = step / (2 * previous_step)  # 0 after a step from pure noise: x changes by O(alpha) there
            direction = (1 + slope) * x - slope * previous
        # Eq. 10: sigma_s / sigma_t z - alpha_s (exp(-step) - 1) D; at s = 0 the denoised latent itself
        z = process.sigma(s) / process.sigma(t) * z - process.alpha(s) * math.expm1(-step) * direction
        previous, previous_step = x, step
    return z


def sample_unipc(
    denoise: Denoiser,
    z: Tensor,
    times: Sequence[float],
    process: Process,
    *,
    order: int = 2,
    progress: Progress | None = None,
) -> Tensor:
    """UniPC (Zhao et al. 2023), multistep, in data prediction with B_2(h) = exp(h) - 1.

    Predicts z_s, calls the denoiser there, and uses the result twice: to correct z_s and to predict the next latent. One
    denoiser call a step, order + 1 accurate for `order` in 1..3. Other arguments as in `sample_ddpm`.
    """
    if order not in (1, 2, 3):
        raise InputError(f"UniPC of order {order} is not available; choose 1, 2 or 3")
    nodes: list[tuple[float, Tensor]] = []  # (lambda, x) wherever the denoiser was asked, newest first
    start, p = z, 1
    for k, t, s in walk(times, progress, rising=True):
        x = denoise(z, t) if t > 0 else z
        if k > 0:  # correct the latent that was predicted for t, from where that step began
            z = _unipc_step(start, times[k - 1], t, nodes[:p], process, corrector=x)
        nodes = [(process.lam(t), x), *nodes][:order]
        p = max(sum(math.isfinite(lam) for lam, _ in nodes), 1)  # x at lambda = -inf cannot be interpolated with
        start = z
        z = _unipc_step(start, t, s, nodes[:p], process) if s > 0 else x
    return z


def _unipc_step(
    z: Tensor, t: float, s: float, nodes: list[tuple[float, Tensor]], process: Process, corrector: Tensor | None = None
) -> Tensor:
    """UniPC's step from z at t to s: the predictor UniP or, given x at s as the corrector, UniC.

    The exact step is z_s = sigma_s / sigma_t z + alpha_s integral of exp(lambda - lambda_s) x(lambda), and x(lambda) is
    taken as the polynomial through the nodes, at lambda_t + r_k h with h = lambda_s - lambda_t:
    z_s = sigma_s / sigma_t z + alpha_s I_0 (x_t + sum_k a_k (x_k - x_t) / r_k). I_0 = 1 - exp(-h) is their -B_2(-h).

    nodes: (lambda, x) at t and at the times before it.
    """
    (lam, x), *older = nodes
    h = process.lam(s) - lam
    if h == -math.inf:
        return ddim_step(x, z, t, s, process)
    r = [(other - lam) / h for other, _ in older]
    differences = [(other - x) / ratio for (_, other), ratio in zip(older, r)]
    if corrector is not None:
        r, differences = [*r, 1.0], [*differences, corrector - x]

    integral_0 = -math.expm1(-h)  # I_0
    if len(r) < 2:
        a = [0.5] * len(r)  # as the authors do: the exact a_1 for h -> 0, and as accurate
    else:  # sum_k a_k r_k^(j - 1) = I_j / I_0; I_j: the integral of exp(lambda - lambda_s) ((lambda - lambda_t) / h)^j
        rows, right, integral = [], [], integral_0
        for j in range(1, len(r) + 1):
            integral = 1 - j / h * integral  # by parts
            rows.append([ratio ** (j - 1) for ratio in r])
            right.append(integral / integral_0)
        a = torch.linalg.solve(*(torch.tensor(side, dtype=torch.float64) for side in (rows, right))).tolist()
    direction = x + sum(weight * difference for weight, difference in zip(a, differences))
    return process.sigma(s) / process.sigma(t) * z + process.alpha(s) * integral_0 * direction


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "euler": sample_euler,
    "heun": sample_heun,
    "dpmpp-2m": sample_dpmpp_2m,
    "unipc": sample_unipc,
    "sde-euler": sample_sde_euler,
    "sde-heun": sample_sde_heun,
    "sde-pc": sample_predictor_corrector,
}


def recommended_spacing(name: str, process: Process) -> str:
    """The time spacing in which a sampler does best, in 10 to 20 denoiser calls on Gaussian data of six variances.

    Even in t for the flow process, whose lambda moves slowly in the middle by itself, and for first-order samplers. In
    variance-preserving processes that leaves too much to the last step: a higher order gains nothing until it shrinks.
    """
    if isinstance(process, Flow):
        return "uniform"
    if isinstance(process, VDM):  # its schedule was learned for the bound's variance, not for a sampler
        return "share"
    return {"heun": "quadratic", "dpmpp-2m": "lambda", "unipc": "lambda"}.get(name, "uniform")


def follow(
    name: str,
    denoise: Denoiser,
    z: Tensor,
    times: Sequence[float],
    process: Process,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tensor:
    """The sampler of that name, from z at times[0] to times[-1].

    Args:
        name: a key of SAMPLERS.
        times: decreasing towards data; or, for samplers that draw no noise, increasing towards noise.
        noise: see `sample_ddpm`; left unused by the samplers that draw none.
        options: what that sampler takes beside these: `variance`, `eta` or `order`.
    """
    sampler = SAMPLERS[choose("sampler", name, SAMPLERS)]
    accepted = set(inspect.signature(sampler).parameters) - {"denoise", "z", "times", "process", "progress"}
    for option in options:
        choose(f"option of the {name} sampler", option, sorted(accepted - {"noise"}))
    if "noise" in accepted:
        options["noise"] = noise
    return sampler(denoise, z, times, process, progress=progress, **options)


def sample(
    name: str, denoise: Denoiser, z: Tensor, process: Process, steps: int, *, spacing: str | None = None, **options: Any
) -> Tensor:
    """From z, noise at t = 1, to the clean latent in `steps` steps.

    Args:
        spacing: of the times, see `Process.times`; None for the `recommended_spacing`.
        options: see `follow`.
    """
    choose("sampler", name, SAMPLERS)
    return follow(name, denoise, z, process.times(steps, spacing or recommended_spacing(name, process)), process, **options)
