"""The U-Net that predicts a diffusion target on the latent grid, told of time, covariates and images.

Latents are (N, C, X, Y, Z) of any size: an odd side is padded by one where it is halved and cut again on the way up.
Conditions are `ldm3d.models.conditioning.Conditions`, or covariates alone: (N, K, 2), value and presence.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm3d.errors import InputError
from ldm3d.models.blocks import ChannelNorm, ResBlock, TransformerBlock, sinusoidal_embedding, zero
from ldm3d.models.conditioning import Conditions
from ldm3d.models.pretrained import Pretrained, load_weights

IMAGE_WIDTH = 32  # channels that images of more than as many are mixed into
# Standardised covariates lie within about +-3: from half a period over all of it to details of a tenth
FOURIER_FREQUENCIES = (0.5, 1.0, 2.0, 4.0)


class CovariateTokens(nn.Module):
    """Tokens for cross-attention: Fourier features of a continuous value, an embedding of a category, a null token for none.

    Args:
        num_categories: of each covariate; 0 for a continuous one.
        dim: channels of a token.
        tokens_per_covariate: tokens that each covariate becomes.
    """

    frequencies: Tensor

    def __init__(self, num_categories: Sequence[int], dim: int, tokens_per_covariate: int = 1):
        super().__init__()
        self.num_categories, self.dim = tuple(num_categories), dim
        width = dim * tokens_per_covariate
        features = 1 + 2 * len(FOURIER_FREQUENCIES)
        self.embed = nn.ModuleList(
            nn.Embedding(n, width) if n else nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
            for n in num_categories
        )
        self.null = nn.Parameter(torch.randn(len(self.num_categories), width) * 0.02)
        self.register_buffer("frequencies", torch.tensor(FOURIER_FREQUENCIES), persistent=False)

    def forward(self, context: Tensor) -> Tensor:
        """context (N, K, 2) -> tokens (N, K * tokens_per_covariate, dim)."""
        tokens = []
        for k, embed in enumerate(self.embed):
            value, present = context[:, k, 0], context[:, k, 1, None] > 0.5  # (N,), (N, 1)
            if self.num_categories[k]:
                token = embed(value.long())
            else:
                # Half precision would lose the angle
                value = value[:, None].to(torch.promote_types(value.dtype, torch.float32))
                angles = value * self.frequencies
                features = torch.cat([value, angles.sin(), angles.cos()], dim=1)
                token = embed(features.to(next(embed.parameters()).dtype))
            tokens.append(torch.where(present, token, self.null[k].to(token.dtype)))
        return torch.stack(tokens, dim=1).unflatten(-1, (-1, self.dim)).flatten(1, 2)


class LatentUNet(Pretrained):
    """The interface of every U-Net: `forward(x, timesteps, context)`, as `UNet` describes it.

    Args:
        in_channels, out_channels: of the noisy latent and of the prediction.
        image_channels: of the images among its conditions; 0 for none.
    """

    in_bytes = r"weight$"

    def __init__(self, in_channels: int, out_channels: int, image_channels: int = 0):
        super().__init__()
        self.in_channels, self.out_channels, self.image_channels = in_channels, out_channels, image_channels

    def padded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The grid (X, Y, Z) that a latent of `shape` has to be padded to; see `pad_to`."""
        return tuple(shape)


class Block(nn.Module):
    """A residual block, then self- and cross-attention if the level has them."""

    def __init__(self, residual: ResBlock, transformer: TransformerBlock | None):
        super().__init__()
        self.residual, self.transformer = residual, transformer

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
        x = self.residual(x, embedding)
        return x if self.transformer is None else self.transformer(x, tokens)


class Level(nn.Sequential):
    """The blocks of one level, in their order, on one side of the U-Net.

    A module with a `forward` of its own, so that a launcher may compile a level, or spread its weights, as one piece.

    Args:
        blocks: one or more.
        activation_checkpointing: recompute each of them in the backward pass.
    """

    def __init__(self, blocks: Iterable[Block], activation_checkpointing: bool):
        super().__init__(*blocks)
        self.activation_checkpointing = activation_checkpointing

    def forward(  # type: ignore[override]  # of a Sequential, whose layers take one input each
        self, h: Tensor, embedding: Tensor, tokens: Tensor | None
    ) -> Tensor:
        """h (N, C, X, Y, Z), embedding (N, embedding_dim), tokens (N, K, context_dim) -> (N, C, X, Y, Z)."""
        for block in self:
            if self.activation_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, embedding, tokens, use_reentrant=False)
            else:
                h = block(h, embedding, tokens)
        return h


