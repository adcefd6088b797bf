"""Samples of a latent given a measurement of its volume: decoupled annealing, with Gaussian steps in place of Langevin's.

Decoupled annealing (DAPS, Zhang et al. 2025, algorithm 1) goes down the levels of noise. At each it draws a clean latent x
given z_t and the measurement, and then fresh noise, z_s = alpha x + sigma e: unlike a step of an ODE, this can correct what
was wrong at higher noise. Given z_t alone, x is taken as N(m, C), m the denoised latent. With it and a linear decoder, x given
z_t and the measurement is Gaussian, too, and is drawn exactly: perturb m and y by their own noise, then optimise
(randomise-then-optimise, Bardsley et al. 2014). A decoder that is not linear takes a few Gauss-Newton steps instead.

So for Gaussian latents, with their own C, every level is a draw from the posterior itself, and one level is enough.

Legend: x clean latent, z noisy latent, both (N, C, X, Y, Z); D the decoder, J its Jacobian; y = A D(x) + s n.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.gaussian import Gaussian
from ldm3d.diffusion.measurement import Operator, conjugate_gradients
from ldm3d.diffusion.ode import Progress, walk
from ldm3d.diffusion.process import Process

Draw = Callable[[Sequence[int]], Tensor]  # a shape -> N(0, 1) noise (N, *shape), each row from its sample's own stream


class Jacobian(Protocol):
    """A decoder's Jacobian, or what stands in for it: close enough to converge, as its gradient is taken of D itself."""

    def __call__(self, v: Tensor) -> Tensor:
        """J v: a latent's change to the volume's."""
        ...

    def transpose(self, w: Tensor) -> Tensor:
        """J' w."""
        ...


class Decoder(Protocol):
    """D, differentiable."""

    def __call__(self, x: Tensor) -> Tensor:
        """Latents (N, C, X, Y, Z) -> volumes."""
        ...

    def jacobian(self, x: Tensor) -> Jacobian:
        """J at x."""
        ...


@torch.no_grad()
def sample_posterior(
    denoise: Denoiser,
    spread: Callable[[float], Gaussian],
    decoder: Decoder,
    operator: Operator,
    y: Tensor,
    z: Tensor,
    times: Sequence[float],
    process: Process,
    draw: Draw,
    *,
    corrections: int = 2,
    iterations: int = 30,
    renew: Callable[[Tensor], Operator] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Sample latents given a measurement, along decreasing times.

    Args:
        denoise: (z, t) -> m, the expected clean latent.
        spread: t -> C, the covariance of x given z_t; its mean has no part.
        decoder: D.
        operator: A, with s.
        y: the measurement, (N, ...).
        z: noise at times[0].
        times: decreasing, to 0; len(times) - 1 levels.
        process: that z follows.
        draw: all random numbers, a stream a sample.
        corrections: Gauss-Newton steps a level; 1 is exact where D is linear and its Jacobian is exact.
        iterations: of conjugate gradients, in each of these, at most.
        renew: residuals y - A D(x) of the samples of a level -> the operator, with its noise, of the next.
        progress: called after each level with the number of levels done.

    Returns:
        The clean latents, like z.
    """
    x = z
    for _, t, s in walk(times, progress):
        x, residual = informed_draw(denoise(z, t), spread(t), decoder, operator, y, draw, corrections, iterations)
        if renew is not None:
            operator = renew(residual)
        if s > 0:
            z = process.alpha(s) * x + process.sigma(s) * draw(x.shape[1:])
    return x


@torch.no_grad()
def informed_draw(
    m: Tensor,
    spread: Gaussian,
    decoder: Decoder,
    operator: Operator,
    y: Tensor,
    draw: Draw,
    corrections: int,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Draw x ~ N(m, C) given y = A D(x) + s n, and the residual y - A D(x) of it.

    The minimum of |x - m'|^2 in C^-1 and |y' - A D(x)|^2 / s^2, with m' and y' drawn around m and y. Each correction solves
    (C^-1 + J' A' A J / s^2) dx = J' A' (y' - A D(x)) / s^2 - C^-1 (x - m').
    """
    weight = operator.noise_std**-2
    prior = m + spread.sample(draw(m.shape[1:]), draw(spread.variances.shape)) - spread.mean
    noisy = y + operator.noise_std * draw(y.shape[1:])
    x = prior
    for _ in range(corrections):
        with torch.enable_grad():
            variable = x.detach().requires_grad_()
            image = operator(decoder(variable))
            slope = torch.autograd.grad(image, variable, weight * (noisy - image.detach()))[0]
        image = image.detach()
        jacobian = decoder.jacobian(x)

        def curvature(v: Tensor, jacobian: Jacobian = jacobian) -> Tensor:
            return jacobian.transpose(operator.transpose(weight * operator(jacobian(v))))

        # Per channel, as if the measurement told as much everywhere: what conjugate gradients start from
        probe = torch.where(draw(m.shape[1:]) > 0, 1.0, -1.0).to(m)
        near = spread.narrowed((probe * curvature(probe)).mean(dim=(0, 2, 3, 4)).clamp_min(0))
        step = conjugate_gradients(
            lambda v: spread.precision(v) + curvature(v),
            slope - spread.precision(x - prior),
            iterations,
            near.covariance,
            tolerance=1e-3,
        )
        # The best length of the step if the decoder were linear along it: 1 where its Jacobian is exact
        change = operator(decoder(x + step)) - image
        rise = _inner(step, spread.precision(step)) + _inner(weight * change, change)
        length = (_inner(weight * change, noisy - image) - _inner(step, spread.precision(x - prior))) / rise.clamp_min(1e-30)
        x = x + length.reshape(-1, *[1] * (x.ndim - 1)) * step
    return x, y - operator(decoder(x))


def _inner(u: Tensor, v: Tensor) -> Tensor:
    """Of each sample, (N,)."""
    return (u * v).flatten(1).sum(1)
