"""What a network is told beside the noisy latent and the time."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm3d.errors import InputError


@dataclass(frozen=True)
class Conditions:
    """Conditions of a batch, all on one device.

    Attributes:
        covariates: (N, K, 2), the context of `ldm3d.covariates`: value and presence of each.
        images: (N, C', x, y, z) on the latent grid. None: no image is given.
        known: (N, C', 1, 1, 1), or with sides of the images: 1 where `images` is given, 0 where it is left open, whatever
            stands there; goes with `images`.
    """

    covariates: Tensor
    images: Tensor | None = None
    known: Tensor | None = None

    @classmethod
    def of(
        cls, context: "Conditions | Tensor | None", z: Tensor, num_covariates: int, image_channels: int = 0
    ) -> "Conditions":
        """What a network was given: conditions; covariates alone, as MONAI's inferers pass them; or nothing.

        Raises:
            InputError: images of other channels than the network takes.
        """
        if not isinstance(context, Conditions):
            return cls(z.new_zeros(len(z), num_covariates, 2) if context is None else context)
        if context.images is not None and context.images.shape[1] != image_channels:
            raise InputError(
                f"conditions have images of {context.images.shape[1]} channels; this network takes "
                f"{image_channels or 'no images'}"
            )
        return context

    def __post_init__(self) -> None:
        if (self.images is None) != (self.known is None):
            raise ValueError("images and known go together: give both, or neither")

    def __len__(self) -> int:
        return len(self.covariates)

    def __add__(self, other: "Conditions") -> "Conditions":
        """Both batches one after the other."""
        if self.covariates.shape[1:] != other.covariates.shape[1:] or (self.images is None) != (other.images is None):
            raise ValueError("conditions of different kinds cannot be stacked")
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("covariates", "images", "known"))
        both: list[Any] = [None if a is None else torch.cat([a, b]) for a, b in pairs]
        return Conditions(*both)

    def open(self, covariates: Iterable[int] | None = None, images: bool = True) -> "Conditions":
        """The same with conditions left open: what guidance guides away from.

        Args:
            covariates: numbers of the covariates to leave open; None for all.
            images: whether images are left open, too.
        """
        left = torch.zeros_like(self.covariates) if covariates is None else self.covariates.clone()
        if covariates is not None:
            left[:, list(covariates)] = 0
        opened = replace(self, covariates=left)
        if images and self.images is not None and self.known is not None:
            opened = replace(opened, images=torch.zeros_like(self.images), known=torch.zeros_like(self.known))
        return opened

    def to(self, *args: Any, **kwargs: Any) -> "Conditions":
        """As `Tensor.to`: another device or type."""
        parts = (self.covariates, self.images, self.known)
        moved: list[Any] = [None if part is None else part.to(*args, **kwargs) for part in parts]
        return Conditions(*moved)
