"""Training of a segmentation network on scans with label maps.

Generated volumes are smoother than scans, and other scanners have other contrasts, so training volumes are varied
(`ldm3d.data.augment`) or painted from label maps.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm3d.config.training import TrainingConfig
from ldm3d.data.augment import vary
from ldm3d.errors import InputError
from ldm3d.models.convolutions import mend_convolutions
from ldm3d.models.segmentation import CHANNELS, SegmentationUNet
from ldm3d.precision import bf16_is_fast
from ldm3d.randomness import generator
from ldm3d.rulers.segmenter import Load
from ldm3d.training.optimizer import learning_rate, make_optimizer, set_learning_rate

STEPS, BATCH, LEARNING_RATE = 300, 2, 2e-2  # of training
FINEST = 8  # channels at full resolution: where voxels are coarse, tissues are one voxel wide

# number of a scan and random numbers -> volume and shares as by `Load`, but painted from the scan's label map
Paint = Callable[[int, np.random.Generator], tuple[NDArray, NDArray]]


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
        steps: of Muon, with batches of `BATCH`; the learning rate falls by half a cosine.
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

    training = TrainingConfig(steps=steps, batch_size=BATCH, learning_rate=LEARNING_RATE, optimizer="muon", warmup_steps=20)
    optimizer = make_optimizer(network, training)
    with ThreadPoolExecutor(1) as ahead:  # the next volumes are read and painted meanwhile
        coming = deque(ahead.submit(example, number) for number in range(2 * BATCH))
        for step in tqdm(range(steps), desc="segmenter", unit="step"):
            pairs = [coming.popleft().result() for _ in range(BATCH)]
            coming += [ahead.submit(example, (step + 2) * BATCH + i) for i in range(BATCH)]
            # (N, 1, X, Y, Z), (N, 1 + groups, X, Y, Z)
            x, shares = (torch.from_numpy(np.stack(each)).to(device) for each in zip(*pairs))
            with torch.autocast(kind, torch.bfloat16, enabled=bf16_is_fast(device)):
                logits = network(x)
            set_learning_rate(optimizer, learning_rate(step, training))
            optimizer.zero_grad()
            loss_of_shares(logits.float(), shares).backward()
            optimizer.step()
        ahead.shutdown(cancel_futures=True)
    return network.eval()


def loss_of_shares(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy, and a Dice loss for classes that share voxels: the mean over classes of |p - g| / (p + g), summed apart.

    It is least where the probabilities p are the shares g (Wang et al. 2023, "Dice semimetric losses", eq. 3). The usual soft
    Dice loss is not: for a voxel that is half ventricle it wants all or nothing, and volumes of thin structures go wrong.

    Args:
        logits, shares: (N, classes, X, Y, Z).
    """
    probabilities = logits.softmax(dim=1)
    apart = (probabilities - shares).abs().sum(dim=(0, 2, 3, 4))  # (classes,)
    together = (probabilities + shares).sum(dim=(0, 2, 3, 4))
    return (apart / (together + 1)).mean() + F.cross_entropy(logits, shares)
