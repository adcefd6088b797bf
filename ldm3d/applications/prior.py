"""What a trained model knows of latents before it sees a scan: what it expects at each noise level, and how widely.

Legend: x clean latent, z noisy latent, (N, c, x, y, z), padded as the U-Net takes them; t time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ldm3d.covariates import Value
from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.gaussian import Gaussian
from ldm3d.diffusion.process import time_of_ratio
from ldm3d.pipeline import Pipeline
from ldm3d.start import features

LOWEST = 0.05  # sigma / alpha of the last level: what is below is less than the remainder
HIGHEST = 10.0  # of the first level after pure noise


class Prior(NamedTuple):
    """What is expected of latents.

    Attributes:
        denoise: (z, t) -> E[x | z].
        spread: t -> covariance of x given z_t.
    """

    denoise: Denoiser
    spread: Callable[[float], Gaussian]


def prior_of(pipe: Pipeline, row: Mapping[str, Value]) -> Prior:
    """By a model, of people with these covariates, from `Pipeline.parse`."""
    return Prior(pipe.denoiser([row]), spread_of(pipe, row, latent_shape(pipe)))


def latent_shape(pipe: Pipeline) -> tuple[int, ...]:
    """(c, x, y, z), padded as the U-Net takes it."""
    channels, *latent = pipe.autoencoder.latent_shape(pipe.grid.shape)
    return channels, *pipe.unet.padded_shape(latent)


def level_times(pipe: Pipeline, levels: int) -> list[float]:
    """Times of the levels: pure noise; then even in log(sigma / alpha), from HIGHEST or where a network takes over; and 0."""
    first = min(pipe.start.until, HIGHEST) if pipe.start is not None else HIGHEST
    ratios = np.geomspace(first, LOWEST, levels - 1).tolist() if levels > 1 else []
    # Just below the first: there the network denoises, not what starts
    return [1.0, *(time_of_ratio(pipe.process, 0.999 * ratio) for ratio in ratios), 0.0]


def spread_of(pipe: Pipeline, row: Mapping[str, Value], shape: Sequence[int]) -> Callable[[float], Gaussian]:
    """t -> covariance of x given z_t: of the Gaussian that the model starts with; else of white latents.

    For Gaussian latents it is exact. A network knows more than a Gaussian at low noise, and there the spread is too wide.
    """
    if pipe.start is None:
        return white_spread(pipe, shape)
    values, known = features(pipe.schema.encode([row]).to(pipe.device), pipe.start.num_categories)
    return _narrowed(pipe, pipe.start.gaussian.given(values, known[0]))


def white_spread(pipe: Pipeline, shape: Sequence[int]) -> Callable[[float], Gaussian]:
    """The same of latents whose channels have their own variances, and are white."""
    rest = torch.tensor(pipe.scales or [1.0] * shape[0], device=pipe.device) ** 2
    return _narrowed(pipe, Gaussian(*(rest.new_zeros(size) for size in (tuple(shape), (0, *shape), (0,))), rest))


def _narrowed(pipe: Pipeline, prior: Gaussian) -> Callable[[float], Gaussian]:
    return lambda t: prior.narrowed((pipe.process.alpha(t) / pipe.process.sigma(t)) ** 2)
