"""What both training loops need around them: the command line, processes, metrics, figures."""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, set_seed
from torch import nn
from tqdm import tqdm

from ldm3d import figures
from ldm3d.config import Config, TrainingConfig, load_config
from ldm3d.errors import InputError


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
    """Accelerate with TensorBoard below `run`; initial weights follow from `seed` on every process."""
    run.mkdir(parents=True, exist_ok=True)
    precision = training.mixed_precision
    if precision == "auto":
        precision = "bf16" if bf16_is_fast() else "no"
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=training.accumulation,
        log_with="tensorboard",
        project_dir=run,
        dataloader_config=DataLoaderConfiguration(),
    )
    # With --cpu and no MPI hostfile, accelerate launch starts one process however many it was asked for. All that it leaves
    # behind of the wish is the address at which they should have met
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise InputError(
            "accelerate launch was asked for several processes and started one; for several CPU processes use "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m ldm3d.training..."
        )
    if training.batch_size % (training.accumulation * accelerator.num_processes):
        raise InputError(
            f"training.batch_size {training.batch_size} must be divisible by accumulation {training.accumulation} times "
            f"{accelerator.num_processes} processes"
        )
    if accelerator.device.type == "cpu":
        # accelerate launch leaves one thread to a process unless it is told otherwise
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    set_seed(seed)
    accelerator.init_trackers("tensorboard")
    accelerator.print(
        f"{run}: {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"precision {precision}, batch {training.batch_size}"
    )
    return accelerator


def ready_to_spread(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The network in the memory format that its distribution can take: FSDP2 spreads contiguous parameters only."""
    if accelerator.distributed_type == DistributedType.FSDP:
        network.to(memory_format=torch.contiguous_format)
    return network


def bf16_is_fast() -> bool:
    """Whether this machine multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


class Metrics:
    """metrics.jsonl, TensorBoard and the loss curves of a run; one line a step, also after resuming.

    Args:
        run: folder.
        accelerator: only its main process writes.
        first_step: lines of this step and later ones, left by an interrupted run, are removed.
    """

    def __init__(self, run: Path, accelerator: Accelerator, first_step: int):
        self.path, self.accelerator = run / "metrics.jsonl", accelerator
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = [row for row in read_metrics(self.path) if row["step"] <= first_step]
        if accelerator.is_main_process:
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(partial, self.path)

    def add(self, step: int, values: dict[str, float]) -> None:
        row = {"step": step, **{key: round(float(value), 6) for key, value in values.items()}}
        self.rows.append(row)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log(values, step=step)

    def draw(self) -> None:
        """Loss curves as curves.png."""
        if self.accelerator.is_main_process:
            figures.save(figures.curves(self.rows), self.path.with_name("curves.png"))


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
