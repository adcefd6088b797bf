"""Maps of a U-Net's cross-attention: the weights of each covariate's tokens on the latent grid.

Attention kernels do not return weights. While maps are recorded, softmax(q k^T / sqrt(D)) is computed once more; otherwise
nothing is added to the network.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm3d.models.blocks import TransformerBlock
from ldm3d.models.unet import LatentUNet, UNet


class AttentionMaps:
    """Weights of cross-attention, summed over heads and calls of the network; made by `recorded`.

    Args:
        samples: N; of larger batches the first N are recorded, which are the conditional ones under guidance.
        num_covariates: K; neighbouring tokens are one covariate's.
    """

    def __init__(self, samples: int, num_covariates: int):
        self.samples, self.num_covariates = samples, num_covariates
        self._sums: dict[TransformerBlock, Tensor] = {}  # (N, K, X, Y, Z) of each block, on its own grid
        self._levels: dict[TransformerBlock, int] = {}
        self._calls: dict[TransformerBlock, int] = {}

    def __bool__(self) -> bool:
        """Whether the network was called: in few steps, the Gaussian of a start may answer all of them."""
        return bool(self._sums)

    @property
    def coarsest(self) -> int:
        """Positions of the latent grid, along an axis, for each position of the coarsest map."""
        return 2 ** max(self._levels.values())

    def record(self, block: TransformerBlock, level: int) -> list:
        """Record a block of the level that halves the latent grid `level` times; returns handles that end it."""
        self._levels[block] = level
        shape: list[Sequence[int]] = []  # of the block's grid; its attention gets a flat sequence of positions

        def see_shape(_: nn.Module, inputs: tuple) -> None:
            shape[:] = [inputs[0].shape[2:]]

        def see_weights(attention: Any, inputs: tuple) -> None:
            x, context = (value[: self.samples].detach() for value in inputs)  # (N, positions, C), (N, tokens, context_dim)
            q, k = attention.query(x), attention.key_value(context).chunk(2, dim=-1)[0]
            q, k = (y.float().unflatten(-1, (attention.heads, -1)).transpose(1, 2) for y in (q, k))  # (N, H, ., D)
            weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1).mean(dim=1)
            weights = weights.unflatten(-1, (self.num_covariates, -1)).sum(dim=-1)  # (N, positions, K)
            weights = weights.transpose(1, 2).unflatten(-1, tuple(shape[0])).cpu()
            self._sums[block] = self._sums.get(block, 0) + weights
            self._calls[block] = self._calls.get(block, 0) + 1

        return [
            block.register_forward_pre_hook(see_shape),
            block.cross_attention.register_forward_pre_hook(see_weights),
        ]

    def mean(self, shape: Sequence[int], factor: int) -> Tensor:
        """Mean over blocks, heads and calls, linearly interpolated: (N, K, *shape), 1 in sum over K.

        Args:
            shape: of the volume, (X, Y, Z).
            factor: voxels for each position of the latent grid, along an axis.
        """
        maps = []
        for block, total in self._sums.items():
            # Position i of a level covers positions 2^level i, ... of the latent grid; the last may exceed it
            voxels = factor * 2 ** self._levels[block]  # for each position, along an axis
            upsampled = F.interpolate(total / self._calls[block], scale_factor=voxels, mode="trilinear")
            maps.append(upsampled[..., : shape[0], : shape[1], : shape[2]])
        return torch.stack(maps).mean(dim=0)


@contextmanager
def recorded(unet: LatentUNet, samples: int) -> Iterator[AttentionMaps | None]:
    """Within it, the U-Net's cross-attention is recorded; None for a network without attention blocks of ours."""
    sides: list[Any] = [*enumerate(unet.down), *enumerate(unet.up)] if isinstance(unet, UNet) and unet.num_covariates else []
    blocks = [(block.transformer, level) for level, side in sides for block in side if block.transformer is not None]
    if not isinstance(unet, UNet) or not blocks:
        yield None
        return
    maps = AttentionMaps(samples, unet.num_covariates)
    handles = [handle for block, level in blocks for handle in maps.record(block, level)]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
