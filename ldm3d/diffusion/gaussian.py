"""The best denoiser for Gaussian data, in closed form: a ruler for networks, and the coarse part of sampling.

Legend: x clean latent, e noise, z = alpha x + sigma e, all (N, C, X, Y, Z); m mean, U (D, k) directions with variances V,
R a variance for each channel: x ~ N(m, U V U' + R). D = C X Y Z. With features f (p,) of the covariates and slopes B (D, p):
x ~ N(m + B f, U V U' + R), where the features are Gaussian, too, so that missing ones are integrated out.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import BatchDenoiser, Denoiser
from ldm3d.diffusion.process import Process, as_double

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def full_precision(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """The same function out of autocast: in bfloat16 a system whose parts are large and small has another solution."""

    @functools.wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return called


@dataclass(frozen=True)
class Gaussian:
    """N(m, U V U' + R), from few samples of many dimensions (probabilistic principal components, Tipping & Bishop 1999).

    Attributes:
        mean: m, (C, X, Y, Z); or (N, C, X, Y, Z), one for each row of a batch.
        directions: U, (k, C, X, Y, Z).
        variances: V, (k,), beyond R.
        rest: R, (C,): variance of each channel in all other directions.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor

    def denoiser(self, process: Process) -> BatchDenoiser:
        """(z, t) -> E[x | z], see `posterior_mean`; t is a float or (N,)."""
        roots = torch.diag(self.variances.sqrt())[None]
        return lambda z, t: posterior_mean(z, t, process, self.mean, self.directions, self._grams, roots, self.rest)

    @functools.cached_property
    def _grams(self) -> Tensor:
        return grams(self.directions)

    @full_precision
    def covariance(self, v: Tensor) -> Tensor:
        """(U V U' + R) v, like v (N, C, X, Y, Z)."""
        scores = torch.einsum("kcxyz,ncxyz->nk", self.directions, v) * self.variances
        return torch.einsum("nk,kcxyz->ncxyz", scores, self.directions) + self.rest[:, None, None, None] * v

    @full_precision
    def precision(self, v: Tensor) -> Tensor:
        """(U V U' + R)^-1 v, like v, by Woodbury's identity; R above 0."""
        weighed = v / self.rest[:, None, None, None]
        root = self.variances.sqrt()
        scores = root * ((torch.einsum("kcxyz,ncxyz->nk", self.directions, weighed) * root) @ self._inner_of_rest)
        return weighed - torch.einsum("nk,kcxyz->ncxyz", scores, self.directions) / self.rest[:, None, None, None]

    @full_precision
    def narrowed(self, precision: float | Tensor) -> "Gaussian":
        """What is left of the covariance after a look at x with noise of this precision, (S^-1 + p)^-1; the mean as it was.

        Args:
            precision: p, one number, or one for each channel (C,); alpha^2 / sigma^2 gives the covariance of x given z.
        """
        shrink = 1 / (1 + precision * self.rest)  # (C,)
        values, vectors = torch.linalg.eigh(self._inner(precision * shrink))
        mixing = self.variances.sqrt()[:, None] * vectors * values.clamp_min(0).sqrt()  # M = mixing mixing'
        directions = torch.einsum("kj,kcxyz->jcxyz", mixing, self.directions) * shrink[:, None, None, None]
        return Gaussian(self.mean, directions, torch.ones_like(self.variances), self.rest * shrink)

    @functools.cached_property
    def _inner_of_rest(self) -> Tensor:
        return self._inner(1 / self.rest)

    def _inner(self, weights: Tensor) -> Tensor:
        """(1 + V^1/2 U' w U V^1/2)^-1, (k, k), with weights (C,)."""
        scaled = self.directions * self.variances.sqrt()[:, None, None, None, None]
        system = torch.einsum("icxyz,jcxyz,c->ij", scaled, scaled, weights.to(scaled))
        return torch.linalg.inv(torch.eye(len(system)).to(system) + system)

    @full_precision
    def sample(self, noise: Tensor, scores: Tensor) -> Tensor:
        """x (N, C, X, Y, Z) from standard normal `noise`, like x, and `scores` (N, k)."""
        along = torch.einsum("nk,kcxyz->ncxyz", scores.to(self.mean) * self.variances.sqrt(), self.directions)
        return self.mean + along + noise.to(self.mean) * self.rest.sqrt()[:, None, None, None]


@dataclass(frozen=True)
class ConditionalGaussian:
    """N(m + B f, U V U' + R) with f ~ N(a, A).

    Attributes:
        residual: N(m, U V U' + R).
        slopes: B, (p, C, X, Y, Z).
        centre: a, (p,).
        covariance: A, (p, p).
    """

    residual: Gaussian
    slopes: Tensor
    centre: Tensor
    covariance: Tensor

    @full_precision
    def given(self, features: Tensor, known: Tensor) -> Gaussian:
        """The distribution of x given some of the features, with a mean for each row.

        Args:
            features: f, (N, p); whatever stands where a feature is missing.
            known: (p,), which features are given; the same ones in every row.
        """
        features, missing = features.to(self.centre), ~known
        expected, roots = self._missing(features, known)
        features = features.index_copy(1, missing.nonzero()[:, 0], expected)
        spread = torch.einsum("pk,pcxyz->kcxyz", roots, self.slopes[missing])
        directions = torch.cat([self.residual.directions, spread])
        variances = torch.cat([self.residual.variances, roots.new_ones(len(roots))])
        mean = self.residual.mean + torch.einsum("np,pcxyz->ncxyz", features, self.slopes)
        return Gaussian(mean, directions, variances, self.residual.rest)

    @full_precision
    def denoiser(self, features: Tensor, known: Tensor, process: Process) -> BatchDenoiser:
        """(z, t) -> E[x | z, known features]; features and known (N, p), a row for each of the batch, t a float or (N,).

        A feature that is missing is one more component of its row: its slopes, with the variance that the known ones leave.
        """
        count = len(self.residual.directions)
        filled = features.to(self.centre).clone()
        roots = filled.new_zeros(len(filled), count + len(self.centre), count + len(self.centre))
        roots[:, range(count), range(count)] = self.residual.variances.sqrt()
        for pattern, rows in patterns_of(known.bool()):
            expected, left = self._missing(filled[rows], pattern)
            missing = (~pattern).nonzero()[:, 0]
            filled[rows[:, None], missing] = expected
            roots[rows[:, None, None], count + missing[:, None], count + missing] = left
        mean = self.residual.mean + torch.einsum("np,pcxyz->ncxyz", filled, self.slopes)
        rest, directions, products = self.residual.rest, self._directions, self._grams
        return lambda z, t: posterior_mean(z, t, process, mean, directions, products, roots, rest)

    @full_precision
    def left(self, t: float | Tensor, process: Process) -> Tensor:
        """Standard deviation of x given z and all features, by channel: (N, C) for times (N,), (1, C) for a float.

        The root of the mean over positions of each channel. The components count as if each were there alone, so it is a
        scale, not an estimate.
        """
        alpha, sigma = _ratios(process, t, self.residual.rest)
        directions, variances, rest = self.residual.directions, self.residual.variances, self.residual.rest
        shares = directions.square().flatten(2).sum(dim=2)  # (k, C)
        known = alpha**2 * rest + sigma**2  # (N, C)
        along = 1 / (1 / variances.clamp_min(1e-12) + alpha**2 * (1 / known) @ shares.T)  # (N, k)
        shrink = sigma**2 / known  # what z leaves of a channel where the components are uncertain, see `Gaussian.narrowed`
        return (rest * shrink + shrink**2 * (along @ shares) / math.prod(directions.shape[2:])).sqrt()

    def _missing(self, features: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """What the known features (p,) lead to expect of the missing ones, (N, missing), and a root of their covariance."""
        if known.all():
            return features[:, ~known], features.new_zeros(0, 0)
        weights, left = regression(self.covariance, known)
        values, vectors = torch.linalg.eigh(left)
        expected = self.centre[~known] + (features[:, known] - self.centre[known]) @ weights
        return expected, vectors * values.clamp_min(0).sqrt()

    @functools.cached_property
    def _directions(self) -> Tensor:
        """The components', then the features', (k + p, C, X, Y, Z)."""
        return torch.cat([self.residual.directions, self.slopes])

    @functools.cached_property
    def _grams(self) -> Tensor:
        return grams(self._directions)


@full_precision
def posterior_mean(
    z: Tensor,
    t: float | Tensor,
    process: Process,
    mean: Tensor,
    directions: Tensor,
    products: Tensor,
    roots: Tensor,
    rest: Tensor,
) -> Tensor:
    """E[x | z] = m + alpha S (alpha^2 S + sigma^2)^-1 (z - alpha m) with S = U L L' U' + R; of the type of z.

    By Woodbury's identity the system has the size of the components, k.

    Args:
        z: (N, C, X, Y, Z).
        t: a float, or (N,).
        process: of the diffusion.
        mean: m, (C, X, Y, Z) or (N, C, X, Y, Z).
        directions: U, (k, C, X, Y, Z).
        products: their `grams`.
        roots: L, (N or 1, k, k).
        rest: R, (C,).
    """
    alpha, sigma = (each[..., None] for each in _ratios(process, t, rest))  # (N or 1, 1, 1)
    known = alpha**2 * rest[:, None] + sigma**2  # A, (N or 1, C, 1)
    u = directions.flatten(2)  # (k, C, positions)
    centred = z.to(mean).flatten(2) - alpha * mean.flatten(-3)  # (N, C, positions)
    # x = m + U L s + what is left: E[s | z] = (1 + alpha^2 L' U' A^-1 U L)^-1 alpha L' U' A^-1 (z - alpha m)
    system = torch.einsum("cij,nc->nij", products, 1 / known[..., 0])
    system = torch.eye(roots.shape[1]).to(u) + alpha**2 * roots.mT @ system @ roots  # (N or 1, k, k)
    seen = alpha * roots.mT @ torch.einsum("kcp,ncp->nk", u, centred / known)[..., None]  # (N, k, 1)
    solved = roots @ torch.linalg.solve(system.expand(len(seen), -1, -1), seen)
    along = torch.einsum("nk,kcp->ncp", solved[..., 0], u)
    x = mean + (along + alpha * rest[:, None] / known * (centred - alpha * along)).reshape(z.shape)
    return x.to(z)


def grams(directions: Tensor) -> Tensor:
    """U_c' U_c of each channel, (C, k, k), of directions (k, C, X, Y, Z)."""
    u = directions.flatten(2)
    return torch.einsum("icp,jcp->cij", u, u)


def _ratios(process: Process, t: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma as columns, (N or 1, 1), on the device and of the type of `like`."""
    t = as_double(t).reshape(-1, 1)
    return process.alpha(t).to(like), process.sigma(t).to(like)


def patterns_of(known: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each pattern (p,) among rows (N, p), and the numbers of its rows."""
    patterns, which = torch.unique(known, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        yield pattern, (which == number).nonzero()[:, 0]


def regression(covariance: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the known features for the missing ones, (known, missing), and the covariance that is left of these."""
    among, across = covariance[known][:, known], covariance[known][:, ~known]
    weights = torch.linalg.solve(among, across)
    return weights, covariance[~known][:, ~known] - across.T @ weights


def denoising_errors(denoise: Denoiser, x: Tensor, noise: Tensor, times: Sequence[float], process: Process) -> Tensor:
    """Mean square of x - E[x | z_t] at each time and in each channel, (times, C); x and noise (N, C, X, Y, Z)."""
    errors = [(denoise(process.add_noise(x, noise, t), t) - x).square().mean(dim=(0, 2, 3, 4)) for t in times]
    return torch.stack(errors)
