"""The processes of a training: how Accelerate is started, what its processes agree on, how they leave."""

from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, broadcast, broadcast_object_list, parse_flag_from_env, set_seed
from torch import nn

from ldm3d.config.sections import TrainingConfig
from ldm3d.devices import check_convolutions
from ldm3d.errors import InputError, differences
from ldm3d.precision import bf16_is_fast
from ldm3d.preemption import REQUEUE, Stop
from ldm3d.processes import check_all_started, cores_each
from ldm3d.seen import note_scans
from ldm3d.training.checkpoint import rounding_changes
from ldm3d.training.sharding import DTYPES, sharding_plugin


def start_accelerator(training: TrainingConfig, run: Path, seed: int) -> Accelerator:
    """Accelerate for a run; initial weights follow from `seed` on every process.

    Raises:
        InputError: fewer processes than were asked for, or a batch that they cannot share.
    """
    run.mkdir(parents=True, exist_ok=True)
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # the Accelerator's, before it is there
    precision = training.mixed_precision
    if precision == "auto":
        precision = "bf16" if bf16_is_fast(device) else "no"
    use_fast_kernels(device)
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=training.accumulation,
        dataloader_config=DataLoaderConfiguration(),
        fsdp_plugin=sharding_plugin(precision),
    )
    check_all_started()
    check_convolutions(accelerator.device, DTYPES[precision] or torch.float32)
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


def use_fast_kernels(device: torch.device) -> None:
    """On a GPU, have cuDNN try its convolutions once for each shape, and float32 matrices multiplied in TF32."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        torch.set_float32_matmul_precision("high")


def say(accelerator: Accelerator, text: str) -> None:
    """Print a line once; `Accelerator.print` prints one on every node."""
    if accelerator.is_main_process:
        print(text, flush=True)


def same_start(network: nn.Module) -> None:
    """Give all processes the main one's weights."""
    for tensor in network.state_dict().values():
        tensor.copy_(broadcast(tensor.contiguous()))


def agreed(value: Any) -> Any:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0]


def note_seen(run: Path, scans: pd.DataFrame, accelerator: Accelerator, begun: bool, go_on: bool = True) -> None:
    """Write down which scans the run sees: `ldm3d.seen.note_scans` by the main process, its InputError on all of them."""
    said, problem = "", None
    if accelerator.is_main_process:
        try:
            said = note_scans(run, scans, go_on, begun)
        except InputError as error:
            problem = str(error)
    if problem := agreed(problem):
        raise InputError(problem)
    if said:
        say(accelerator, said)


def circumstances(accelerator: Accelerator) -> dict[str, Any]:
    """What a run's last bits follow from beside its settings; kept in checkpoints, to be compared by `say_changes`."""
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads() if accelerator.device.type == "cpu" else 0,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__,
    }


def say_changes(state: dict[str, Any], settings: dict[str, Any], accelerator: Accelerator) -> None:
    """Say what can no longer be bit-identical in a run that goes on from a checkpoint's state under other circumstances."""
    changed = differences(state["circumstances"], circumstances(accelerator)) + rounding_changes(state["settings"], settings)
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
