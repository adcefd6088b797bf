"""Part 2: seconds, memory, and the share of the card's matrix rate that trainings and sampling reach; profiles of a step."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attention
import full_size
import memory
import torch
from protocol import timed, wait
from torch.autograd import DeviceType

from gpu_parts.part import Part
from ldm3d.config.read import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE, SMALL, TOY = (CONFIGS / f"{name}.yaml" for name in ("brain-1mm", "brains-3mm", "toy"))
PROFILED_STEPS, PROFILED_ROWS = 3, 30


def work(part: Part, work: Path, data: Path | None) -> None:
    """The items in the order of their worth, so that the last are those that a slow card leaves out."""
    cuda = torch.cuda.is_available()
    large, small = (TOY, TOY) if part.dry else (LARGE, SMALL)
    shape, small_shape = ([24, 24, 24],) * 2 if part.dry else (load_config(path).data.grid.shape for path in (large, small))

    def do(name: str, call: Callable[[], dict[str, Any]], needs: float) -> None:
        part.do(name, call, 0 if part.dry else needs)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()

    def timing(
        name: str, side: str = "ldm3d", of: Path = large, on: list[int] = shape, needs: float = 15, **task: Any
    ) -> None:
        title = ", ".join([of.stem, name, side, *(f"{key} {value}" for key, value in task.items() if key != "of_rate")])
        repeats = 1 if part.dry or side == "monai" else 3
        call = partial(full_size.perform, name, side, list(on), repeats, quick=part.dry, path=of, **task)
        do(title, call, needs)

    do("matrix rate", lambda: {"tflops": full_size.matmul_rate() / 1e12}, 5)
    for stage, batch in (("diffusion", 64), ("autoencoder", 4)):
        do(f"profile of a step of the {stage}", partial(profile, part, large, shape, stage, 2 if part.dry else batch), 25)
    for name, batch in (("train-diffusion", 64), ("train-diffusion", 16), ("train-autoencoder", 8), ("sample", 8)):
        timing(name, batch=2 if part.dry else batch, of_rate=True)  # of that rate
    for name in ("step", "decode", "generate", "encode", "train-diffusion", "train-autoencoder"):
        timing(name)
        if not part.dry or name == "decode":
            timing(name, "monai", needs=40)
    for batch in (1, 8, 32):
        timing("generate", batch=batch, needs=20)
    for how in ("whole", "blocks") if cuda else ("no",):
        torch._dynamo.reset()
        timing("sample", batch=8, compiled=how, needs=70)
    for name, batch in (("train-diffusion", 64), ("sample", 32), ("generate", 1), ("generate", 32)):
        timing(name, of=small, on=small_shape, batch=4 if part.dry else batch, of_rate=name != "generate")
    sizes = [(24, 24, 24)] if part.dry else [(160, 224, 160), (256, 256, 256)]
    for task in memory.tasks(sizes, ("bfloat16",)):
        if task["side"] == "ldm3d":
            do(f"memory of a decode: {task['shape']} {task['mode']}", partial(decode, task), 15)
    do("attention, few keys", lambda: {"rows": attention.few_keys(64, 64) if part.dry else attention.few_keys()}, 25)
    tokens, heads = ([64], (32,)) if part.dry else ([2**k for k in (9, 11, 13, 14)], (32, 64, 128, 256))
    do("attention, many tokens", lambda: {"rows": attention.many_tokens(tokens, heads, 5, 16)}, 40)


def decode(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory of a decode, and what `ldm3d.memory` expects."""
    return {**memory.perform(**task, repeats=1), "estimated_gb": memory.estimate(**task) / 1e9}


def profile(part: Part, path: Path, shape: list[int], stage: str, batch: int) -> dict[str, Any]:
    """Where the time of a training step goes, by kernel; the whole table in a text file.

    `busy` is the share of the time in which the device computes: what is missing, the host did not launch in time.
    """
    ours = full_size.Ours(load_config(path), tuple(shape), False, batch, "no")
    call = getattr(ours, f"train_{stage}")()
    for _ in range(PROFILED_STEPS):
        call()
    seconds = min(timed(call) for _ in range(PROFILED_STEPS))
    with torch.profiler.profile() as profiler:
        for _ in range(PROFILED_STEPS):
            call()
        wait()
    events, cuda = profiler.key_averages(), torch.cuda.is_available()
    by = "self_device_time_total" if cuda else "self_cpu_time_total"
    (part.folder / f"profile-{stage}.txt").write_text(events.table(by, row_limit=PROFILED_ROWS, max_name_column_width=90))
    device = DeviceType.CUDA if cuda else DeviceType.CPU
    kernels = sorted((e for e in events if e.device_type == device), key=lambda e: -getattr(e, by))
    milliseconds = {e.key[:120]: getattr(e, by) / 1000 / PROFILED_STEPS for e in kernels}
    return {
        "batch": batch,
        "step_seconds": seconds,
        "busy": sum(milliseconds.values()) / 1000 / seconds,
        "launches": sum(e.count for e in kernels) / PROFILED_STEPS,
        "milliseconds": dict(list(milliseconds.items())[:PROFILED_ROWS]),
    }
