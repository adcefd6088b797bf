"""What every benchmark does alike: alternate, repeat, print, write."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ldm3d

RESULTS = Path(__file__).parent / "results"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_in_turns(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, `repeats` times in alternation after one warm-up each, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            _wait()
            start = time.perf_counter()
            side()
            _wait()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def write(name: str, rows: list[dict]) -> Path:
    """Rows and what they were measured on, as results/NAME-DEVICE.json."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = {
        "device": where,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ldm3d": ldm3d.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{where.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return path
