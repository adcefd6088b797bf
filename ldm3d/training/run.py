"""What both training loops need around them: the command line, processes, metrics, figures."""

import argparse
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    broadcast,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ldm3d import figures
from ldm3d.config import Config, TrainingConfig, load_config
from ldm3d.errors import InputError, differences
from ldm3d.precision import bf16_is_fast
from ldm3d.preemption import REQUEUE, Stop
from ldm3d.processes import check_all_started, cores_each
from ldm3d.training.sharding import is_spread, whole


def parse_command_line(description: str, section: str) -> Config:
    """The config named on the command line, with its --set overrides."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=Path, help="the experiment's YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. training.steps=500"
    )
    arguments = parser.parse_args()
    return load_config(arguments.config, arguments.set, section)


def start_accelerator(training: TrainingConfig, run: Path, seed: int) -> Accelerator:
    """Accelerate for a run; initial weights follow from `seed` on every process.

    Raises:
        InputError: fewer processes than were asked for, or a batch that they cannot share.
    """
    run.mkdir(parents=True, exist_ok=True)
    precision = training.mixed_precision
    if precision == "auto":  # of the device that the Accelerator below will take, which need not be the GPU
        device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
        precision = "bf16" if bf16_is_fast(device) else "no"
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=training.accumulation,
        dataloader_config=DataLoaderConfiguration(),
    )
    check_all_started()
    if training.batch_size % (training.accumulation * accelerator.num_processes):
        raise InputError(
            f"training.batch_size {training.batch_size} must be divisible by accumulation {training.accumulation} times "
            f"{accelerator.num_processes} processes"
        )
    if accelerator.device.type == "cpu":
        # accelerate launch leaves one thread to a process unless it is told otherwise
        torch.set_num_threads(cores_each())
    set_seed(seed)
    say(
        accelerator,
        f"{run}: {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"precision {precision}, batch {training.batch_size}",
    )
    return accelerator


def say(accelerator: Accelerator, text: str) -> None:
    """Print a line once; `Accelerator.print` prints one on every node."""
    if accelerator.is_main_process:
        print(text, flush=True)


def ready_to_spread(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The network in the memory format that its distribution can take: FSDP2 spreads contiguous parameters only."""
    if accelerator.distributed_type == DistributedType.FSDP:
        network.to(memory_format=torch.contiguous_format)
    return network


class Metrics:
    """metrics.jsonl, TensorBoard and the loss curves of a run; each step once, also after resuming.

    metrics.jsonl is what counts: TensorBoard's files are made from it anew at every start, since a killed process leaves them
    with steps that are missing and others that will come twice.

    Args:
        run: folder.
        accelerator: only its main process writes.
        first_step: lines of later steps, left by an interrupted run, are removed.
    """

    def __init__(self, run: Path, accelerator: Accelerator, first_step: int):
        self.path, self.is_writer = run / "metrics.jsonl", accelerator.is_main_process
        self.rows: list[dict[str, Any]] = []
        if not self.is_writer:
            return
        if self.path.exists():
            self.rows = [row for row in read_metrics(self.path) if row["step"] <= first_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(partial, self.path)
        shutil.rmtree(run / "tensorboard", ignore_errors=True)
        self.tensorboard = SummaryWriter(run / "tensorboard")
        for row in self.rows:
            self._to_tensorboard(row)

    def add(self, step: int, values: dict[str, float]) -> None:
        if not self.is_writer:
            return
        finite = {key: round(float(value), 6) for key, value in values.items() if math.isfinite(value)}  # JSON has no NaN
        row = {"step": step, **finite}
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self._to_tensorboard(row)

    def _to_tensorboard(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self.tensorboard.add_scalar(name, value, row["step"])

    def to_disk(self) -> None:
        """Return when what was added would survive a power cut: before a checkpoint that follows it."""
        if self.is_writer:
            self.tensorboard.flush()
            with open(self.path, "a") as file:
                os.fsync(file.fileno())

    def draw(self) -> None:
        """Loss curves as curves.png."""
        if self.is_writer:
            figures.save(figures.curves(self.rows), self.path.with_name("curves.png"))

    def close(self) -> None:
        if self.is_writer:
            self.tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a half-written last line is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            warnings.warn(f"{path}: a half-written line is ignored", stacklevel=2)
    return rows


def progress_bar(accelerator: Accelerator, title: str, first_step: int, steps: int) -> tqdm:
    """A bar on the main process alone; in a log file it moves twice a minute only."""
    every = 0.1 if sys.stderr.isatty() else 30
    hidden = not accelerator.is_main_process
    return tqdm(total=steps, initial=first_step, desc=title, unit="step", mininterval=every, disable=hidden, smoothing=0.05)


def same_start(network: nn.Module) -> None:
    """Give all processes the main one's weights."""
    for tensor in network.state_dict().values():
        tensor.copy_(broadcast(tensor.contiguous()))


def agreed(value: Any) -> Any:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0]


def circumstances(accelerator: Accelerator) -> dict[str, Any]:
    """What a run's last bits follow from beside its settings; kept in checkpoints, to be compared by `say_changes`."""
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads() if accelerator.device.type == "cpu" else 0,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__,
    }


