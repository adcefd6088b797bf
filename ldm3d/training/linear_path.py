"""The start of stage 1: the autoencoder's linear path is trained alone, before any network."""

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from tqdm import tqdm

from ldm3d.models.autoencoder import Autoencoder
from ldm3d.preemption import Stop
from ldm3d.randomness import generator
from ldm3d.training.optimizer import Muon

BATCH, LEARNING_RATE = 4, 1e-2
VOLUMES, VOXELS = 64, 32_000_000  # enough blocks for their statistics: 64 volumes of 3 mm, a handful of 1 mm


def volumes_for(shape: tuple[int, ...]) -> int:
    """How many volumes of a shape (X, Y, Z) the linear path is fitted to."""
    return max(4, min(VOLUMES, VOXELS // math.prod(shape)))


def train_linear_path(
    network: Autoencoder,
    volumes: Tensor,
    steps: int,
    seed: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    stop: Stop = Stop(),  # noqa: B008 (of a caller that handles no signals)
) -> bool:
    """Fit the linear path in closed form, then train it alone: analysis and synthesis, least squares over the volumes.

    Principal components are the best code of a block by itself. Where blocks are decoded from their neighbours' latents, too,
    a latent need not repeat what its neighbours hold, and training finds this better code. A step costs a hundredth of one of
    the autoencoder.

    Args:
        network: with a linear path; nothing else of it is touched.
        volumes: some training volumes, (N, C, X, Y, Z) in [0, 1].
        steps: of the training; 0 leaves the closed form.
        seed: of the batches.
        autocast: the precision to train in.
        stop: when it asks for it, training ends early and the path is unfinished.

    Returns:
        Whether it was finished.
    """
    analysis, synthesis = network.analysis, network.synthesis
    volumes = volumes.to(analysis.weight.device)
    network.fit_linear_path(volumes)
    groups = [
        {"params": [analysis.weight, synthesis.weight], "orthogonal": True},
        {"params": [analysis.bias, synthesis.bias], "orthogonal": False},
    ]
    optimizer = Muon(groups, LEARNING_RATE)
    every = 0.1 if sys.stderr.isatty() else 30  # seconds between two updates of the bar: a log file needs few
    for step in tqdm(range(steps), desc="linear path", unit="step", mininterval=every):
        if stop.signal:
            return False
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        chosen = torch.randint(len(volumes), (BATCH,), generator=generator(seed, "linear path", step))
        batch = volumes[chosen.to(volumes.device)]
        with autocast():
            again = network.through_linear_path(batch)
        (again.float() - batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return True
