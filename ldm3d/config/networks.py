"""Sections of the networks, ours and MONAI's."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from ldm3d.config.base import Positive, Section

MonaiLibrary = Literal["monai", "monai-generative"]  # MONAI core, and the package its networks were published with


def _network_tag(network: Any) -> str:
    """Which section a `network:` is checked as, by its `kind`."""
    kind = network.get("kind", "ldm3d") if isinstance(network, dict) else getattr(network, "kind", "ldm3d")
    return "monai" if kind in get_args(MonaiLibrary) else str(kind)


NETWORK_KIND = Discriminator(_network_tag)


def _check_groups(channels: Sequence[int], norm_num_groups: int) -> None:
    if any(width % norm_num_groups for width in channels):
        raise ValueError(
            f"norm_num_groups {norm_num_groups} must divide every width of the channels {tuple(channels)}; "
            f"use multiples of {norm_num_groups}, or fewer groups"
        )


class AutoencoderNetworkConfig(Section):
    """Arguments of `ldm3d.models.autoencoder.Autoencoder`."""

    kind: Literal["ldm3d"] = "ldm3d"
    latent_channels: Positive
    downsampling: Positive
    channels: tuple[Positive, ...]
    blocks: Annotated[int, Field(ge=0)] = 2
    attention: bool = False
    linear_path: bool = True

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        levels = max(1, self.downsampling.bit_length() - 1)
        if self.downsampling & (self.downsampling - 1) or len(self.channels) != levels:
            raise ValueError(
                f"downsampling {self.downsampling} must be a power of two, 2^k, with k numbers of channels (one at each of "
                f"1/2, 1/4, ... of the resolution), got channels {self.channels}"
            )
        return self


class MonaiAutoencoderConfig(Section):
    """Arguments of `ldm3d.models.monai.MonaiAutoencoder`; `channels` begin at the volume's own resolution."""

    linear_path: ClassVar[bool] = False

    kind: MonaiLibrary
    latent_channels: Positive
    channels: tuple[Positive, ...]
    blocks: Positive = 2
    attention: tuple[bool, ...] = ()
    middle_attention: bool = False
    norm_num_groups: Positive = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    flash_attention: bool = True

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channels) - 1)

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if not self.channels or len(self.attention) not in (0, len(self.channels)):
            raise ValueError(f"attention {self.attention} needs one flag for each of the channels {self.channels}, or none")
        _check_groups(self.channels, self.norm_num_groups)
        return self


AutoencoderNetwork = Annotated[
    Annotated[AutoencoderNetworkConfig, Tag("ldm3d")] | Annotated[MonaiAutoencoderConfig, Tag("monai")], NETWORK_KIND
]


class UNetConfig(Section):
    """Arguments of `ldm3d.models.unet.UNet`, beside those that follow from the data."""

    kind: Literal["ldm3d"] = "ldm3d"
    channels: tuple[Positive, ...]
    blocks: Positive | tuple[Positive, ...] = 1  # residual blocks a level, one number for all or one for each
    attention: tuple[bool, ...]
    head_channels: Positive = 32
    context_dim: Positive = 64
    tokens_per_covariate: Positive = 1
    covariates_in_time_embedding: bool = True
    activation_checkpointing: bool = False
    attention_backend: Literal["auto", "sdpa", "xformers", "math"] = "auto"
    fourier_features: tuple[Annotated[int, Field(ge=-8, le=16)], ...] | None = None

    @model_validator(mode="after")
    def _one_flag_a_level(self) -> Self:
        if len(self.attention) != len(self.channels):
            raise ValueError(f"attention {self.attention} needs one flag for each of the channels {self.channels}")
        if isinstance(self.blocks, tuple) and len(self.blocks) != len(self.channels):
            raise ValueError(f"blocks {self.blocks} needs one number for each of the channels {self.channels}, or one for all")
        for width, attend in zip(self.channels, self.attention):
            if attend and width % self.head_channels:
                raise ValueError(f"head_channels {self.head_channels} must divide the {width} channels that attend")
        return self


class MonaiUNetConfig(Section):
    """Arguments of `ldm3d.models.monai.MonaiUNet`, beside those that follow from the data."""

    kind: MonaiLibrary
    channels: tuple[Positive, ...]
    blocks: Positive = 2
    attention: tuple[bool, ...]
    head_channels: tuple[Annotated[int, Field(ge=0)], ...] = (32,)  # a number for each level, or one for all
    context_dim: Positive = 64
    tokens_per_covariate: Positive = 1
    transformer_layers: Positive = 1
    resblock_updown: bool = False
    norm_num_groups: Positive = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    upcast_attention: bool = False
    flash_attention: bool = True

    @model_validator(mode="before")
    @classmethod
    def _heads_of_every_level(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("head_channels"), int):
            values = {**values, "head_channels": [values["head_channels"]]}
        return values

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if not self.channels or len(self.attention) != len(self.channels):
            raise ValueError(f"attention {self.attention} needs one flag for each of the channels {self.channels}")
        if len(self.head_channels) not in (1, len(self.channels)):
            raise ValueError(f"head_channels {self.head_channels} must be one number, or one for each of {self.channels}")
        heads = self.head_channels * (len(self.channels) if len(self.head_channels) == 1 else 1)
        for width, head, attend in zip(self.channels, heads, (*self.attention[:-1], True)):  # the middle attends, too
            if attend and (head == 0 or width % head):
                raise ValueError(f"head_channels {head} must divide the {width} channels that attend")
        if self.upcast_attention and self.kind == "monai":
            raise ValueError("upcast_attention stops MONAI core's network in half precision; use monai-generative or drop it")
        _check_groups(self.channels, self.norm_num_groups)
        return self


UNetNetwork = Annotated[Annotated[UNetConfig, Tag("ldm3d")] | Annotated[MonaiUNetConfig, Tag("monai")], NETWORK_KIND]
