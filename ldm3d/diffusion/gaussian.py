"""The best denoiser for Gaussian data, in closed form: a ruler for networks, and samples without a network.

Legend: x clean latent, e noise, z = alpha x + sigma e, all (N, C, X, Y, Z); m mean, U (D, k) orthonormal directions with
variances V, R a variance for each channel: x ~ N(m, U V U' + R). D = C X Y Z.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.process import Process
from ldm3d.errors import InputError


@dataclass(frozen=True)
class Gaussian:
    """N(m, U V U' + R), from few samples of many dimensions (probabilistic principal components, Tipping & Bishop 1999).

    Attributes:
        mean: m, (C, X, Y, Z).
        directions: U, (k, C, X, Y, Z), orthonormal.
        variances: V, (k,), beyond R.
        rest: R, (C,): variance of each channel in all other directions.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor

    def denoiser(self, process: Process) -> Denoiser:
        """(z, t) -> E[x | z] = m + alpha S (alpha^2 S + sigma^2)^-1 (z - alpha m) with S = U V U' + R.

        By Woodbury's identity the system has the size of the components, k. The answer has the type of z.
        """
        u = self.directions.flatten(2)  # (k, C, positions)
        gram = torch.einsum("icp,jcp->cij", u, u)  # U_c' U_c of each channel

        def denoise(z: Tensor, t: float) -> Tensor:
            alpha, sigma = process.alpha(t), process.sigma(t)
            known = alpha**2 * self.rest + sigma**2  # A, (C,)
            centred = (z.to(self.mean) - alpha * self.mean).flatten(2)  # (N, C, positions)
            # (A + U W U')^-1 = A^-1 - A^-1 U W^1/2 (1 + W^1/2 U' A^-1 U W^1/2)^-1 W^1/2 U' A^-1 with W = alpha^2 V
            root = alpha * self.variances.sqrt()
            system = torch.eye(len(root)).to(u) + root[:, None] * root * (gram / known[:, None, None]).sum(dim=0)
            scores = root * torch.einsum("kcp,ncp->nk", u, centred / known[:, None])
            inner = root * torch.linalg.solve(system, scores.T).T  # (N, k)
            solved = (centred - torch.einsum("nk,kcp->ncp", inner, u)) / known[:, None]
            along = torch.einsum("nk,kcp->ncp", torch.einsum("kcp,ncp->nk", u, solved) * self.variances, u)
            x = self.mean + (alpha * (along + self.rest[:, None] * solved)).reshape(z.shape)
            return x.to(z)

        return denoise

    def sample(self, noise: Tensor, scores: Tensor) -> Tensor:
        """x (N, C, X, Y, Z) from standard normal `noise`, like x, and `scores` (N, k)."""
        along = torch.einsum("nk,kcxyz->ncxyz", scores.to(self.mean) * self.variances.sqrt(), self.directions)
        return self.mean + along + noise.to(self.mean) * self.rest.sqrt()[:, None, None, None]


def fit_gaussian(x: Tensor, components: int, folds: int = 5) -> Gaussian:
    """Mean and principal components of data; variances from data that the components were not computed from.

    Variances within the sample are too large along the first components and too small elsewhere where there are fewer samples
    than dimensions. Here component i has the mean square of left-out samples along the i-th component of the others, and a
    channel's rest is what the components of the others leave of it.

    Args:
        x: (N, C, X, Y, Z).
        components: k, fewer than the samples of all folds but one.
        folds: of the cross-validation; sample n is in fold n mod folds.

    Raises:
        InputError: too few samples.
    """
    count = len(x)
    if folds < 2 or count - -(-count // folds) <= components:
        raise InputError(
            f"{components} components of {count} samples in {folds} folds: a fold's others must be more than the components; "
            f"ask for at most {max(count - -(-count // max(folds, 2)) - 1, 0)}"
        )
    x = x.double()
    fold = torch.arange(count) % folds
    along, beyond = torch.zeros(components, dtype=x.dtype), torch.zeros(x.shape[1], dtype=x.dtype)
    for f in range(folds):
        mean, directions = _principal_components(x[fold != f], components)
        left_out = (x[fold == f] - mean).flatten(1)
        scores = left_out @ directions.T
        along += scores.square().sum(dim=0)
        beyond += (left_out - scores @ directions).reshape(-1, *x.shape[1:]).square().sum(dim=(0, 2, 3, 4))
    positions = x[0, 0].numel()
    rest = beyond / (count * (positions - components / x.shape[1]))  # the components take k of C X Y Z dimensions
    mean, directions = _principal_components(x, components)
    directions = directions.reshape(components, *x.shape[1:])
    of_rest = torch.einsum("kcxyz,c->k", directions.square(), rest)
    return Gaussian(*(v.float() for v in (mean, directions, (along / count - of_rest).clamp_min(0), rest)))


def _principal_components(x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(mean, (k, D)) of samples fewer than dimensions, by their Gram matrix."""
    mean = x.mean(dim=0)
    rows = (x - mean).flatten(1)
    values, vectors = torch.linalg.eigh(rows @ rows.T)  # ascending
    leading = vectors.flip(1)[:, :components]
    return mean, (leading / values.flip(0)[:components].clamp_min(1e-30).sqrt()).T @ rows


def denoising_errors(denoise: Denoiser, x: Tensor, noise: Tensor, times: Sequence[float], process: Process) -> Tensor:
    """Mean square of x - E[x | z_t] at each time and in each channel, (times, C); x and noise (N, C, X, Y, Z)."""
    errors = [(denoise(process.add_noise(x, noise, t), t) - x).square().mean(dim=(0, 2, 3, 4)) for t in times]
    return torch.stack(errors)
