"""Images as conditions: from volumes on the Grid to channels on the latent grid, which a U-Net is given beside z.

An image becomes its latent, by the model's own autoencoder, or the voxels of each block (`form`). Covariates that another
visit tells are channels that are the same everywhere. A label map, as shares of each voxel, becomes shares of each block, or
of parts of it (`detail`). What is made worse on the fly becomes the voxels of each block: nothing is encoded in a step, and
nothing is lost. Each channel has a second one that says whether it is given (`ldm3d.models.conditioning.Conditions.known`).

Legend: (N, C, X, Y, Z) volumes; (N, c, x, y, z) channels on the latent grid, f = X / x.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from ldm3d.config.conditions import Condition, DegradedCondition, ImageCondition, LabelsCondition
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.blocks import space_to_depth


class ImageChannels:
    """The images of a model, as channels on its latent grid.

    Args:
        conditions: in their order.
        autoencoder: of the model.
    """

    def __init__(self, conditions: Sequence[Condition], autoencoder: LatentSpace):
        self.conditions, self.autoencoder = tuple(conditions), autoencoder
        self.widths = [self._width(each) for each in self.conditions]

    @property
    def count(self) -> int:
        """Channels of all conditions together."""
        return sum(self.widths)

    def _width(self, condition: Condition) -> int:
        if isinstance(condition, LabelsCondition):
            return len(condition.groups) * condition.detail**3
        if in_voxels(condition):
            return self.autoencoder.downsampling**3  # scans have one channel, whatever the autoencoder is of
        return self.autoencoder.latent_channels + len(getattr(condition, "tells", ()))

    def encoded(self, condition: Condition, volumes: Tensor, told: Tensor | None = None) -> Tensor:
        """Volumes (N, C, X, Y, Z) of a condition as raw channels (N, c, x, y, z), as the latent cache stores them.

        Args:
            condition: of which they are.
            volumes: on the Grid.
            told: of a visit, standardised covariates that it `tells`, (N, K), NaN for unknown; None: all are.
        """
        if isinstance(condition, LabelsCondition):
            parts = avg_pool3d(volumes.float(), self.autoencoder.downsampling // condition.detail)
            return space_to_depth(parts, condition.detail)
        if in_voxels(condition):
            return space_to_depth(volumes.float(), self.autoencoder.downsampling)
        if told is None:
            told = torch.full((len(volumes), len(getattr(condition, "tells", ()))), torch.nan)
        return with_told(self.latents(volumes), told)

    def latents(self, volumes: Tensor) -> Tensor:
        """The means of the posteriors of volumes, raw: (N, C, X, Y, Z) -> (N, c, x, y, z)."""
        dtype = next(self.autoencoder.parameters()).dtype
        return self.autoencoder.sample(self.autoencoder.encode(volumes.to(dtype))).float()

    def shares(self, volumes: Tensor) -> Tensor:
        """The mean of each block of f^3 voxels: (N, C, X, Y, Z) -> (N, C, x, y, z)."""
        return avg_pool3d(volumes, self.autoencoder.downsampling)

    def measured(self, masks: Tensor) -> Tensor:
        """Which voxels of a degraded volume are there, (N, 1, X, Y, Z), as its channels are: (N, f^3, x, y, z)."""
        return space_to_depth(masks, self.autoencoder.downsampling)

    def stacked(
        self, raw: Mapping[str, Tensor], measured: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images and which of them are known, as `Conditions` takes them.

        Args:
            raw: by a condition's name its channels from `encoded`, NaN where nothing is given; a condition may be missing.
            measured: by name what `measured` says; a condition that is missing in it is there as a whole.
            given: by name whether each sample has the condition, (N,); None: all of `raw`.
        """
        example = next(iter(raw.values()))
        images, known = [], []
        for condition, width in zip(self.conditions, self.widths):
            if condition.name not in raw:
                images.append(example.new_zeros(len(example), width, *example.shape[2:]))
                known.append(torch.zeros_like(images[-1]))
                continue
            channels = raw[condition.name]
            share = channels.isfinite().to(channels) * measured.get(condition.name, 1.0)
            if given is not None:
                share = share * given[condition.name].to(share).reshape(-1, 1, 1, 1, 1)
            images.append(self._scaled(condition, channels))
            known.append(share)
        return torch.cat(images, dim=1), torch.cat(known, dim=1)

    def _scaled(self, condition: Condition, raw: Tensor) -> Tensor:
        """Raw channels in about the range of a network's inputs."""
        if isinstance(condition, LabelsCondition):
            return raw
        if in_voxels(condition):
            return 2 * raw - 1
        latent, told = raw.tensor_split([self.autoencoder.latent_channels], dim=1)
        return torch.cat([self.autoencoder.normalise(latent), told], dim=1)


def in_voxels(condition: Condition) -> bool:
    """Whether an image is given as the voxels of each block."""
    return isinstance(condition, DegradedCondition) or (isinstance(condition, ImageCondition) and condition.form == "voxels")


def with_told(latents: Tensor, told: Tensor) -> Tensor:
    """Latents (..., c, x, y, z) with numbers (..., K) behind, each as a channel that is the same everywhere."""
    spread = told.to(latents)[..., None, None, None].expand(*told.shape, *latents.shape[-3:])
    return torch.cat([latents, spread], dim=-4)
