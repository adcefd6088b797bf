"""Gaussians fitted to latents: principal components whose variances come from left-out samples, and slopes of covariates.

Legend: as in `ldm3d.diffusion.gaussian`.
"""

import torch
from torch import Tensor

from ldm3d.diffusion.gaussian import ConditionalGaussian, Gaussian, patterns_of, regression
from ldm3d.errors import InputError

RIDGE = 1e-3  # in units of a feature's variance
FOLDS = 5  # of a cross-validation; sample n is in fold n mod folds


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
    for pattern, rows in patterns_of(known):
        missing = ~pattern
        if missing.any():
            weights, left = regression(covariance, pattern)
            expected = centre[missing] + (values[rows][:, pattern] - centre[pattern]) @ weights
            filled[rows[:, None], missing.nonzero()[:, 0]] = expected
            total[missing.nonzero(), missing.nonzero()[:, 0]] += len(rows) * left
    return filled, total


def _principal_components(x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(mean, (k, D)), by the Gram matrix of the samples or, where they are more than the dimensions, by their covariance."""
    mean = x.mean(dim=0)
    rows = (x - mean).flatten(1)
    if len(rows) > rows.shape[1]:
        return mean, torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, :components].T
    values, vectors = torch.linalg.eigh(rows @ rows.T)  # ascending
    leading = vectors.flip(1)[:, :components]
    return mean, (leading / values.flip(0)[:components].clamp_min(1e-30).sqrt()).T @ rows
