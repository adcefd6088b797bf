"""Likelihood of a latent: an upper bound on -log p from the noising, and -log p itself from the probability-flow ODE.

Both score x' = x + (sigma_0 / alpha_0) e: the latent with the little noise of the times' lower end, where the process is cut
off (Gaussian dequantisation; a density is not defined for a value known without error, and integrals over the signal-to-noise
ratio diverge there). Both take z at the upper end for noise of the variance that unit-variance data have there,
N(0, alpha_1^2 + sigma_1^2), which is N(0, 1) in variance-preserving processes. They estimate the same number, the mean of
-log p(x') over e; the bound is the larger by what the generative chain loses against the ODE.

Results are in nats of the latent's density, summed over its dimensions. Bits per voxel also need the autoencoder's part; see
`ldm3d.evaluation.likelihood`.

Legend: x clean latent, e noise, (N, C, X, Y, Z); D = C X Y Z; lambda = log(alpha / sigma), SNR = exp(2 lambda); index 0 for
the data's end of the window, 1 for the noise's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.ode import Noise, ode_scale
from ldm3d.diffusion.process import Process
from ldm3d.diffusion.schedules import VDM
from ldm3d.errors import InputError, choose

EVEN_IN = ("t", "lambda")


@dataclass(frozen=True)
class Bound:
    """An upper bound on -log p of each latent in nats, in its three parts (Kingma et al. 2021, eq. 11), each (N,).

    Attributes:
        prior: KL of z at the noise's end from the prior.
        reconstruction: -log p(x | z_0), with p(x | z_0) = N(z_0 / alpha_0, (sigma_0 / alpha_0)^2).
        diffusion: what the denoiser costs in between.
        dimensions: D.
    """

    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    dimensions: int

    @property
    def total(self) -> Tensor:
        return self.prior + self.reconstruction + self.diffusion

    @property
    def nats_per_dimension(self) -> Tensor:
        return self.total / self.dimensions


def low_discrepancy(number: int, offset: float = 0.5) -> list[float]:
    """Quantiles (i + offset) / number, one in each of `number` equal parts of [0, 1) (Kingma et al. 2021, appendix I.1).

    For an offset drawn uniformly from [0, 1) their mean is unbiased; 0.5 is the midpoint rule.
    """
    return [(i + offset) / number for i in range(number)]


def window(process: Process) -> tuple[float, float]:
    """(lambda_0, lambda_1) between which a process is scored: `Process.lam_range`.

    For vdm the ends of gamma, for DDPM chains from step 0 on, elsewhere from 5 down to -5 or what there is at t = 1. At 5 the
    noise on x' is 0.7 % of a latent's standard deviation, too little to change the score of data that vary on larger scales.
    """
    low, high = process.lam_range
    return high, low


@torch.no_grad()
def variational_bound(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    noise: Noise,
    quantiles: Sequence[float],
    *,
    steps: int | None = None,
    even_in: str | None = None,
    ends: tuple[float, float] | None = None,
) -> Bound:
    """Unbiased estimate of the variational bound on -log p(x'), continuous in time or of a chain of T steps.

    The diffusion term is, with |.|^2 a sum over D,

        continuous  integral of SNR |x - denoise(z_t, t)|^2 dlambda           (Kingma et al. 2021, eq. 17-18)
        T steps     T / 2 E_i (SNR(s_i) - SNR(t_i)) |x - denoise(z_t, t)|^2   (eq. 14), larger, and equal for T -> infinity

    Args:
        denoise: expected clean latent of z at time t.
        x: latents (N, C, X, Y, Z), float32 or float64.
        process: any; a vdm's inner schedule makes no difference but to the variance.
        noise: noise(i) is N(0, 1) noise like x for the i-th quantile.
        quantiles: in [0, 1), one denoiser call each: positions between the ends. `low_discrepancy` gives an estimate of
            lower variance than independent ones; 64 are few, 1,000 many.
        steps: T; None for the continuous bound.
        even_in: what quantiles, and the chain's steps, are even in: "t" or "lambda". None is t for vdm, whose schedule was
            learned for it, and lambda for all others.
        ends: (lambda_0, lambda_1) instead of `window`.

    Raises:
        InputError: no quantile, one outside [0, 1), steps < 1, or ends that do not fall or lie outside the process.
    """
    if not quantiles or not all(0 <= q < 1 for q in quantiles) or (steps is not None and steps < 1):
        raise InputError(
            f"{len(quantiles)} quantiles, {steps} steps: give one quantile or more, all in [0, 1) (see low_discrepancy), and "
            "1 step or more, or None"
        )
    lam_0, lam_1 = _checked(ends or window(process), process)
    even_in = choose("spacing of the bound", even_in or ("t" if isinstance(process, VDM) else "lambda"), EVEN_IN)
    at = partial(_time_at, process, lam_0, lam_1, even_in)
    diffusion = x.new_zeros(len(x), dtype=torch.float64)
    for i, quantile in enumerate(quantiles):
        if steps is None:
            t, lam, rate = at(quantile)
            weight = -rate
        else:
            step = int(quantile * steps)
            t, lam, _ = at((step + 1) / steps)
            weight = steps / 2 * math.expm1(2 * (at(step / steps)[1] - lam))  # T / 2 (SNR(s) - SNR(t)) / SNR(t)
        z = process.add_noise(x, noise(i), t)
        error = math.exp(lam) * (x - denoise(z, t))  # in units of e: nothing overflows where the SNR is large
        diffusion += weight * error.double().square().flatten(1).sum(dim=1) / len(quantiles)

    dimensions = x[0].numel()
    reconstruction = dimensions * ((1 + math.log(2 * math.pi)) / 2 - lam_0)
    return Bound(_prior(x, process, lam_1), torch.full_like(diffusion, reconstruction), diffusion, dimensions)


def _time_at(process: Process, lam_0: float, lam_1: float, even_in: str, quantile: float) -> tuple[float, float, float]:
    """(t, lambda, d lambda / d quantile) at a quantile of the way from lambda_0 to lambda_1, even in t or in lambda."""
    if even_in == "lambda":
        lam = lam_0 + quantile * (lam_1 - lam_0)
        return process.t_of_lam(lam), lam, lam_1 - lam_0
    t_0, t_1 = process.t_of_lam(lam_0), process.t_of_lam(lam_1)
    t = t_0 + quantile * (t_1 - t_0)
    return t, process.lam(t), process.lam_rate(t) * (t_1 - t_0)


def _prior(x: Tensor, process: Process, lam_1: float) -> Tensor:
    """KL of z at the noise's end from noise of its variance, (N,) in nats."""
    t_1 = process.t_of_lam(lam_1)
    alpha, sigma = process.alpha(t_1), process.sigma(t_1)
    variance = alpha**2 + sigma**2
    second_moment = (alpha * x.double()).square() + sigma**2
    return (second_moment / variance - 1 - math.log(sigma**2 / variance)).flatten(1).sum(dim=1) / 2


def ode_nll(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    noise: Noise,
    *,
    steps: int = 100,
    probes: int = 1,
    ends: tuple[float, float] | None = None,
) -> Tensor:
    """-log p(x') of the probability-flow ODE, (N,) in nats, by Hutchinson's trace estimate (Song et al. 2021, eq. 39-40).

    In y = z / (alpha + sigma) the ODE is dy/dlambda = -(1 - u)(y - x), u = sigma / (alpha + sigma), x the denoised latent,
    and log p changes by its divergence on the way: d log p / dlambda = (1 - u)(D - trace dx/dy). Followed from the data's end
    to the noise's, in steps even in lambda, with Heun's method. The trace is estimated with the same random signs on the
    way, without bias; its error falls with `probes` and with D.

    Args:
        denoise: expected clean latent of z at time t; differentiable, that is, not under torch.no_grad.
        x: latents (N, C, X, Y, Z), float32 or float64.
        process: any.
        noise: noise(0) is the e of x', noise(1), ... give the signs of the probes; N(0, 1), like x.
        steps: of Heun; two denoiser calls and `probes` backward passes through it each. Its error is in the answer: try twice
            as many where that matters.
        probes: sign vectors for the trace.
        ends: (lambda_0, lambda_1) instead of `window`.

    Raises:
        InputError: steps or probes below 1, or ends that do not fall or lie outside the process.
    """
    if steps < 1 or probes < 1:
        raise InputError(f"{steps} steps, {probes} probes: the ODE needs 1 of each or more; 100 and 1 are usual")
    lam_0, lam_1 = _checked(ends or window(process), process)
    signs = [torch.where(noise(1 + i) < 0, -1.0, 1.0).to(x) for i in range(probes)]

    slopes = partial(_ode_slopes, denoise, process, signs)
    dimensions, step = x[0].numel(), (lam_1 - lam_0) / steps
    t_0, t_1 = process.t_of_lam(lam_0), process.t_of_lam(lam_1)
    y = (process.add_noise(x, noise(0), t_0) / ode_scale(process, t_0)).detach()
    change = x.new_zeros(len(x), dtype=torch.float64)  # of log p on the way
    for k in range(steps):
        first = slopes(y, lam_0 + k * step)
        second = slopes(y + step * first[0], lam_0 + (k + 1) * step)
        y = y + step / 2 * (first[0] + second[0])
        change += step / 2 * (first[1] + second[1])

    z, variance = y.double() * ode_scale(process, t_1), process.alpha(t_1) ** 2 + process.sigma(t_1) ** 2
    at_the_end = -(z.square() / variance + math.log(2 * math.pi * variance)).flatten(1).sum(dim=1) / 2
    # From the densities of z_1, y_1, y_0 to that of x' = y_0 (alpha_0 + sigma_0) / alpha_0
    scales = math.log(ode_scale(process, t_1)) + math.log(process.alpha(t_0) / ode_scale(process, t_0))
    return -(at_the_end + dimensions * scales - change)


def _ode_slopes(denoise: Denoiser, process: Process, signs: Sequence[Tensor], y: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """(dy / dlambda, d log p / dlambda) at y, (N, C, X, Y, Z) and (N,); the trace is estimated with the signs."""
    t = process.t_of_lam(lam)
    scale, kept = ode_scale(process, t), process.alpha(t) / ode_scale(process, t)  # kept = 1 - u
    with torch.enable_grad():
        z = (y * scale).detach().requires_grad_()
        denoised = denoise(z, t)
        trace = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for i, sign in enumerate(signs):
            (row,) = torch.autograd.grad((denoised * sign).sum(), z, retain_graph=i + 1 < len(signs))
            trace = trace + scale * (row * sign).double().flatten(1).sum(dim=1) / len(signs)
    return -kept * (y - denoised.detach()), kept * (y[0].numel() - trace)


def _checked(ends: tuple[float, float], process: Process) -> tuple[float, float]:
    lam_0, lam_1 = ends
    if not process.lam(1.0) - 1e-6 <= lam_1 < lam_0 < math.inf:
        raise InputError(
            f"ends {ends} of the likelihood must be two finite log(alpha / sigma) that fall and reach no further than "
            f"{process.lam(1.0):.3g}, the {process.kind} process's own at t = 1"
        )
    return lam_0, lam_1
