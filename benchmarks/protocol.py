"""Functions that benchmarks share: alternate, repeat, measure memory, write results."""

import ctypes
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ldm3d
from ldm3d.diffusion.process import Process
from ldm3d.diffusion.samplers import sample
from ldm3d.environment import processor

RESULTS = Path(__file__).parent / "results"
GB = 1e9


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_in_turns(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, `repeats` times in alternation after one warm-up each, so that other load slows all equally."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            value = timed(side)
            if turn:
                seconds[name].append(value)
    return seconds


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, including its work on the GPU."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarise(values: list[float]) -> dict[str, float]:
    """Median, range and number of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def peak_memory(call: Callable[[], object]) -> float:
    """GB that `call` takes at its peak above the memory before: of the GPU's allocator, or of this process (Linux).

    Raises:
        OSError: no GPU, and no /proc in which the peak could be set back.
    """
    if torch.cuda.is_available():
        wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        wait()
        return (torch.cuda.max_memory_allocated() - before) / GB
    ctypes.CDLL(None).malloc_trim(0)  # else `call` could reuse the heap of earlier calls, which would not be counted
    before = memory_of("self", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak of VmRSS, back to the present
    call()
    return memory_of("self", "VmHWM") - before


def memory_of(process: int | str, field: str) -> float:
    """VmRSS (now) or VmHWM (at its peak) of a process in GB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024 / GB


def free_memory() -> float:
    """GB that are available without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / GB


def measure(call: Callable[[], object], repeats: int, enough_seconds: float) -> dict[str, float]:
    """Seconds, summarised, and peak memory of `call`: a warm-up, under which memory is measured, then `repeats` calls.

    A call that lasts longer than `enough_seconds` is not repeated: its first run is its time, and `repeats` is 1.
    """
    seconds: list[float] = []
    peak = peak_memory(lambda: seconds.append(timed(call)))
    if seconds[0] < enough_seconds:
        seconds = [timed(call) for _ in range(repeats)]
    return {**summarise(seconds), "peak_gb": peak}


def in_own_process(script: str, task: dict, limit_seconds: float, limit_gb: float) -> dict:
    """What `script --task TASK` prints as JSON in its last line; {"not_measured": why} if it fails or outgrows its limits."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, script, "--task", json.dumps(task)]
        process, start = subprocess.Popen(command, stdout=output, stderr=errors), time.perf_counter()
        why = None
        while process.poll() is None and why is None:
            if time.perf_counter() - start > limit_seconds:
                why = f"took more than {limit_seconds:.0f} s"
            elif _outgrown(process.pid, limit_gb):
                why = f"took more than {limit_gb:.1f} GB"
            time.sleep(0.1)
        if why:
            process.kill()
        code = process.wait()
        output.seek(0)
        errors.seek(0)
        if why is None and code == -signal.SIGKILL:
            why = "killed, probably for lack of memory"
        if why is None and code:
            why = [f"exit status {code}", *errors.read().strip().splitlines()][-1][:200]
        return {"not_measured": why} if why else json.loads(output.read().strip().splitlines()[-1])


def _outgrown(process: int, limit_gb: float) -> bool:
    try:
        return memory_of(process, "VmRSS") > limit_gb
    except OSError:  # it has just ended
        return False


def denoiser_calls(sampler: str, steps: int, process: Process) -> int:
    """Number of calls of its denoiser by a sampler."""
    asked: list[float] = []

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        asked.append(t)
        return z

    z = torch.zeros(1, 1, 1, 1, 1)
    sample(sampler, denoise, z, process, steps, noise=lambda _step: z)
    return len(asked)


def write(name: str, rows: list[dict]) -> Path:
    """Rows with a description of the machine, as results/NAME-DEVICE.json."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = {
        "device": where,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ldm3d": ldm3d.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{where.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return path
