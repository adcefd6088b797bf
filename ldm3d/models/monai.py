"""MONAI's networks behind our interfaces: AutoencoderKL and DiffusionModelUNet (Pinaya et al. 2022 and 2023).

From either of two libraries: "monai", MONAI core, or "monai-generative", the package that they were published with
(0.2.3), for those who reproduce a model to the letter. Weights of one do not fit the other: see `ldm3d.published`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm3d.errors import InputError
from ldm3d.models.attention import quiet_xformers, xformers_works
from ldm3d.models.autoencoder import LOG_VARIANCE_RANGE, START_LOG_VARIANCE, LatentSpace
from ldm3d.models.blocks import convolve_to_voxels
from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import CovariateTokens, LatentUNet

LIBRARIES = ("monai", "monai-generative")
CONDITIONING = ("tokens", "values")


class MonaiAutoencoder(LatentSpace):
    """MONAI's AutoencoderKL, with the latents' statistics of ours.

    Args:
        latent_channels: c.
        channels: width at the volume's resolution, at 1/2, 1/4, ...; their number makes the downsampling f.
        blocks: residual blocks a level, in the encoder and in the decoder.
        attention: for each level, whether its blocks attend to each other; () for none.
        middle_attention: self-attention between encoder or decoder and the latent.
        norm_num_groups, norm_eps: of the group normalisation.
        flash_attention: PyTorch's fused attention ("monai"), or xformers where that has a kernel ("monai-generative").
        in_channels: C, modalities in a volume.
        library: one of LIBRARIES.
    """

    def __init__(
        self,
        latent_channels: int,
        channels: Sequence[int],
        blocks: int = 2,
        attention: Sequence[bool] = (),
        middle_attention: bool = False,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        flash_attention: bool = True,
        in_channels: int = 1,
        library: str = "monai",
    ):
        super().__init__(in_channels, latent_channels, 2 ** (len(channels) - 1))
        self.network = _build(
            "AutoencoderKL",
            library,
            channels,
            flash_attention,
            in_channels=in_channels,
            out_channels=in_channels,
            latent_channels=latent_channels,
            num_res_blocks=blocks,
            attention_levels=tuple(attention) or (False,) * len(channels),
            with_encoder_nonlocal_attn=middle_attention,
            with_decoder_nonlocal_attn=middle_attention,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
        )
        nn.init.constant_(self.network.quant_conv_log_sigma.conv.bias, START_LOG_VARIANCE)

    def encode(self, x: Tensor) -> Tensor:
        """x (N, C, X, Y, Z) in [0, 1] -> moments (N, 2c, X/f, Y/f, Z/f).

        Raises:
            InputError: a side that f does not divide.
        """
        self.check_sides(x)
        h = self.network.encoder(x.contiguous())
        # Not the library's own `encode`: it gives sigma, whose logarithm is lost in half precision
        mean, log_variance = self.network.quant_conv_mu(h), self.network.quant_conv_log_sigma(h)
        return torch.cat([mean, log_variance.clamp(*LOG_VARIANCE_RANGE)], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Latent (N, c, X/f, Y/f, Z/f) -> volume (N, C, X, Y, Z), not clipped; float32 also from half precision."""
        h = self.network.post_quant_conv(z.contiguous())
        *blocks, last = self.network.decoder.blocks
        for block in blocks:
            h = block(h)
        return convolve_to_voxels(h, last.conv)  # where the library's own `decode` rounds the voxels, too

    def decoder_modules(self) -> list[nn.Module]:
        return [self.network.post_quant_conv, self.network.decoder]


