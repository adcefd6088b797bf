"""A small segmentation network, trained on scans with label maps: measures volumes that the built-in measure cannot.

Dice and cross-entropy loss (Milletari et al. 2016; Isensee et al. 2021). Generated volumes are smoother than scans, and other
scanners have other contrasts, so training volumes are varied (`ldm3d.data.augment`) or painted from label maps.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from monai.losses import DiceCELoss
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm3d.data.augment import vary
from ldm3d.errors import InputError
from ldm3d.models.convolutions import mend_convolutions
from ldm3d.models.segmentation import CHANNELS, SegmentationUNet
from ldm3d.precision import bf16_is_fast
from ldm3d.randomness import generator
from ldm3d.shipped import segmenter_folder

STEPS, BATCH, LEARNING_RATE = 300, 2, 3e-3  # of training
FINEST = 8  # channels at full resolution: where voxels are coarse, tissues are one voxel wide

# number -> volume (1, X, Y, Z) in [0, 1], and shares of its voxels (1 + groups, X, Y, Z), see `ldm3d.data.labels`
Load = Callable[[int], tuple[NDArray, NDArray]]
Paint = Callable[[int, np.random.Generator], tuple[NDArray, NDArray]]  # the same, painted from the scan's label map


class Segmenter:
    """Volumes of structures: of the same form as `ldm3d.rulers.volumetry.measure_volumes`.

    Args:
        network: trained.
    """

    def __init__(self, network: SegmentationUNet):
        self.network = network.eval()

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str | torch.device = "cpu") -> "Segmenter":
        """From a folder that `SegmentationUNet.save_pretrained` wrote, or a model's, shipped ones included; in float32."""
        return cls(SegmentationUNet.from_pretrained(segmenter_folder(folder), device, torch.float32))

    @property
    def names(self) -> list[str]:
        """Of the classes: class k + 1 is the k-th."""
        return list(self.network.groups)

    @torch.inference_mode()
    def classes(self, volume: NDArray) -> NDArray:
        """Volume (1, X, Y, Z) or (X, Y, Z) in [0, 1] -> the most probable class of each voxel, (X, Y, Z) uint8."""
        return self._logits(volume).argmax(dim=0).to(torch.uint8).cpu().numpy()

    def _logits(self, volume: NDArray) -> Tensor:
        """(1 + groups, X, Y, Z)."""
        device = next(self.network.parameters()).device
        x = torch.from_numpy(np.ascontiguousarray(volume, np.float32)).to(device).view(1, 1, *volume.shape[-3:])
        return self.network(x)[0]

    @torch.inference_mode()
    def __call__(self, volume: NDArray, spacing_mm: Sequence[float]) -> dict[str, float]:
        """Volume (X, Y, Z) in [0, 1] -> {quantity: ml}: the sum of each class's probability, and totals of them.

        The network learns the shares of tissues in a voxel, so a voxel that is half ventricle counts as half.
        """
        filled = self._logits(volume).softmax(dim=0).flatten(1).double().sum(dim=1).tolist()
        voxel_ml = float(np.prod(spacing_mm)) / 1000
        found = {name: share * voxel_ml for name, share in zip(self.names, filled[1:])}
        return found | {name: sum(found[part] for part in parts) for name, parts in self.network.totals.items()}


def train_segmenter(
    load: Load,
    count: int,
    groups: Mapping[str, Sequence[int]],
    steps: int = STEPS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    paint: Paint | None = None,
    channels: Sequence[int] = CHANNELS,
    totals: Mapping[str, Sequence[str]] | None = None,
) -> SegmentationUNet:
    """Train on scans 0 to `count` - 1.

    Args:
        load: number of a scan -> volume and shares, see `Load`, of one shape for all.
        count: of scans.
        groups: see `SegmentationUNet`.
        steps: of AdamW, with batches of `BATCH`; the learning rate falls to 0 by half a cosine.
        seed: of weights, order and augmentation.
        device: where to train.
        paint: of every second volume: number of a scan and random numbers -> volume and shares; None for none.
        channels, totals: see `SegmentationUNet`.

    Raises:
        InputError: no scan, or a group whose labels are nowhere in the first ones.
    """
    if not count:
        raise InputError("no scan to train on; give scans with label maps")
    loaded = [load(i) for i in range(min(count, 8))]
    for k, (name, labels) in enumerate(groups.items()):
        if not any(shares[k + 1].any() for _, shares in loaded):
            raise InputError(f"{name}: labels {list(labels)} are in none of the first {len(loaded)} label maps")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator("segmenter", seed).initial_seed() % 2**63)
        network = SegmentationUNet(groups, channels, totals, FINEST).to(device).train()
    mend_convolutions(network)
    kind = torch.device(device).type

    def example(number: int) -> tuple[NDArray, NDArray]:
        random = np.random.default_rng(generator("segmenter", seed, number).initial_seed())
        scan = int(random.integers(count))
        volume, shares = paint(scan, random) if paint and number % 2 else load(scan)
        return vary(volume, random), shares

    loss_function = DiceCELoss(softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with ThreadPoolExecutor(1) as ahead:  # the next volumes are read and painted meanwhile
        coming = deque(ahead.submit(example, number) for number in range(2 * BATCH))
        for step in tqdm(range(steps), desc="segmenter", unit="step"):
            pairs = [coming.popleft().result() for _ in range(BATCH)]
            coming += [ahead.submit(example, (step + 2) * BATCH + i) for i in range(BATCH)]
            # (N, 1, X, Y, Z), (N, 1 + groups, X, Y, Z)
            x, shares = (torch.from_numpy(np.stack(each)).to(device) for each in zip(*pairs))
            with torch.autocast(kind, torch.bfloat16, enabled=bf16_is_fast(device)):
                logits = network(x)
            loss = loss_function(logits.float(), shares)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        ahead.shutdown(cancel_futures=True)
    return network.eval()


def dice(network: SegmentationUNet, load: Load, numbers: Sequence[int]) -> dict[str, list[float]]:
    """Overlap of each group with the label map (Dice 1945), by the class with most of a voxel; NaN where both are empty."""
    found: dict[str, list[float]] = {name: [] for name in network.groups}
    device = next(network.parameters()).device
    with torch.inference_mode():
        for i in numbers:
            volume, shares = load(i)
            predicted = network(torch.from_numpy(volume).float().to(device)[None])[0].argmax(dim=0).cpu().numpy()
            classes = shares.argmax(axis=0)
            for k, name in enumerate(network.groups):
                a, b = predicted == k + 1, classes == k + 1
                total = a.sum() + b.sum()
                found[name].append(2 * float((a & b).sum()) / total if total else float("nan"))
    return found
