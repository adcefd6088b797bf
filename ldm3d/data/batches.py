"""Batches of training steps: which samples, in which order, with which random numbers.

All of it follows from (seed, step) alone. A run that is resumed at step s, or split over more processes, reads what an
uninterrupted run on one process reads.
"""

import atexit
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ldm3d.errors import InputError
from ldm3d.preemption import ignore_signals
from ldm3d.randomness import generator


def evenly(items: Sequence, most: int) -> list:
    """`most` of the items, evenly chosen; all of them where there are not more."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]


class TrainingBatches(Dataset):
    """Item m is this process's part of micro-batch m: step m // accumulation, part m % accumulation.

    Args:
        read: (sample, generator) -> tensors of one sample by name; every random number comes from the generator.
        num_samples: samples in the training split. Each epoch is one permutation of them; a batch may span two epochs.
        subjects: of each sample; then each epoch is one permutation of the subjects, and a subject's samples take turns from
            epoch to epoch. None: every sample counts on its own.
        weights: how often each sample comes up in an epoch on average, with mean 1; a subject's weight is its samples' mean.
            An epoch then has each one as often as its weight, rounded up or down at random. None: once each.
        batch_size: global, over all processes and accumulated parts.
        accumulation: parts of a batch.
        seed: of order and random numbers.
        rank, world: this process and how many there are.

    A batch is a dict of the stacked tensors, and `quantile` (N,): uniform in [0, 1), stratified over the global batch
    (the low-discrepancy times of Kingma et al. 2021, appendix I.1).
    """

    def __init__(
        self,
        read: Callable[[int, torch.Generator], dict[str, Tensor]],
        num_samples: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        subjects: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
    ):
        if batch_size % (accumulation * world):
            raise InputError(
                f"batch_size {batch_size} must be divisible by accumulation {accumulation} times {world} processes; "
                f"try {-(-batch_size // (accumulation * world)) * accumulation * world}"
            )
        self.read, self.num_samples, self.batch_size = read, num_samples, batch_size
        self.accumulation, self.seed, self.rank, self.world = accumulation, seed, rank, world
        self._turns: list[list[int]] = [[sample] for sample in range(num_samples)]  # samples that take turns
        if subjects is not None:
            of: dict[str, list[int]] = {}
            for sample, subject in enumerate(subjects):
                of.setdefault(subject, []).append(sample)
            self._turns = list(of.values())
        self._weights = None
        if weights is not None:
            own = torch.tensor(
                [sum(weights[i] for i in samples) / len(samples) for samples in self._turns], dtype=torch.float64
            )
            self._weights = own / own.mean()
        self._epoch, self._order = -1, None

    def __getitem__(self, micro: int) -> dict[str, Tensor]:
        step, part = divmod(micro, self.accumulation)
        size = self.batch_size // (self.accumulation * self.world)
        first = (part * self.world + self.rank) * size
        rows = range(first, first + size)
        try:
            samples = [self.read(self._sample(step * self.batch_size + row), generator(self.seed, step, row)) for row in rows]
        except InputError as error:
            if get_worker_info() is None:
                raise
            return error  # a raised one would arrive with the worker's traceback in its message
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        offset = torch.rand((), generator=generator(self.seed, step, self.batch_size))
        batch["quantile"] = (torch.tensor(rows) / self.batch_size + offset) % 1
        return batch

    def samples(self, step: int) -> list[int]:
        """The samples that all processes together read at a step."""
        return [self._sample(step * self.batch_size + row) for row in range(self.batch_size)]

    def _sample(self, position: int) -> int:
        """The sample at a position in the endless sequence of epochs."""
        epoch, index = divmod(position, len(self._turns))
        if epoch != self._epoch:
            # A position of two numbers, where those of steps have three: no generator is used twice
            rng = generator(self.seed, epoch)
            order = torch.randperm(len(self._turns), generator=rng)
            if self._weights is not None:
                order = _resampled(order, self._weights, rng)
            self._epoch, self._order = epoch, order
        turn = int(self._order[index])
        samples = self._turns[turn]
        return samples[(epoch + turn) % len(samples)]  # not all subjects begin with their first visit

    def loader(self, first_step: int, last_step: int, workers: int, pin_memory: bool) -> Iterator[dict[str, Tensor]]:
        """Batches of steps first_step to last_step - 1, read ahead by `workers` processes."""
        batches = self._batches(range(first_step * self.accumulation, last_step * self.accumulation), workers, pin_memory)
        if workers:
            # At exit Python sends SIGTERM, which the workers ignore, and waits; so PyTorch has to stop them before
            atexit.register(_close, weakref.ref(batches))
        return batches

    def _batches(self, micro_batches: range, workers: int, pin_memory: bool) -> Iterator[dict[str, Tensor]]:
        batches = DataLoader(
            self,
            worker_init_fn=ignore_signals,
            batch_size=None,
            sampler=micro_batches,
            num_workers=workers,
            pin_memory=pin_memory,
            multiprocessing_context="spawn" if workers else None,
        )
        for batch in batches:
            if isinstance(batch, InputError):
                raise batch
            yield batch


def _resampled(order: Tensor, weights: Tensor, rng: torch.Generator) -> Tensor:
    """As many turns as there are, each as often as its weight, rounded up or down: systematic resampling, then shuffled."""
    count = len(order)
    ends = weights[order].cumsum(0)
    points = torch.arange(count, dtype=torch.float64) + torch.rand((), generator=rng, dtype=torch.float64)
    chosen = torch.searchsorted(ends, points, right=True).clamp(max=count - 1)
    return order[chosen][torch.randperm(count, generator=rng)]


def _close(batches: weakref.ref) -> None:
    if (alive := batches()) is not None:
        alive.close()