def say_changes(before: dict[str, Any], accelerator: Accelerator) -> None:
    """Say what can no longer be bit-identical in a run that goes on under other circumstances."""
    changed = differences(before, circumstances(accelerator))
    if changed:
        say(
            accelerator,
            f"going on with {', '.join(changed)}: the same samples in the same order with the same random numbers, but sums "
            "are rounded otherwise, so the weights are no longer bit-identical to an uninterrupted run's",
        )


def asked_to_stop(stop: Stop, accelerator: Accelerator, meeting: bool) -> bool:
    """Whether to stop after this step. All processes answer alike; where there are several, only at a `meeting` of them."""
    if accelerator.num_processes == 1:
        return stop.asked
    return meeting and accelerator.reduce(torch.tensor(float(stop.asked), device=accelerator.device), "sum").item() > 0


def leave(stop: Stop, run: Path, step: int, accelerator: Accelerator) -> NoReturn:
    """End the program with exit code `REQUEUE`; the checkpoint of `step` is written."""
    say(accelerator, f"{run}: {stop.signal or 'a signal'} after step {step}; the same command goes on from there")
    accelerator.end_training()
    raise SystemExit(REQUEUE)


class FiniteSteps:
    """Takes optimiser steps, but those whose gradient is NaN or infinite: they change nothing, and too many end the run.

    Args:
        accelerator: the run's.
        limit: how many may be skipped.
        subjects: step -> whose scans it read.
        skipped: how many were before the checkpoint that the run goes on from.
    """

    def __init__(self, accelerator: Accelerator, limit: int, subjects: Callable[[int], list[str]], skipped: int):
        self.accelerator, self.limit, self.subjects, self.said = accelerator, limit, subjects, skipped
        self._skipped = torch.tensor([skipped, 0], device=accelerator.device)  # how many; 1 + the last of them

    def step(self, optimizer: AcceleratedOptimizer, step: int, norm: Tensor, loss: Tensor) -> None:
        """One step, number `step` from 0, with the gradients' norm and the loss of this process."""
        scaled = self.accelerator.scaler is not None  # in float16 an infinite gradient is how the scale is found
        bad = ~torch.isfinite(loss.detach() if scaled else whole(norm))
        last = torch.stack([self._skipped[0] + 1, torch.full_like(self._skipped[1], step + 1)])
        self._skipped = torch.where(bad, last, self._skipped)
        inner = optimizer.optimizer
        on_device = inner.defaults.get("fused") and bad.is_cuda and not is_spread(norm)
        if on_device and not scaled:
            inner.found_inf = bad.float()  # PyTorch's fused AdamW does nothing where this is 1, and the host need not know
        elif not scaled and bad:
            return
        optimizer.step()

    def check(self) -> int:
        """How many steps have been skipped; what has come since the last call is said. All processes have to call it.

        Raises:
            InputError: more than `limit`; the subjects of the last one are named.
        """
        skipped, last = self.accelerator.gather(self._skipped[None]).amax(dim=0).tolist()
        if skipped > self.said:
            self.said = skipped
            which = f"the last, step {last}, read the subjects {', '.join(self.subjects(last - 1))}"
            if skipped > self.limit:
                raise InputError(
                    f"the loss was NaN or infinite at {skipped} steps, more than training.max_skipped_steps {self.limit}; "
                    f"{which}. Look at their scans, lower training.learning_rate, or use mixed_precision bf16 or no"
                )
            say(self.accelerator, f"{skipped} step(s) skipped: the loss is NaN or infinite; {which}")
        return skipped

    def state(self) -> dict[str, int]:
        """For checkpoints."""
        return {"skipped_steps": int(self._skipped[0])}
