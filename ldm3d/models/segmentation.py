"""A small segmentation network: MONAI's residual U-Net, and the meaning of its classes."""

from collections.abc import Mapping, Sequence

from monai.networks.nets import UNet
from torch import Tensor

from ldm3d.models.pretrained import Pretrained
from ldm3d.models.unet import cut_to, pad_to

CHANNELS = (16, 32, 64)


class SegmentationUNet(Pretrained):
    """The network (Milletari et al. 2016; Isensee et al. 2021).

    Args:
        groups: name -> its labels in the label maps. Class k + 1 is the k-th group, 0 the rest.
        channels: of each level; the first convolution halves the sides, so that no wide layer works at full resolution.
    """

    def __init__(self, groups: Mapping[str, Sequence[int]], channels: Sequence[int] = CHANNELS):
        super().__init__()
        self.groups = {name: [int(label) for label in labels] for name, labels in groups.items()}
        self.factor = 2 ** (len(channels) - 1)
        strides = (2,) * (len(channels) - 1)
        self.network = UNet(3, 1, len(self.groups) + 1, channels, strides, num_res_units=1, norm="instance")

    def forward(self, volumes: Tensor) -> Tensor:
        """Volumes (N, 1, X, Y, Z) in [0, 1] -> logits (N, 1 + groups, X, Y, Z)."""
        shape = volumes.shape[2:]
        padded = pad_to(volumes, [-(-n // self.factor) * self.factor for n in shape])
        return cut_to(self.network(padded), shape)
