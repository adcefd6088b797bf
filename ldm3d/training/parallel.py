"""The processes of a training: how Accelerate is started, what one process tells the others, how they stop together."""

from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, broadcast, broadcast_object_list, parse_flag_from_env, set_seed
from torch import nn

from ldm3d import seen
from ldm3d.config.training import TrainingConfig
from ldm3d.devices import check_convolutions
from ldm3d.errors import InputError, differences
from ldm3d.precision import bf16_is_fast
from ldm3d.preemption import REQUEUE, Stop
from ldm3d.processes import check_all_started, cores_each
from ldm3d.training.checkpoint import rounding_changes
from ldm3d.training.sharding import DTYPES, sharding_plugin
from ldm3d.training.trackers import external


def start_accelerator(training: TrainingConfig, run: Path, seed: int) -> Accelerator:
    """Accelerate for a run; initial weights follow from `seed` on every process.

    Raises:
        InputError: fewer processes than were asked for, a batch that they cannot share, or a tracker that is not installed.
    """
    run.mkdir(parents=True, exist_ok=True)
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # as the Accelerator chooses it below
    precision = training.mixed_precision
    if precision == "auto":
        precision = "bf16" if bf16_is_fast(device) else "no"
    use_fast_kernels(device)
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=training.accumulation,
        dataloader_config=DataLoaderConfiguration(),
        fsdp_plugin=sharding_plugin(precision),
        log_with=external(training) or None,  # an empty list draws a warning
    )
    check_all_started()
    check_convolutions(accelerator.device, DTYPES[precision] or torch.float32)
    if training.batch_size % (training.accumulation * accelerator.num_processes):
        raise InputError(
            f"training.batch_size {training.batch_size} must be divisible by accumulation {training.accumulation} times "
            f"{accelerator.num_processes} processes"
        )
    if accelerator.device.type == "cpu":
        # accelerate launch sets one thread a process by default
        torch.set_num_threads(cores_each())
    set_seed(seed)
    processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    announce(
        accelerator,
        f"{run}: {processes} on {accelerator.device.type}, precision {precision}, batch {training.batch_size}",
    )
    return accelerator


def use_fast_kernels(device: torch.device) -> None:
    """On a GPU, have cuDNN try its convolutions once for each shape, and float32 matrices multiplied in TF32."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        torch.set_float32_matmul_precision("high")


def announce(accelerator: Accelerator, text: str) -> None:
    """Print a line once; `Accelerator.print` prints one on every node."""
    if accelerator.is_main_process:
        print(text, flush=True)


def broadcast_weights(network: nn.Module) -> None:
    """Copy the main process's weights to all others."""
    for tensor in network.state_dict().values():
        tensor.copy_(broadcast(tensor.contiguous()))


def broadcast_from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0]


def record_scans(run: Path, scans: pd.DataFrame, accelerator: Accelerator, begun: bool, go_on: bool) -> None:
    """`ldm3d.seen.record_scans` by the main process; every process raises its InputError."""
    problem = None
    if accelerator.is_main_process:
        try:
            if message := seen.record_scans(run, scans, go_on, begun):
                announce(accelerator, message)
        except InputError as error:
            problem = str(error)
    if problem := broadcast_from_main(problem):
        raise InputError(problem)


def circumstances(accelerator: Accelerator) -> dict[str, Any]:
    """What rounding depends on, beside the settings. Checkpoints keep it for `report_changes`."""
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads() if accelerator.device.type == "cpu" else 0,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__,
    }


def report_changes(state: dict[str, Any], settings: dict[str, Any], accelerator: Accelerator) -> None:
    """Announce what keeps a run that goes on from a checkpoint's state from ending with the same bits."""
    changed = differences(state["circumstances"], circumstances(accelerator)) + rounding_changes(state["settings"], settings)
    if changed:
        announce(
            accelerator,
            f"going on with {', '.join(changed)}: the same samples in the same order with the same random numbers, but sums "
            "are rounded otherwise, so the weights are no longer bit-identical to an uninterrupted run's",
        )


def asked_to_stop(stop: Stop, accelerator: Accelerator, communicate: bool) -> bool:
    """Whether to stop after this step, the same on all processes. Several find out only in steps where they communicate."""
    if accelerator.num_processes == 1:
        return stop.asked
    return communicate and accelerator.reduce(torch.tensor(float(stop.asked), device=accelerator.device), "sum").item() > 0


def exit_for_requeue(stop: Stop, run: Path, step: int, accelerator: Accelerator) -> NoReturn:
    """End the program with exit code `REQUEUE`; the checkpoint of `step` is written, unless it is 0."""
    announce(accelerator, f"{run}: {stop.signal or 'a signal'} after step {step}; run the same command to continue from there")
    accelerator.end_training()
    raise SystemExit(REQUEUE)
