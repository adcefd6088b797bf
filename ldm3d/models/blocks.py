"""Building blocks of the autoencoder and the U-Net.

Volumes are (N, C, X, Y, Z). Only convolutions of known reach and attention mix positions. The norm works on the channels of
one position, so that a network without attention gives the same result on a part of a volume as on all of it.
"""

import math
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm3d.models.attention import Attention

Part = TypeVar("Part", bound=nn.Module)


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """Blocks of factor^3 voxels become channels: (N, C, fX, fY, fZ) -> (N, C f^3, X, Y, Z). Nothing is lost."""
    n, c, x_, y_, z_ = x.shape
    f = factor
    x = x.reshape(n, c, x_ // f, f, y_ // f, f, z_ // f, f)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, c * f**3, x_ // f, y_ // f, z_ // f)


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """The inverse of `space_to_depth`."""
    n, c, x_, y_, z_ = x.shape
    f = factor
    x = x.reshape(n, c // f**3, f, f, f, x_, y_, z_)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, c // f**3, x_ * f, y_ * f, z_ * f)


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def convolve_to_voxels(x: Tensor, conv: nn.Conv3d, padding: int | tuple[int, ...] = 1) -> Tensor:
    """A convolution whose output is an image, in full precision, with weights in half precision and under autocast, too.

    bfloat16 has only 256 values from 0.25 to 1, and voxels rounded to these leave gaps in every histogram.

    Args:
        x: (N, channels, X, Y, Z).
        conv: of stride 1; its own padding is ignored.
        padding: zeros around the volume, along each axis.
    """
    x, weight = full_precision(x), full_precision(conv.weight).contiguous(memory_format=torch.channels_last_3d)
    bias = None if conv.bias is None else full_precision(conv.bias)
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        return nn.functional.conv3d(x, weight, bias, padding=padding)


def zero(module: nn.Module) -> nn.Module:
    """The same module with all parameters zero: a branch that changes nothing at the start."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) over the channels of each position."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return normalise_channels(x, self.weight, self.bias, self.eps)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def normalise_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of `ChannelNorm` kept out of autocast, in x's dtype: (N, C, ...) -> (N, C, ...).

    CUDA's autocast would make a float32 copy of x, keep it for the backward pass and return float32; that of the CPU leaves
    the norm alone. The kernel sums in float32 either way.
    """
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, eps).movedim(-1, 1)


class ResBlock(nn.Module):
    """x + conv(silu(scale-shift(conv(norm(x))))); starts as the identity.

    Args:
        channels: in and out.
        embedding_dim: length of the vector that scales and shifts (Perez et al. 2018); None for a plain block.
    """

    def __init__(self, channels: int, embedding_dim: int | None = None):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = zero(nn.Conv3d(channels, channels, 3, padding=1))
        if embedding_dim is not None:
            self.inner_norm = ChannelNorm(channels, elementwise_affine=False)
            self.scale_shift = zero(nn.Linear(embedding_dim, 2 * channels))

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x (N, channels, X, Y, Z), embedding (N, embedding_dim) -> (N, channels, X, Y, Z)."""
        h = self.conv1(self.norm(x))
        if embedding is not None:
            scale, shift = self.scale_shift(embedding)[..., None, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, self.inner_norm(h), 1 + scale)
        return x + self.conv2(nn.functional.silu(h))


class TransformerBlock(nn.Module):
    """Self-attention over all positions, cross-attention to context tokens, and a two-layer network; each residual.

    Args:
        channels, head_channels, backend: see `Attention`.
        context_dim: channels of the context tokens; None leaves cross-attention out.
    """

    def __init__(self, channels: int, head_channels: int, context_dim: int | None = None, backend: str = "auto"):
        super().__init__()
        self.self_norm = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, head_channels, backend=backend)
        if context_dim is not None:
            self.cross_norm = nn.LayerNorm(channels)
            self.cross_attention = Attention(channels, head_channels, context_dim, backend)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, 2 * channels),
            nn.SiLU(),
            zero(nn.Linear(2 * channels, channels)),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, channels, X, Y, Z), context (N, K, context_dim) -> (N, channels, X, Y, Z)."""
        shape = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (N, X Y Z, channels)
        tokens = tokens + self.self_attention(self.self_norm(tokens))
        if context is not None:
            tokens = tokens + self.cross_attention(self.cross_norm(tokens), context)
        tokens = tokens + self.mlp(tokens)
        return tokens.transpose(1, 2).reshape(shape)


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines of t (N,) at dim / 2 frequencies from 1 down to 1 / max_period (Vaswani et al. 2017): (N, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
