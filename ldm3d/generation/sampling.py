"""Volumes of many requests, sampled in groups of one size and decoded one by one.

Kernels add in another order for another batch or another number of threads. So batches are always full and the number of
threads is fixed: sample n is row n % size of its batch, and a volume is bit-identical alone, in any series and on any number
of processes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.covariates import Value
from ldm3d.description import Sampling
from ldm3d.devices import HostCopy, computing_alike
from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.process import Process
from ldm3d.diffusion.samplers import sample
from ldm3d.errors import InputError
from ldm3d.randomness import generator

# Positions of latents that keep a network busy: as many volumes go through it together, but no more than the second number.
# Measured on CPUs. For GPUs they are assumed: 8 volumes of 1 mm, 32 of 3 mm; fewer would leave most of one idle
FILL = {"cpu": (8192, 4), "cuda": (2**17, 64)}
AHEAD = {"cpu": 0, "cuda": 1}  # volumes that are decoded while the one before is on its way to the host


class Model(Protocol):
    """What draws: `ldm3d.pipeline.Pipeline`."""

    threads: int | None

    @property
    def device(self) -> torch.device: ...

    @property
    def group_size(self) -> int: ...

    def latents(self, requests: Sequence[Mapping[str, Value]], sampling: Sampling, numbers: Sequence[int]) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...


def default_group_size(positions: int, device: torch.device) -> int:
    """How many volumes with so many positions of the latent grid fill a device.

    One volume alone costs a whole batch. On a CPU it is as fast to go one by one where latents are large, and where they are
    small a batch of up to 4 costs little. A GPU takes many at a time, a multiple of 8 of them.
    """
    fill, most = FILL["cpu" if device.type == "cpu" else "cuda"]
    size = max(1, min(most, fill // positions))
    return size - size % 8 if size > 8 else size


def grouped(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Split 0, 1, ..., len(numbers) - 1 into runs whose numbers have different rows in one batch of `size`."""
    run: list[int] = []
    for k, number in enumerate(numbers):
        if run and (number // size != numbers[run[-1]] // size or number <= numbers[run[-1]]):
            yield run
            run = []
        run.append(k)
    if run:
        yield run


def draw(
    model: Model, requests: Sequence[Mapping[str, Value]], numbers: Sequence[int], sampling: Sampling, batch_size: int
) -> Iterator[NDArray]:
    """Volumes (C, X, Y, Z) of requests with these numbers in their series; see `Pipeline.volumes`."""
    groups = list(grouped(numbers, model.group_size))
    at_once = -(-batch_size // model.group_size)
    for start in range(0, len(groups), at_once):
        latents: list[Tensor] = []
        for group in groups[start : start + at_once]:
            with computing_alike(model.device, model.threads):
                latents += _sample([requests[k] for k in group], [numbers[k] for k in group], model, sampling)
        for volume in _decode(latents, model):
            if not np.isfinite(volume).all():
                raise InputError(
                    "the model made a volume with NaN in it: its weights are damaged, or bfloat16 is too coarse for them "
                    "(use float32)"
                )
            yield volume


def _sample(requests: Sequence[Mapping[str, Value]], numbers: Sequence[int], model: Model, sampling: Sampling) -> list[Tensor]:
    """Latents of the requests of one group, from a full batch."""
    size = model.group_size
    request_of_row = {number % size: k for k, number in enumerate(numbers)}
    rows = [request_of_row.get(row, 0) for row in range(size)]  # what fills the other rows has no influence
    try:
        z = model.latents([requests[k] for k in rows], sampling, [numbers[k] for k in rows])
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"sampling {size} volumes at a time runs out of GPU memory ({error}); ask for fewer with --group (Pipeline.group)"
        ) from None
    return [z[number % size] for number in numbers]


def _decode(latents: Sequence[Tensor], model: Model) -> Iterator[NDArray]:
    """Volumes (C, X, Y, Z) of latents (c, x, y, z), one at a time: the decoder is where memory peaks."""
    ahead = AHEAD["cpu" if model.device.type == "cpu" else "cuda"]
    leaving: deque[HostCopy] = deque()
    for latent in latents:
        with computing_alike(model.device, model.threads):
            leaving.append(HostCopy(model.decode(latent[None])[0]))
        if len(leaving) > ahead:
            yield leaving.popleft().numpy()
    while leaving:
        yield leaving.popleft().numpy()


def sample_latents(
    denoise: Denoiser,
    process: Process,
    shape: Sequence[int],
    sampling: Sampling,
    numbers: Sequence[int],
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents (N, *shape), each from the noise of its number in the series; `progress` is told of each step."""
    # One generator a sample, asked in the order start, step 0, step 1, ...: batches have no influence
    generators = [generator("sample", sampling.seed, number) for number in numbers]

    def noise(_step: int | None = None) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    start = noise()
    name, steps, spacing = sampling.sampler, sampling.steps, sampling.spacing
    return sample(name, denoise, start, process, steps, spacing=spacing, noise=noise, progress=progress)