class UNet(LatentUNet):
    """U-Net (Ronneberger et al. 2015) with the blocks of Dhariwal & Nichol 2021 and Rombach et al. 2022.

    What the way down leaves at a level is added on the way up (Chaurasia & Culurciello 2017), not stacked: half of the
    multiplications, and faster learning in the same number of steps.

    Args:
        in_channels: of the noisy latent.
        out_channels: of the prediction.
        num_categories: one number a covariate, 0 for continuous; [] for an unconditional model.
        channels: width of each level; each halves the grid of the one before.
        blocks: residual blocks a level on the way down, and again on the way up; one number for all levels or one for each.
        attention: for each level, whether its blocks attend to each other and to the covariates.
        head_channels: channels of an attention head.
        context_dim, tokens_per_covariate: see `CovariateTokens`.
        covariates_in_time_embedding: let covariates scale and shift the residual blocks, too.
        activation_checkpointing: recompute blocks in the backward pass; less memory, a third more time.
        attention_backend: see `ldm3d.models.attention.attention`.
        fourier_features: exponents n of sin(2^n pi z) and cos(2^n pi z), which the input is given beside z (Kingma et al.
            2021, appendix C): detail finer than the network would resolve, which a likelihood depends on; None for none.
        image_channels: of images on the latent grid that are given beside z, and for each of them whether it is; 0 for none.
            Their weights start at zero: see `with_images`.
        image_width: channels that images of many channels are mixed into, position by position, before the convolution that
            looks at neighbours, which would take a sixth of a step for the voxels of blocks of 4; None: they are not.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_categories: Sequence[int],
        channels: Sequence[int],
        blocks: int | Sequence[int],
        attention: Sequence[bool],
        head_channels: int = 32,
        context_dim: int = 64,
        tokens_per_covariate: int = 1,
        covariates_in_time_embedding: bool = True,
        activation_checkpointing: bool = False,
        attention_backend: str = "auto",
        fourier_features: Sequence[int] | None = None,
        image_channels: int = 0,
        image_width: int | None = None,
    ):
        super().__init__(in_channels, out_channels, image_channels)
        self.fourier_features = tuple(fourier_features or ())
        if len(attention) != len(channels):
            raise InputError(f"attention {list(attention)} needs one flag for each of the channels {list(channels)}")
        counts = blocks_of_levels(blocks, len(channels))
        self.num_covariates = len(num_categories)
        self.time_dim, embedding_dim = channels[0], 4 * channels[0]
        self.time_mlp = nn.Sequential(
            nn.Linear(self.time_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.tokens = self.pooled = None
        if self.num_covariates:
            self.tokens = CovariateTokens(num_categories, context_dim, tokens_per_covariate)
            if covariates_in_time_embedding:
                self.pooled = nn.Linear(self.num_covariates * tokens_per_covariate * context_dim, embedding_dim)

        def level(width: int, attend: bool, count: int) -> Level:
            def block() -> Block:
                cross = context_dim if self.num_covariates else None
                transformer = TransformerBlock(width, head_channels, cross, attention_backend) if attend else None
                return Block(ResBlock(width, embedding_dim), transformer)

            return Level((block() for _ in range(count)), activation_checkpointing)

        self.conv_in = nn.Conv3d(in_channels * (1 + 2 * len(self.fourier_features)), channels[0], 3, padding=1)
        # Beside `conv_in`, to which it adds: the same as one convolution over all channels, stacked
        self.conv_images = self.mix_images = None
        if image_channels:
            seen = image_width or 2 * image_channels
            self.conv_images = zero(nn.Conv3d(seen, channels[0], 3, padding=1, bias=False))
            if image_width:
                self.mix_images = nn.Conv3d(2 * image_channels, image_width, 1, bias=False)
        self.down = nn.ModuleList(level(*each) for each in zip(channels, attention, counts))
        self.downsample = nn.ModuleList(nn.Conv3d(fine, coarse, 2, stride=2) for fine, coarse in pairwise(channels))
        self.upsample = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, stride=2) for fine, coarse in pairwise(channels))
        self.up = nn.ModuleList(level(*each) for each in zip(channels, attention, counts))
        self.norm_out = ChannelNorm(channels[0])
        self.conv_out = zero(nn.Conv3d(channels[0], out_channels, 3, padding=1))
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # it does take one

    def forward(self, x: Tensor, timesteps: Tensor, context: Conditions | Tensor | None = None) -> Tensor:
        """Predict the target of a noisy latent.

        Args:
            x: (N, in_channels, X, Y, Z).
            timesteps: (N,), the diffusion time in thousandths: 0 (data) to 1000 (noise), whole or not, which is how MONAI's
                schedulers and inferers count.
            context: conditions, or the covariates alone, (N, K, 2); None leaves all of them open.

        Returns:
            (N, out_channels, X, Y, Z).
        """
        embedding = self.time_mlp(sinusoidal_embedding(timesteps, self.time_dim).to(self.conv_in.weight.dtype))
        conditions, tokens = Conditions.of(context, x, self.num_covariates, self.image_channels), None
        if self.tokens is not None:
            tokens = self.tokens(conditions.covariates)  # (N, tokens, context_dim)
            if self.pooled is not None:
                embedding = embedding + self.pooled(tokens.flatten(1))
        embedding = nn.functional.silu(embedding)

        h = self.conv_in(self._with_fourier_features(x))  # (N, channels[0], X, Y, Z)
        if self.conv_images is not None:
            images = self._stacked_images(conditions, x)  # (N, 2 image_channels, X, Y, Z)
            h = h + self.conv_images(images if self.mix_images is None else self.mix_images(images))
        skips = []
        for i, level in enumerate(self.down):
            if i > 0:
                skips.append(h)
                h = self.downsample[i - 1](pad_to_even(h))  # half of every side, rounded up
            h = level(h, embedding, tokens)
        for i, level in reversed(list(enumerate(self.up))):
            if i < len(self.upsample):
                skip = skips.pop()
                x_, y_, z_ = skip.shape[2:]
                h = skip + self.upsample[i](h)[..., :x_, :y_, :z_]
            h = level(h, embedding, tokens)
        return self.conv_out(nn.functional.silu(self.norm_out(h)))

    def with_images(self, image_channels: int) -> "UNet":
        """A network that takes images, too, and starts with the answers of this one, whatever they show."""
        return self._grown(image_channels=image_channels, image_width=width_of_images(image_channels))

    def with_blocks(self, blocks: int | Sequence[int]) -> "UNet":
        """A network of at least as many blocks at each level, which starts with the answers of this one.

        New blocks stand behind those of their level and start as the identity (Chen et al. 2016, Net2DeeperNet).

        Raises:
            InputError: fewer blocks than this network has at a level, or not one number for each level.
        """
        own, wanted = (blocks_of_levels(each, len(self.down)) for each in (self.arguments["blocks"], blocks))
        if any(few < many for few, many in zip(wanted, own)):
            raise InputError(f"a network of {own} blocks cannot start one of {wanted}: blocks can be added, not taken away")
        return self if own == wanted else self._grown(blocks=blocks)

    def _grown(self, **larger: Any) -> "UNet":
        """A network with some other arguments; weights of this one wherever they fit, those of a new network elsewhere."""
        network = UNet(**{**self.arguments, **larger}).to(self.conv_in.weight)
        load_weights(network, network.state_dict() | self.state_dict(), "this network")
        return network

    def _stacked_images(self, conditions: Conditions, x: Tensor) -> Tensor:
        """Images, and which of them are known, (N, 2 image_channels, X, Y, Z); padded as x is, zero where nothing is known."""
        if conditions.images is None or conditions.known is None:
            return x.new_zeros(len(x), 2 * self.image_channels, *x.shape[2:])
        known = conditions.known.expand_as(conditions.images).to(x)
        # Not by multiplication: what is unknown may be NaN
        images = torch.where(known > 0, conditions.images.to(x), 0)
        return pad_to(torch.cat([images, known], dim=1), x.shape[2:])

    def _with_fourier_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, X, Y, Z) -> (N, in_channels (1 + 2 F), X, Y, Z)."""
        angles = [2.0**n * math.pi * x.float() for n in self.fourier_features]  # half precision would lose the angle
        return torch.cat([x, *(wave.to(x.dtype) for a in angles for wave in (a.sin(), a.cos()))], dim=1) if angles else x


