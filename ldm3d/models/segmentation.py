"""A small segmentation network: MONAI's residual U-Net, and the meaning of its classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor, nn

from ldm3d.errors import InputError
from ldm3d.models.pretrained import Pretrained
from ldm3d.models.unet import cut_to, pad_to

CHANNELS = (16, 32, 64)


class SegmentationUNet(Pretrained):
    """The network (Milletari et al. 2016; Isensee et al. 2021).

    Args:
        groups: name -> its labels in the label maps. Class k + 1 is the k-th group, 0 the rest.
        channels: of each level; the first convolution halves the sides, unless there is a `finest` level above it.
        totals: name -> groups that make it up, such as brain_volume_ml of grey and white matter; None for none.
        finest: channels of one more level, at full resolution; 0 for none.

    Raises:
        InputError: a total of groups that are not there, or with the name of one.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[int]],
        channels: Sequence[int] = CHANNELS,
        totals: Mapping[str, Sequence[str]] | None = None,
        finest: int = 0,
    ):
        super().__init__()
        self.groups = {name: [int(label) for label in labels] for name, labels in groups.items()}
        self.totals = {name: list(parts) for name, parts in (totals or {}).items()}
        for name, parts in self.totals.items():
            if name in self.groups or not parts or not set(parts) <= self.groups.keys():
                raise InputError(f"{name}={'+'.join(parts)}: a total adds up groups, which are {', '.join(self.groups)}")
        self.factor = 2 ** (len(channels) - 1)
        strides = (2,) * (len(channels) - 1)
        if finest:
            channels, strides = (finest, *channels), (1, *strides)
        self.network = UNet(3, 1, len(self.groups) + 1, channels, strides, num_res_units=1, norm="instance")

    def forward(self, volumes: Tensor) -> Tensor:
        """Volumes (N, 1, X, Y, Z) in [0, 1] -> logits (N, 1 + groups, X, Y, Z)."""
        shape = volumes.shape[2:]
        padded = pad_to(volumes, [-(-n // self.factor) * self.factor for n in shape])
        return cut_to(self.network(padded), shape)

    def features(self, volumes: Tensor) -> Tensor:
        """What the network sees of the anatomy, for distances between sets: volumes (N, 1, X, Y, Z) -> (N, D).

        The mean over positions of each channel of the coarsest level, the mean probability of each class in each of 3 x 3 x 3
        cells of the grid, and the mean entropy (nats) of the classes in each octant, which is high where tissues cannot be
        told. Finer levels and standard deviations over positions are left out: they respond to the sharpness of outlines
        more than to what lies between them (docs/notes/realism.md).
        """
        coarsest: list[Tensor] = []
        keep = self._coarsest().register_forward_hook(lambda _, __, found: coarsest.append(found))
        try:
            logs = self(volumes).log_softmax(dim=1)  # (N, 1 + groups, X, Y, Z)
        finally:
            keep.remove()
        probabilities = logs.exp()
        entropy = -(probabilities * logs).sum(dim=1, keepdim=True)
        cells = [F.adaptive_avg_pool3d(x, parts) for x, parts in ((coarsest[0], 1), (probabilities, 3), (entropy, 2))]
        return torch.cat([cell.flatten(1) for cell in cells], dim=1)

    def _coarsest(self) -> nn.Module:
        """The part of MONAI's network, which is nested level in level, that works at the coarsest level."""
        block: Any = self.network.model
        while isinstance(block, nn.Sequential):  # down, a skip connection around what is coarser, up
            block = block[1].submodule
        return block
