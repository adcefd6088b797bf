"""What differs between trainings. The loop that they share is `ldm3d.training.loop.fit`."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm3d.config.sections import Config
from ldm3d.config.training import TrainingConfig
from ldm3d.data.balance import balanced_weights
from ldm3d.data.batches import TrainingBatches
from ldm3d.data.samples import LatentSamples, VolumeSamples
from ldm3d.models.convolutions import mend_convolutions
from ldm3d.preemption import Stop
from ldm3d.training.ema import EMA
from ldm3d.training.optimizer import learning_rate, make_optimizer
from ldm3d.training.sharding import distribute

MAIN = "model"  # the network that a task is about


@dataclass
class Trained:
    """A network that the loop trains.

    Attributes:
        network: its parameters are trained and kept in checkpoints.
        optimizer: of these parameters.
        rate: optimiser step (from 0) -> learning rate; None leaves the optimiser's.
        clip: the largest norm of the gradient.
        average: moving average of the weights; None for none.
        module: what a task calls: the network, wrapped for the processes of the run by `distribute`.
        stepper: the optimiser, wrapped likewise.
    """

    network: nn.Module
    optimizer: Optimizer
    rate: Callable[[int], float] | None = None
    clip: float = math.inf
    average: EMA | None = None
    module: nn.Module = field(init=False)
    stepper: Any = field(init=False)

    def __post_init__(self):
        mend_convolutions(self.network)
        self.module, self.stepper = self.network, self.optimizer

    @classmethod
    def of(cls, network: nn.Module, training: TrainingConfig) -> "Trained":
        """A network with the optimiser, the learning rate and the average that the config asks for."""
        rate = partial(learning_rate, training=training)
        average, optimizer = EMA(network, training.ema), make_optimizer(network, training)
        return cls(network, optimizer, rate, training.gradient_clip, average)

    def distribute(self, accelerator: Accelerator) -> None:
        """Wrap network and optimiser for the processes of the run."""
        self.module, self.stepper = distribute(accelerator, self.network, self.optimizer)
        self.optimizer = self.stepper.optimizer
        if self.average:
            self.average.shard_like(self.network)


class Task:
    """A training: its networks, its data, its losses, and what it exports.

    Attributes:
        title: on the progress bar.
        shown: name of the logged value that the progress bar shows.
        settings: JSON values that identify a run; checkpoints of a run with other settings are refused.
        trained: networks by name; the first is called `MAIN` and has an average.
        companions: networks that the task itself trains, in `before_step`, with their optimisers.
        batches: what each step reads.
        scans: the table of all scans; the run sees those of training and validation.
        takes_other_scans: whether a run may go on with other scans than it began with.
        settled: validation losses after this many steps are comparable.
    """

    title: str
    shown: str = "loss"
    settings: Mapping[str, Any]
    trained: dict[str, Trained]
    companions: Mapping[str, tuple[nn.Module, Optimizer]] = {}
    batches: TrainingBatches
    scans: pd.DataFrame
    takes_other_scans: bool = False
    settled: int = 0

    def begin(self, stop: Stop) -> bool:
        """Called before the first step of a run that starts without a checkpoint; False if a stop has cut it short."""
        return True

    def subjects(self, step: int) -> list[str]:
        """The subjects that all processes together read in a step, for messages."""
        return list(self.scans.loc[self.scans["split"] == "train", "subject"].iloc[self.batches.samples(step)])

    def losses(self, batch: Mapping[str, Tensor], step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """(name of the trained network, its loss, what to log) in turn; the loop computes each gradient. `MAIN` logs `loss`.

        Args:
            batch: this process's part of a micro-batch, on the device.
            step: optimiser steps done.
        """
        raise NotImplementedError

    def before_step(self, loss: Tensor) -> None:
        """Called before the step of `MAIN`, with its loss as a mean over this process's parts of the batch."""

    def score(self, average: nn.Module, step: int) -> dict[str, float]:
        """`validation_loss` of held-out data (lower is better) and other values to log; {} where nothing is held out.

        Args:
            average: of `MAIN`, with full parameters on every process.
            step: number of the last step, from 0.
        """
        raise NotImplementedError

    def preview(self, average: nn.Module, path: Path) -> None:
        """Draw results of the average; only on the main process."""
        raise NotImplementedError

    def export(self, average: nn.Module, which: str) -> None:
        """Write the input of the next stage; on every process. `which` describes the average: last step, or best."""
        raise NotImplementedError

    def networks(self) -> dict[str, nn.Module]:
        """All networks that a checkpoint keeps, by name."""
        own = {name: each.network for name, each in self.trained.items()} | self.chosen()
        return own | {name: network for name, (network, _) in self.companions.items()}

    def chosen(self) -> dict[str, nn.Module]:
        """The networks that `export` writes, after the last step or the best one."""
        return {"ema": self.trained[MAIN].average.network} | {name: network for name, (network, _) in self.companions.items()}

    def optimizers(self) -> dict[str, tuple[nn.Module, Optimizer]]:
        """All optimisers that a checkpoint keeps, each with its network."""
        own = {name: (each.network, each.optimizer) for name, each in self.trained.items()} | dict(self.companions)
        return {"optimizer" if name == MAIN else f"{name}_optimizer": pair for name, pair in own.items()}


def batches_of(
    samples: VolumeSamples | LatentSamples,
    training: TrainingConfig,
    config: Config,
    accelerator: Accelerator,
    rows: pd.DataFrame,
) -> TrainingBatches:
    """This process's part of every batch of a run; `rows` of the samples say whose they are, and what `data.balance` needs."""
    processes = accelerator.process_index, accelerator.num_processes
    subjects, balance = list(rows["subject"]), config.data.balance
    taking_turns = subjects if config.data.sample == "by-subject" else None
    weights = balanced_weights(rows, balance, subjects, config.schema()).tolist() if balance else None
    sizes = len(samples), training.batch_size, training.accumulation
    return TrainingBatches(samples, *sizes, config.seed, *processes, subjects=taking_turns, weights=weights)


def sampling_of(config: Config) -> dict[str, Any]:
    """What a run compares of `data.sample` and `data.balance`, on which the order of batches depends; {} for the defaults, as
    in older runs."""
    found: dict[str, Any] = {} if config.data.sample == "by-scan" else {"sample": config.data.sample}
    return found | ({"balance": config.data.balance.model_dump(mode="json")} if config.data.balance else {})
