"""The best denoiser for Gaussian data, in closed form: a ruler for networks, and the coarse part of sampling.

Legend: x clean latent, e noise, z = alpha x + sigma e, all (N, C, X, Y, Z); m mean, U (D, k) directions with variances V,
R a variance for each channel: x ~ N(m, U V U' + R). D = C X Y Z. With features f (p,) of the covariates and slopes B (D, p):
x ~ N(m + B f, U V U' + R), where the features are Gaussian, too, so that missing ones are integrated out.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.process import Process
from ldm3d.errors import InputError

RIDGE = 1e-3  # in units of a feature's variance
FOLDS = 5  # of a cross-validation; sample n is in fold n mod folds

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

    @full_precision
    def denoiser(self, process: Process) -> Denoiser:
        """(z, t) -> E[x | z] = m + alpha S (alpha^2 S + sigma^2)^-1 (z - alpha m) with S = U V U' + R.

        By Woodbury's identity the system has the size of the components, k. The answer has the type of z.
        """
        u = self.directions.flatten(2)  # (k, C, positions)
        gram = torch.einsum("icp,jcp->cij", u, u)  # U_c' U_c of each channel

        @full_precision
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


def most_components(count: int, folds: int = FOLDS) -> int:
    """How many components `fit_gaussian` can find in `count` samples: fewer than those of all folds but one."""
    return max(count - -(-count // max(folds, 2)) - 1, 0)


def fit_gaussian(x: Tensor, components: int, folds: int = FOLDS) -> Gaussian:
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
            f"ask for at most {most_components(count, folds)}"
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
        if missing.any():
            weights, left = _regression(self.covariance, known)
            expected = self.centre[missing] + (features[:, known] - self.centre[known]) @ weights
            features = features.index_copy(1, missing.nonzero()[:, 0], expected)
            values, vectors = torch.linalg.eigh(left)
            spread = torch.einsum("pk,pcxyz->kcxyz", vectors * values.clamp_min(0).sqrt(), self.slopes[missing])
            directions = torch.cat([self.residual.directions, spread])
            variances = torch.cat([self.residual.variances, values.new_ones(len(values))])
        else:
            directions, variances = self.residual.directions, self.residual.variances
        mean = self.residual.mean + torch.einsum("np,pcxyz->ncxyz", features, self.slopes)
        return Gaussian(mean, directions, variances, self.residual.rest)

    def denoiser(self, features: Tensor, known: Tensor, process: Process) -> Denoiser:
        """(z, t) -> E[x | z, known features]; features and known (N, p), a row for each of the batch.

        Rows with the same features known are one Gaussian. Each is asked for the whole batch, so that a row's last bits do
        not depend on the others.
        """
        patterns, which = torch.unique(known.bool(), dim=0, return_inverse=True)
        denoisers = [self.given(features, pattern).denoiser(process) for pattern in patterns]

        def denoise(z: Tensor, t: float) -> Tensor:
            x = denoisers[0](z, t)
            for number, other in enumerate(denoisers[1:], start=1):
                x = torch.where((which == number)[:, None, None, None, None], other(z, t), x)
            return x

        return denoise


def fit_conditional(x: Tensor, features: Tensor, known: Tensor, components: int, folds: int = FOLDS) -> ConditionalGaussian:
    """Fit the features' own Gaussian, then x to them by least squares, then `fit_gaussian` to what is left.

    A missing feature has the value that the others lead to expect.

    Args:
        x: (N, C, X, Y, Z).
        features: (N, p), of unit scale.
        known: (N, p), which of them are given.
        components, folds: see `fit_gaussian`.

    Raises:
        InputError: too few samples.
    """
    x, known = x.double(), known.bool()
    centre, covariance = fit_incomplete(features, known)
    filled = _filled(features.double(), known, centre, covariance)[0] - centre
    # A little ridge: features may be too many, or follow from each other
    gram = filled.T @ filled + RIDGE * len(x) * torch.eye(filled.shape[1], dtype=x.dtype)
    slopes = torch.linalg.solve(gram, filled.T @ (x - x.mean(dim=0)).flatten(1)).reshape(-1, *x.shape[1:])
    at_zero = torch.einsum("np,pcxyz->ncxyz", filled + centre, slopes)
    residual = fit_gaussian(x - at_zero, components, folds)
    return ConditionalGaussian(residual, *(v.float() for v in (slopes, centre, covariance)))


def fit_incomplete(values: Tensor, known: Tensor, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """Mean (p,) and covariance (p, p) of Gaussian rows (N, p) of which some entries are missing, by expectation maximisation
    (Little & Rubin 2002, section 11.2)."""
    values, known = values.double(), known.bool()
    count = known.sum(dim=0).clamp_min(1)
    centre = torch.where(known, values, 0).sum(dim=0) / count
    spread = torch.where(known, (values - centre).square(), 0).sum(dim=0) / count
    covariance = torch.diag(spread + RIDGE)
    for _ in range(rounds if not known.all() else 1):
        filled, left = _filled(values, known, centre, covariance)
        centre = filled.mean(dim=0)
        rows = filled - centre
        covariance = (rows.T @ rows + left) / len(values) + RIDGE * torch.eye(len(centre), dtype=values.dtype)
    return centre, covariance


def _filled(values: Tensor, known: Tensor, centre: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with the expected values where there are none, and the sum of the covariances of what was missing, (p, p)."""
    filled, total = values.clone(), torch.zeros_like(covariance)
    patterns, which = torch.unique(known, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows, missing = (which == number).nonzero()[:, 0], ~pattern
        if missing.any():
            weights, left = _regression(covariance, pattern)
            expected = centre[missing] + (values[rows][:, pattern] - centre[pattern]) @ weights
            filled[rows[:, None], missing.nonzero()[:, 0]] = expected
            total[missing.nonzero(), missing.nonzero()[:, 0]] += len(rows) * left
    return filled, total


def _regression(covariance: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the known features for the missing ones, (known, missing), and the covariance that is left of these."""
    among, across = covariance[known][:, known], covariance[known][:, ~known]
    weights = torch.linalg.solve(among, across)
    return weights, covariance[~known][:, ~known] - across.T @ weights


def _principal_components(x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(mean, (k, D)), by the Gram matrix of the samples or, where they are more than the dimensions, by their covariance."""
    mean = x.mean(dim=0)
    rows = (x - mean).flatten(1)
    if len(rows) > rows.shape[1]:
        return mean, torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, :components].T
    values, vectors = torch.linalg.eigh(rows @ rows.T)  # ascending
    leading = vectors.flip(1)[:, :components]
    return mean, (leading / values.flip(0)[:components].clamp_min(1e-30).sqrt()).T @ rows


def denoising_errors(denoise: Denoiser, x: Tensor, noise: Tensor, times: Sequence[float], process: Process) -> Tensor:
    """Mean square of x - E[x | z_t] at each time and in each channel, (times, C); x and noise (N, C, X, Y, Z)."""
    errors = [(denoise(process.add_noise(x, noise, t), t) - x).square().mean(dim=(0, 2, 3, 4)) for t in times]
    return torch.stack(errors)
