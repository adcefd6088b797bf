"""Scales of latent channels: how much each changes the voxels, and how much each varies."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.models.autoencoder import LatentSpace
from ldm3d.randomness import generator

CHANGE = 0.1  # of a normalised latent, small enough that the decoder answers linearly


def voxel_scales(autoencoder: LatentSpace, volumes: Tensor) -> Tensor:
    """`voxel_changes` of each channel, (c,), divided by their geometric mean."""
    changes = voxel_changes(autoencoder, volumes).clamp_min(1e-6)
    return changes / changes.log().mean().exp()


@torch.no_grad()
def voxel_changes(autoencoder: LatentSpace, volumes: Tensor, change: float = CHANGE) -> Tensor:
    """Root mean square change of the voxels when white noise is added to one channel after the other, for a unit of noise.

    Args:
        autoencoder: with the statistics of its latents, which are normalised.
        volumes: (N, C, X, Y, Z) in [0, 1].
        change: deviation of the noise.

    Returns:
        (c,), float32 on the CPU.
    """
    changes = torch.zeros(autoencoder.latent_channels, dtype=torch.float64)
    for i, volume in enumerate(volumes):
        z = autoencoder.encode_stage_2_inputs(volume[None])
        decoded = autoencoder.decode_stage_2_outputs(z).float()
        noise = change * torch.randn(z[0, 0].shape, generator=generator("voxel changes", i)).to(z)
        for channel in range(len(changes)):
            moved = z.clone()
            moved[:, channel] += noise
            changes[channel] += (autoencoder.decode_stage_2_outputs(moved).float() - decoded).square().mean().cpu()
    return (changes / len(volumes)).sqrt().float() / change


def deviations(autoencoder: LatentSpace, moments: NDArray, rows: list[int]) -> tuple[float, ...]:
    """Standard deviation of each channel of normalised latents.

    Args:
        autoencoder: which normalises them.
        moments: the latent cache, (scans, 2c, x, y, z).
        rows: of the training split.
    """
    total = torch.zeros(2, autoencoder.latent_channels, dtype=torch.float64)
    for row in rows:
        mean, log_variance = torch.from_numpy(np.array(moments[row], np.float32)).double().chunk(2)
        total += torch.stack([mean, mean.square() + log_variance.exp()]).mean(dim=(2, 3, 4))
    mean, square = total / len(rows)
    return tuple(((square - mean.square()).clamp_min(1e-12).sqrt() / autoencoder.latent_std.double().cpu()).tolist())