class MonaiUNet(LatentUNet):
    """MONAI's DiffusionModelUNet, told of time and covariates as ours is.

    Args:
        in_channels, out_channels: of the noisy latent and of the prediction.
        num_categories: one number a covariate, 0 for continuous; [] for an unconditional model.
        channels: width of each level; each halves the grid of the one before.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention: for each level, whether its blocks attend to each other and to the covariates. The middle always does.
        head_channels: channels of an attention head, a number for each level, or one for all. Not read without attention.
        context_dim, tokens_per_covariate: see `CovariateTokens`.
        transformer_layers: of an attending block, if there are covariates.
        resblock_updown: halve and double the grid in residual blocks rather than by a convolution.
        norm_num_groups, norm_eps: of the group normalisation.
        upcast_attention: attention weights in float32. "monai-generative" only: MONAI core's stops in half precision.
        flash_attention: PyTorch's fused attention ("monai"), or xformers where that has a kernel ("monai-generative").
        conditioning: "tokens", learned ones, with null tokens for what is left open; or "values", as published models have
            it: one token (N, 1, K) of the K encoded values, categories spread over 0..1, and nothing for what is open.
        concatenate: with "values": also stack them behind the latent, as K constant channels.
        library: one of LIBRARIES.
    """

    largest: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_categories: Sequence[int],
        channels: Sequence[int],
        blocks: int,
        attention: Sequence[bool],
        head_channels: Sequence[int] = (32,),
        context_dim: int = 64,
        tokens_per_covariate: int = 1,
        transformer_layers: int = 1,
        resblock_updown: bool = False,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        upcast_attention: bool = False,
        flash_attention: bool = True,
        conditioning: str = "tokens",
        concatenate: bool = False,
        library: str = "monai",
    ):
        super().__init__(in_channels, out_channels)
        if conditioning not in CONDITIONING:
            raise InputError(f"conditioning {conditioning!r} is not one of {', '.join(CONDITIONING)}")
        self.num_covariates, self.concatenate = len(num_categories), concatenate
        self.factor = 2 ** (len(channels) - 1)
        self.tokens = None
        if conditioning == "tokens" and self.num_covariates:
            self.tokens = CovariateTokens(num_categories, context_dim, tokens_per_covariate)
        largest = torch.tensor([max(n - 1, 1) for n in num_categories], dtype=torch.float32)
        self.register_buffer("largest", largest, persistent=False)  # of a category's index; 1 for continuous values
        conditioned = self.num_covariates > 0
        context_dim = context_dim if self.tokens is not None else self.num_covariates
        self.network = _build(
            "DiffusionModelUNet",
            library,
            channels,
            flash_attention,
            in_channels=in_channels + concatenate * self.num_covariates,
            out_channels=out_channels,
            num_res_blocks=blocks,
            attention_levels=tuple(attention),
            num_head_channels=tuple(head_channels) if len(head_channels) > 1 else head_channels[0],
            with_conditioning=conditioned,
            cross_attention_dim=context_dim if conditioned else None,
            transformer_num_layers=transformer_layers,
            resblock_updown=resblock_updown,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            upcast_attention=upcast_attention,
        )

    def padded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """`shape` rounded up to what can be halved at every level."""
        return tuple(-(-n // self.factor) * self.factor for n in shape)

    def forward(self, x: Tensor, timesteps: Tensor, context: Conditions | Tensor | None = None) -> Tensor:
        """Predict the target of a noisy latent.

        Args:
            x: (N, in_channels, X, Y, Z), of a shape that `padded_shape` leaves as it is.
            timesteps: (N,), the diffusion time in thousandths, 0 (data) to 1000 (noise).
            context: conditions, or the covariates alone, (N, K, 2); None leaves all of them open.

        Returns:
            (N, out_channels, X, Y, Z).
        """
        context, tokens = Conditions.of(context, x, self.num_covariates).covariates, None
        if self.tokens is not None:
            tokens = self.tokens(context)  # (N, tokens, context_dim)
        elif self.num_covariates:
            values = context[..., 0].to(x.dtype) / self.largest.to(x.dtype)  # (N, K)
            tokens = values[:, None]  # (N, 1, K)
            if self.concatenate:
                x = torch.cat([x, values[..., None, None, None].expand(-1, -1, *x.shape[2:])], dim=1)
        # Step k of MONAI's chain of 1000 is the time (k + 1) / 1000; the data itself has no step
        return self.network(x.contiguous(), (timesteps - 1).clamp(min=0), tokens)


def _build(name: str, library: str, channels: Sequence[int], flash_attention: bool, **arguments: Any) -> Any:
    """A network of one of the libraries, which come without types."""
    try:
        if library == "monai":
            from monai.networks import nets

            network_class = getattr(nets, name)
            network = network_class(spatial_dims=3, channels=channels, use_flash_attention=flash_attention, **arguments)
        elif library == "monai-generative":
            with quiet_xformers():  # which it imports where it is installed
                from generative.networks import nets as published

            network = getattr(published, name)(spatial_dims=3, num_channels=channels, **arguments)
        else:
            raise InputError(f"library {library!r} is not one of {', '.join(LIBRARIES)}")
    except ValueError as error:  # widths, groups and flags that do not go together
        raise InputError(f"{name} of {library} with channels {list(channels)}: {error}") from None
    for module in network.modules():
        if isinstance(module, nn.AvgPool3d):
            module.__class__ = _AveragePool
        if library == "monai":
            continue
        if hasattr(module, "proj_attn"):  # it is never called, and has no gradient that other processes could wait for
            module.proj_attn.requires_grad_(False)
        if flash_attention and hasattr(module, "use_flash_attention"):
            module.register_forward_pre_hook(_prefer_xformers)
    return network


class _AveragePool(nn.AvgPool3d):
    """Average pooling, for which PyTorch has no kernel in bfloat16 on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.device.type == "cpu" and x.dtype == torch.bfloat16
        return super().forward(x.float()).to(x.dtype) if half else super().forward(x)


def _prefer_xformers(attention: Any, inputs: tuple[Tensor, ...]) -> None:
    """Let an attention of monai-generative call xformers, if that has a kernel for what comes in."""
    x = inputs[0]
    device, dtype = x.device, x.dtype
    if x.is_meta:  # a dry run that counts memory: no kernel can be tried
        attention.use_flash_attention = False
        return
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    attention.use_flash_attention = xformers_works(device, dtype, attention.to_q.out_features // attention.num_heads)