def blocks_of_levels(blocks: int | Sequence[int], levels: int) -> list[int]:
    """How many blocks each level has, where `blocks` is one number for all levels, or one for each."""
    counts = [blocks] * levels if isinstance(blocks, int) else list(blocks)
    if len(counts) != levels:
        raise InputError(f"blocks {counts} needs one number for each of the {levels} levels")
    return counts


def width_of_images(channels: int) -> int | None:
    """`UNet.image_width` of new networks."""
    return IMAGE_WIDTH if channels > IMAGE_WIDTH else None


def pad_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x (N, C, X, Y, Z) amid zeros on a grid of `shape`; an odd plane goes behind (as MONAI's DivisiblePad does)."""
    padding = [side for n, m in zip(x.shape[:1:-1], reversed(shape)) for side in ((m - n) // 2, m - n - (m - n) // 2)]
    return nn.functional.pad(x, padding) if any(padding) else x


def cut_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pad_to`: the middle of x, (N, C, *shape)."""
    start = [(m - n) // 2 for n, m in zip(shape, x.shape[2:])]
    return x[(slice(None), slice(None), *(slice(i, i + n) for i, n in zip(start, shape)))]


def pad_to_even(x: Tensor) -> Tensor:
    """(N, C, X, Y, Z) with the last plane of every odd side doubled."""
    if x.is_cuda:
        return double_last_planes(x)
    padding = [side for n in reversed(x.shape[2:]) for side in (0, n % 2)]
    return nn.functional.pad(x, padding, mode="replicate") if any(padding) else x


def double_last_planes(x: Tensor) -> Tensor:
    """The same by concatenation, for CUDA.

    There, PyTorch's replicating pad copies channels-last latents to another memory format and back, and its backward pass adds
    in no fixed order. On a CPU it does neither and is faster.
    """
    for axis in (2, 3, 4):
        if x.shape[axis] % 2:
            x = torch.cat([x, x.narrow(axis, -1, 1)], dim=axis)
    return x
