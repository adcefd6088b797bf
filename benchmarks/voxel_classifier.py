"""A tiny segmenter that is trained within seconds, for benchmarks/downstream.py: a perceptron of each voxel's surroundings.

It sees the 5 x 5 x 5 voxels around, means of 27 blocks of 3 x 3 x 3 farther out, and the place on the grid, to which scans are
registered.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from ldm3d.data.augment import vary
from ldm3d.evaluation.segmentation_utility import Second
from ldm3d.rulers.segmenter import Load

EXAMPLES, VOXELS, STEPS, BATCH, RATE = 80, 1500, 500, 2048, 5e-3  # volumes, and voxels of each, seen in a training
NEAR, FAR, WIDTH = 5, 3, 96  # sides of what is seen, in voxels and in blocks of FAR voxels; hidden units
CHUNK = 16384


class VoxelClassifier(nn.Module):
    """The network; `groups` as of `ldm3d.models.segmentation.SegmentationUNet`."""

    def __init__(self, groups: Mapping[str, Sequence[int]], mean: Tensor, deviation: Tensor):
        super().__init__()
        self.groups, self.mean, self.deviation = dict(groups), mean, deviation  # of the inputs
        inputs = NEAR**3 + FAR**3 + 4
        self.layers = nn.Sequential(nn.Linear(inputs, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.last = nn.Linear(WIDTH, 1 + len(groups))

    def forward(self, volumes: Tensor) -> Tensor:
        """(1, 1, X, Y, Z) -> logits (1, 1 + groups, X, Y, Z)."""
        shape = volumes.shape[2:]
        voxels = torch.arange(shape.numel()).split(CHUNK)
        logits = torch.cat([self.of(surroundings(volumes[0, 0], chunk)) for chunk in voxels])
        return logits.T.reshape(1, -1, *shape)

    def of(self, inputs: Tensor) -> Tensor:
        """(V, inputs) -> (V, 1 + groups)."""
        return self.last(self.layers((inputs - self.mean) / self.deviation))


def surroundings(volume: Tensor, voxels: Tensor) -> Tensor:
    """What the network sees of voxels (V,), by their number in a volume (X, Y, Z): (V, inputs)."""
    blocks = F.avg_pool3d(volume[None], FAR, stride=1, padding=FAR // 2)[0]
    parts = []
    x, y, z = (torch.from_numpy(each) for each in np.unravel_index(voxels.numpy(), volume.shape))
    for values, side, apart in ((volume, NEAR, 1), (blocks, FAR, FAR)):
        reach = side // 2 * apart
        padded, offsets = F.pad(values, [reach] * 6), torch.arange(side) * apart
        i, j, k = (each[:, None] + offsets for each in (x, y, z))  # (V, side)
        parts.append(padded[i[:, :, None, None], j[:, None, :, None], k[:, None, None, :]].flatten(1))
    places = [2 * each / (n - 1) - 1 for each, n in zip((x, y, z), volume.shape)]
    return torch.cat([*parts, torch.stack([*places, places[0].abs()], dim=1)], dim=1)


def train_voxel_classifier(
    load: Load, count: int, groups: Mapping[str, Sequence[int]], *, seed: int = 0, paint: Second | None = None
) -> VoxelClassifier:
    """As `ldm3d.training.segmenter.train_segmenter`, with as many volumes, varied likewise, for any number of people."""
    random = np.random.default_rng(seed)
    inputs, shares = [], []
    for number in range(EXAMPLES):
        i = int(random.integers(count))
        volume, truth = paint(i, random) if paint and number % 2 else load(i)
        voxels = _some(truth, random)
        inputs.append(surroundings(torch.from_numpy(vary(volume, random)[0]), torch.from_numpy(voxels)))
        shares.append(torch.from_numpy(truth.reshape(len(truth), -1)[:, voxels].T.copy()))
    x, y = torch.cat(inputs), torch.cat(shares)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = VoxelClassifier(groups, x.mean(dim=0), x.std(dim=0) + 1e-3)
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        chosen = torch.from_numpy(random.integers(len(x), size=BATCH))
        loss = F.cross_entropy(network.of(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def _some(truth: NDArray, random: np.random.Generator) -> NDArray:
    """Numbers of voxels, most of them in the brain or beside it."""
    near = np.flatnonzero(ndimage.binary_dilation(truth[0] < 1, iterations=2))
    anywhere = random.integers(truth[0].size, size=VOXELS // 10)
    return np.concatenate([random.choice(near, VOXELS - len(anywhere)), anywhere])
