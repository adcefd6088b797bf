"""Denoisers given a measurement: functions from denoiser to denoiser, like guidance.

Legend: x clean latent, z noisy latent, both (N, C, X, Y, Z); A a linear operator, y = A x + s n its measurement, n ~ N(0, 1);
C the covariance of x given z.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.process import ALPHA_FLOOR, Process


class Operator(Protocol):
    """A linear map of a batch, with the noise of its measurements.

    Attributes:
        noise_std: s, above 0: one number, or a map that broadcasts against measurements.
    """

    @property
    def noise_std(self) -> float | Tensor: ...

    def __call__(self, x: Tensor) -> Tensor:
        """A x."""
        ...

    def transpose(self, y: Tensor) -> Tensor:
        """A' y, so that <A x, y> = <x, A' y>."""
        ...


def kept(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """The denoiser for data that are known exactly in a part, where the clean latent is set to them.

    Args:
        denoise: (z, t) -> x.
        known: (N, C, X, Y, Z), of any value where it is not known.
        mask: 1 where it is known, 0 elsewhere, or shares in between; broadcasts against `known`.
    """
    return lambda z, t: torch.lerp(denoise(z, t), known, mask.to(known))


def consistent(denoise: Denoiser, operator: Operator, y: Tensor, process: Process, iterations: int = 5) -> Denoiser:
    """The denoiser given a measurement, E[x | z, y] = x' + C A' (A C A' + s^2)^-1 (y - A x') with x' = E[x | z].

    C = sigma^2 / alpha dx'/dz (second-order Tweedie), which is exact for an exact denoiser; that x given z is Gaussian with
    it is the approximation (Rozet et al. 2024, eq. 11-14). The system is solved by conjugate gradients, each of whose
    iterations is a backward pass through the denoiser. Near pure noise (alpha < 0.001) the answer is x' itself.

    Args:
        denoise: (z, t) -> x; differentiable, which the result is not.
        operator: A and s.
        y: the measurement, (N, ...).
        process: that z follows.
        iterations: of conjugate gradients.
    """

    def informed(z: Tensor, t: float) -> Tensor:
        alpha, sigma = process.alpha(t), process.sigma(t)
        if alpha < ALPHA_FLOOR:
            return denoise(z, t)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x = denoise(z, t)

        def covariance(v: Tensor) -> Tensor:  # C v; C is symmetric, so the transposed Jacobian serves
            return sigma**2 / alpha * torch.autograd.grad(x, z, v, retain_graph=True)[0]

        def system(w: Tensor) -> Tensor:
            return operator(covariance(operator.transpose(w))) + operator.noise_std**2 * w

        weights = conjugate_gradients(system, y - operator(x.detach()), iterations)
        return x.detach() + covariance(operator.transpose(weights))

    return informed


def conjugate_gradients(
    system: Callable[[Tensor], Tensor],
    b: Tensor,
    iterations: int,
    precondition: Callable[[Tensor], Tensor] = lambda v: v,
    tolerance: float = 0.0,
) -> Tensor:
    """w of system(w) = b, for a symmetric positive system of each sample (Hestenes & Stiefel 1952); like b, (N, ...).

    Args:
        system: the matrix times a vector, of each sample alone.
        b: the right-hand side.
        iterations: at most.
        precondition: the inverse of a matrix like the system's, times a vector; symmetric and positive, too.
        tolerance: stop where the residuals of all samples are below this share of b, in the norm of `precondition`.
    """

    def inner(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, *[1] * (u.ndim - 1))

    w, residual = torch.zeros_like(b), b
    direction = precondition(residual)
    size = first = inner(residual, direction)
    for _ in range(iterations):
        image = system(direction)
        step = size / inner(direction, image).clamp_min(torch.finfo(b.dtype).tiny)
        w, residual = w + step * direction, residual - step * image
        conditioned = precondition(residual)
        before, size = size, inner(residual, conditioned)
        if tolerance and (size <= tolerance**2 * first).all():
            break
        direction = conditioned + size / before.clamp_min(torch.finfo(b.dtype).tiny) * direction
    return w
