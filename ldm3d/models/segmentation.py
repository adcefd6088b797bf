"""A small segmentation network, and the meaning of its classes.

As in the autoencoder, 2x2x2 voxels become 8 channels and the head turns channels into voxels: no convolution works at full
resolution, and yet every voxel has an answer of its own.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm3d.errors import InputError
from ldm3d.models.blocks import depth_to_space, space_to_depth, zero
from ldm3d.models.pretrained import Pretrained
from ldm3d.models.unet import cut_to, pad_to

CHANNELS = (32, 48, 64)


class InstanceBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), as He et al. 2016; starts as the identity.

    The norm is over the positions of each channel of each volume (Ulyanov et al. 2016), which takes off a scanner's contrast.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.InstanceNorm3d(channels, affine=True) for _ in range(2))
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = zero(nn.Conv3d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, X, Y, Z) -> the same."""
        h = self.conv1(F.silu(self.norms[0](x)))
        return x + self.conv2(F.silu(self.norms[1](h)))


class SegmentationUNet(Pretrained):
    """U-Net (Ronneberger et al. 2015) with residual blocks, whose skips are added.

    Args:
        groups: name -> its labels in the label maps. Class k + 1 is the k-th group, 0 the rest.
        channels: of each level; the first one works at half of the volume's resolution, each further at half of that before.
        totals: name -> groups that make it up, such as brain_volume_ml of grey and white matter; None for none.

    Raises:
        InputError: a total of groups that are not there, or with the name of one.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[int]],
        channels: Sequence[int] = CHANNELS,
        totals: Mapping[str, Sequence[str]] | None = None,
    ):
        super().__init__()
        self.groups = {name: [int(label) for label in labels] for name, labels in groups.items()}
        self.totals = {name: list(parts) for name, parts in (totals or {}).items()}
        for name, parts in self.totals.items():
            if name in self.groups or not parts or not set(parts) <= self.groups.keys():
                raise InputError(f"{name}={'+'.join(parts)}: a total adds up groups, which are {', '.join(self.groups)}")
        self.factor = 2 ** len(channels)
        self.stem = nn.Conv3d(8, channels[0], 3, padding=1)
        self.down = nn.ModuleList(InstanceBlock(width) for width in channels)
        self.downsample = nn.ModuleList(nn.Conv3d(fine, coarse, 2, stride=2) for fine, coarse in pairwise(channels))
        self.middle = InstanceBlock(channels[-1])
        self.upsample = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, stride=2) for fine, coarse in pairwise(channels))
        self.up = nn.ModuleList(InstanceBlock(width) for width in channels[:-1])
        self.head = nn.Conv3d(channels[0], 8 * (1 + len(self.groups)), 3, padding=1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Volumes (N, 1, X, Y, Z) in [0, 1] -> logits (N, 1 + groups, X, Y, Z), float32."""
        return self._with_coarsest(volumes)[0]

    def features(self, volumes: Tensor) -> Tensor:
        """What the network sees of the anatomy, for distances between sets: volumes (N, 1, X, Y, Z) -> (N, D).

        The mean over positions of each channel of the coarsest level, the mean probability of each class in each of 3 x 3 x 3
        cells of the grid, and the mean entropy (nats) of the classes in each octant, which is high where tissues cannot be
        told. Finer levels and standard deviations over positions are left out: they respond to the sharpness of outlines
        more than to what lies between them (docs/notes/realism.md).
        """
        logits, coarsest = self._with_coarsest(volumes)
        logs = logits.log_softmax(dim=1)  # (N, 1 + groups, X, Y, Z)
        probabilities = logs.exp()
        entropy = -(probabilities * logs).sum(dim=1, keepdim=True)
        cells = [F.adaptive_avg_pool3d(x, parts) for x, parts in ((coarsest, 1), (probabilities, 3), (entropy, 2))]
        return torch.cat([cell.flatten(1) for cell in cells], dim=1)

    def _with_coarsest(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, what the coarsest level holds, (N, channels[-1], x, y, z))."""
        shape = volumes.shape[2:]
        padded = pad_to(volumes, [-(-n // self.factor) * self.factor for n in shape])
        h = self.stem(space_to_depth(padded, 2))  # (N, channels[0], X / 2, ...)
        skips = []
        for level, downsample in zip(self.down, self.downsample):
            h = level(h)
            skips.append(h)
            h = downsample(h)
        h = coarsest = self.middle(self.down[-1](h))
        for level, upsample in reversed(list(zip(self.up, self.upsample))):
            h = level(skips.pop() + upsample(h))
        return cut_to(depth_to_space(self.head(F.silu(h)).float(), 2), shape), coarsest.float()
