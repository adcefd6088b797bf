"""Descriptors of a volume for the audit: 256 numbers in each of two spaces, and a coarse volume for the third.

- image: the volume averaged to at most 24 positions an axis, brought to mean 0 and deviation 1 (a copy in another brightness
  is a copy), and projected onto 256 random directions.
- latent: the mean of the encoder's posterior, normalised, averaged to at most 12 positions an axis, and projected likewise.
- embedding: of the coarse volume by a small network, see embedding.py.

A random projection onto D directions keeps distances to within 1 / sqrt(2 D) of themselves, 4% here (after Johnson and
Lindenstrauss 1984), and keeps a fiftieth of the directions of a coarse volume of 24^3 positions.

A copy may be mirrored or moved. So a synthetic volume has several views, and its distance to a training volume is that of the
nearest: 54 of the image (unchanged and mirrored, moved by -1, 0 or 1 voxel along each axis), two of the latent and of the
coarse volume (unchanged and mirrored; each further view takes a pass through the encoder). Training volumes have one view.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.errors import InputError
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator

COARSE_SIDE, LATENT_SIDE = 24, 12  # positions of an axis, at most
PROJECTION_SIZE = 256
SHIFTS = sorted(itertools.product((-1, 0, 1), repeat=3), key=lambda shift: sum(map(abs, shift)))  # no shift comes first


@dataclass
class Descriptors:
    """Of one volume; float32 on the CPU. The first view is the unchanged volume.

    Attributes:
        latent: (views, 256).
        image: (views, 256).
        coarse: (views, C, a, b, c), each channel of mean 0 and deviation 1.
    """

    latent: Tensor
    image: Tensor
    coarse: Tensor


@torch.no_grad()
def descriptors_of(pipeline: Pipeline, volume: NDArray, views: bool = True) -> Descriptors:
    """Descriptors of a volume.

    Args:
        pipeline: whose autoencoder makes the latent.
        volume: (C, X, Y, Z) in [0, 1], on the pipeline's grid, or on its output grid if it crops. Planes that
            generated volumes lose are set to 0.
        views: all of them, for a synthetic volume; or one, for a training volume.

    Raises:
        InputError: not the shape of one of the grids.
    """
    whole, cropped = ((pipeline.autoencoder.in_channels, *grid.shape) for grid in (pipeline.grid, pipeline.output_grid))
    if volume.shape == whole:
        volume = pipeline.cropped(volume)
    if volume.shape != cropped:
        raise InputError(f"a volume is {volume.shape}, with its channels, and the model's {whole}; bring it there")
    volume = np.pad(volume, ((0, 0), *pipeline.crop))
    x = torch.as_tensor(np.ascontiguousarray(volume, np.float32), device=pipeline.device)  # (C, X, Y, Z)
    coarse = coarse_volumes(x, SHIFTS if views else SHIFTS[:1])  # (shifts, C, a, b, c)
    latents = [_latent(pipeline, x)]
    unmoved = coarse[:1]
    if views:  # the mirror image of an average is the average of the mirror image: the bins are symmetric
        coarse = torch.cat([coarse, coarse.flip(2)])
        latents.append(_latent(pipeline, x.flip(1)))
        unmoved = torch.cat([unmoved, unmoved.flip(2)])
    return Descriptors(_project(torch.stack(latents), "latent"), _project(coarse, "image"), unmoved.cpu())


def coarse_volumes(volume: Tensor, shifts: Sequence[tuple[int, int, int]] = SHIFTS[:1]) -> Tensor:
    """A volume (C, X, Y, Z), moved by whole voxels, at half the resolution or less: (shifts, C, a, b, c), standardised."""
    sides = [min(COARSE_SIDE, -(-n // 2)) for n in volume.shape[1:]]
    padded = F.pad(volume, (1,) * 6, mode="replicate")
    found = []
    for shift in shifts:
        x, y, z = (slice(1 - by, 1 - by + n) for by, n in zip(shift, volume.shape[1:]))
        found.append(F.adaptive_avg_pool3d(padded[:, x, y, z], sides))
    coarse = torch.stack(found)
    deviation, mean = torch.std_mean(coarse, dim=(2, 3, 4), keepdim=True)
    return (coarse - mean) / deviation.clamp_min(1e-6)


def _latent(pipeline: Pipeline, x: Tensor) -> Tensor:
    """Normalised mean of the posterior of (C, X, Y, Z), averaged to a coarse grid: (c, a, b, c)."""
    z = pipeline.autoencoder.encode_stage_2_inputs(x[None].to(pipeline.dtype)).float()
    return F.adaptive_avg_pool3d(z, [min(LATENT_SIDE, n) for n in z.shape[2:]])[0]


def _project(values: Tensor, space: str) -> Tensor:
    """(n, ...) -> (n, 256), on the CPU."""
    values = values.flatten(1).cpu()
    return values @ _directions(space, values.shape[1])


@functools.lru_cache(maxsize=4)
def _directions(space: str, inputs: int) -> Tensor:
    """Random directions, the same on every machine."""
    return torch.randn(inputs, PROJECTION_SIZE, generator=generator("audit", space, inputs)) / PROJECTION_SIZE**0.5
