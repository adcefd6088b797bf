"""Images as conditions: from volumes on the Grid to channels on the latent grid, which a U-Net is given beside z.

An image becomes its latent, by the model's own autoencoder. A label map, as shares of each voxel, becomes shares of each block
of voxels. Each channel has a second one that says whether it is given (`ldm3d.models.conditioning.Conditions.known`): 1, 0,
or where voxels are missing the share of the block that is there.

Legend: (N, C, X, Y, Z) volumes; (N, c, x, y, z) channels on the latent grid, f = X / x.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from ldm3d.config.conditions import Condition, LabelsCondition
from ldm3d.models.autoencoder import LatentSpace


class ImageChannels:
    """The images of a model, as channels on its latent grid.

    Args:
        conditions: in their order.
        autoencoder: of the model.
    """

    def __init__(self, conditions: Sequence[Condition], autoencoder: LatentSpace):
        self.conditions, self.autoencoder = tuple(conditions), autoencoder
        self.widths = [
            len(each.groups) if isinstance(each, LabelsCondition) else autoencoder.latent_channels for each in self.conditions
        ]

    @property
    def count(self) -> int:
        """Channels of all conditions together."""
        return sum(self.widths)

    def encoded(self, condition: Condition, volumes: Tensor) -> Tensor:
        """Volumes (N, C, X, Y, Z) of a condition as raw channels (N, c, x, y, z), as the latent cache stores them."""
        if isinstance(condition, LabelsCondition):
            return self.shares(volumes.float())
        dtype = next(self.autoencoder.parameters()).dtype
        return self.autoencoder.sample(self.autoencoder.encode(volumes.to(dtype))).float()

    def shares(self, volumes: Tensor) -> Tensor:
        """The mean of each block of f^3 voxels: (N, C, X, Y, Z) -> (N, C, x, y, z)."""
        return avg_pool3d(volumes, self.autoencoder.downsampling)

    def stacked(
        self, raw: Mapping[str, Tensor], measured: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images and which of them are known, as `Conditions` takes them.

        Args:
            raw: by a condition's name its channels from `encoded`, NaN where nothing is given; a condition may be missing.
            measured: by name the share of each block that is there, (N, 1, x, y, z); 1 where a condition is missing in it.
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
            images.append(channels if isinstance(condition, LabelsCondition) else self.autoencoder.normalise(channels))
            known.append(share)
        return torch.cat(images, dim=1), torch.cat(known, dim=1)
