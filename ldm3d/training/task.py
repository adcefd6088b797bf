"""What differs between trainings. The loop that they share is `ldm3d.training.loop.fit`."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm3d.config.sections import TrainingConfig
from ldm3d.data.batches import TrainingBatches
from ldm3d.data.samples import LatentSamples, VolumeSamples
from ldm3d.training.ema import EMA
from ldm3d.training.sharding import prepare

MAIN = "model"  # the network that a task is about


@dataclass
class Trained:
    """A network that the loop trains.

    Attributes:
        network: the bare one, whose parameters are trained and kept in checkpoints.
        optimizer: its own.
        rate: optimiser step (from 0) -> learning rate; None leaves the optimiser's.
        clip: the largest norm of its gradient.
        average: that follows it; None for none.
        module: what a task calls: the network, wrapped for several processes once it is `spread`.
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
        self.module, self.stepper = self.network, self.optimizer

    def spread(self, accelerator: Accelerator) -> None:
        """Make it ready for the processes of the run."""
        self.module, self.stepper = prepare(accelerator, self.network, self.optimizer)
        self.optimizer = self.stepper.optimizer
        if self.average:
            self.average.spread_like(self.network)


class Task:
    """A training: its networks, what they learn from, and what is made of them in the end.

    Attributes:
        title: on the progress bar.
        shown: the logged value that stands beside the bar.
        settings: JSON values that make a run this run; another's checkpoints are refused.
        trained: networks by name; the first is called `MAIN` and has an average.
        companions: networks that the task itself trains, in `before_step`, with their optimisers.
        batches: what is read.
        scans: the table of all scans, of which those of training and validation are seen.
        takes_other_scans: whether a run may go on with other scans than it began with.
        settled: steps after which the validation loss of all later ones compares.
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

    def begin(self) -> None:
        """What precedes the first step of a run that does not go on from a checkpoint."""

    def subject(self, sample: int) -> str:
        """Whose scan a sample of the training split is, for messages."""
        return self.scans.loc[self.scans["split"] == "train", "subject"].iloc[sample]

    def losses(self, batch: Mapping[str, Tensor], step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """(name of the trained network, its loss, what to log) in turn; after each the loop takes the gradient, and the step.

        Args:
            batch: this process's part of a micro-batch, on the device.
            step: optimiser steps done.
        """
        raise NotImplementedError

    def before_step(self, loss: Tensor) -> None:
        """Called before the step of `MAIN`, with its loss as a mean over this process's parts of the batch."""

    def score(self, average: nn.Module, step: int) -> dict[str, float]:
        """`validation_loss` of held-out data, lower is better, and what else to log; {} where nothing is held out.

        Args:
            average: of `MAIN`, whole on every process.
            step: optimiser steps done but the last.
        """
        raise NotImplementedError

    def preview(self, average: nn.Module, path: Path) -> None:
        """Draw what the average makes; on the main process alone."""
        raise NotImplementedError

    def export(self, average: nn.Module, which: str) -> None:
        """Write what the next stage takes; on every process. `which` says in words what the average is."""
        raise NotImplementedError

    def networks(self) -> dict[str, nn.Module]:
        """All networks that a checkpoint keeps, by name."""
        own = {name: each.network for name, each in self.trained.items()} | self.chosen()
        return own | {name: network for name, (network, _) in self.companions.items()}

    def chosen(self) -> dict[str, nn.Module]:
        """Those of them that `export` takes: from the last step, or the best."""
        return {"ema": self.trained[MAIN].average.network} | {name: network for name, (network, _) in self.companions.items()}

    def optimizers(self) -> dict[str, tuple[nn.Module, Optimizer]]:
        """All optimisers that a checkpoint keeps, each with its network."""
        own = {name: (each.network, each.optimizer) for name, each in self.trained.items()} | dict(self.companions)
        return {"optimizer" if name == MAIN else f"{name}_optimizer": pair for name, pair in own.items()}


def batches_of(
    samples: VolumeSamples | LatentSamples, training: TrainingConfig, seed: int, accelerator: Accelerator
) -> TrainingBatches:
    """This process's part of every batch of a run."""
    processes = accelerator.process_index, accelerator.num_processes
    return TrainingBatches(samples, len(samples), training.batch_size, training.accumulation, seed, *processes)
