"""A part of `make gpu`: named items within a time limit, whose results are on disk as soon as they are there."""

import json
import math
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ldm3d
from ldm3d.environment import processor
from ldm3d.errors import InputError
from ldm3d.files import write_atomic

RESTART = 76  # exit status: after an error of CUDA, everything else in the same process fails


class OutOfTime(Exception):
    """Of an item that the next start goes on with."""


def machine(dry: bool) -> dict[str, Any]:
    """What figures depend on."""
    found = {"device": "cpu", "processor": processor(), "torch": torch.__version__, "ldm3d": ldm3d.__version__, "dry": dry}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def driver_version() -> str:
    """Of NVIDIA's driver, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


class Part:
    """Items that are done one after the other; those of an earlier start are not done again.

    Args:
        number, title: of the part; its file is FOLDER/part-NUMBER-TITLE.json.
        folder: of the results.
        seconds: from now on; items that need more than what is left are left out.
        dry: with tiny sizes.
        retry: do items again that failed; otherwise they are left alone.
        where: see `machine`; None: this machine.

    Raises:
        InputError: the folder holds results of another machine, or of another size.
    """

    def __init__(
        self, number: int, title: str, folder: Path, seconds: float, dry: bool, retry: bool = True, where: dict | None = None
    ):
        self.folder, self.dry, self.end = folder, dry, time.monotonic() + seconds
        self.path = folder / f"part-{number}-{title}.json"
        where = where or machine(dry)
        self.state: dict[str, Any] = {
            "part": number,
            "title": title,
            "machine": where,
            "items": {},
            "failed": {},
            "running": None,
        }
        if self.path.is_file():
            self._go_on(json.loads(self.path.read_text()), retry)
        self.state |= {"left_out": {}, "complete": False}

    def _go_on(self, found: dict[str, Any], retry: bool) -> None:
        if found["machine"] != self.state["machine"]:
            raise InputError(f"{self.path} is of {found['machine']}, and this is {self.state['machine']}: name another OUT")
        self.state = found
        if retry:
            found["failed"] = {}
        elif found["running"]:  # whose process was killed
            found["failed"][found["running"]] = "the process ended in it"
        found["running"] = None

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    @property
    def items(self) -> dict[str, Any]:
        """Results so far, by name."""
        return self.state["items"]

    def do(self, name: str, call: Callable[[], dict[str, Any] | None], needs: float = 0) -> dict[str, Any] | None:
        """The item's result; None if it failed, or if fewer seconds are left than it `needs`. An earlier one is returned."""
        if name in self.items:
            return self.items[name]
        if name in self.state["failed"]:
            return None
        if self.seconds_left <= needs:
            self.leave_out(name, f"{max(0, self.seconds_left):.0f} s were left, and it needs {needs:.0f} s")
            return None
        self.state["running"] = name
        self.write()
        started = time.monotonic()
        try:
            result = call()
        except OutOfTime as reason:
            self.leave_out(name, str(reason))
            return None
        except Exception as error:
            self.fail(name, "".join(traceback.format_exception(error, limit=-4)))
            if "CUDA error" in str(error):
                raise SystemExit(RESTART) from error
            return None
        return self.add(name, {**(result or {}), "seconds": round(time.monotonic() - started, 2)})

    def add(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """Keep an item's result."""
        self.items[name] = result
        self.state["running"] = None
        self.write()
        print(f"{name}: {json.dumps(shortened(result))}", flush=True)
        return result

    def fail(self, name: str, reason: str) -> None:
        """Note that an item failed."""
        self.state["failed"][name] = reason[-1500:]
        self.state["running"] = None
        self.write()
        print(f"{name}: FAILED\n{reason}", flush=True)

    def leave_out(self, name: str, reason: str) -> None:
        """Note that an item was not done."""
        self.state["left_out"][name] = reason
        self.state["running"] = None
        self.write()
        print(f"{name}: left out, {reason}", flush=True)

    def close(self) -> None:
        """Call at the end: the part is complete if nothing failed and nothing was left out."""
        self.state["complete"] = not self.state["failed"] and not self.state["left_out"]
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(finite(self.state), indent=1, allow_nan=False, default=float) + "\n")


def finite(value: Any) -> Any:
    """The same with None in place of NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shortened(result: dict[str, Any]) -> dict[str, Any]:
    """For the screen: numbers and words, no lists."""
    short = {key: value for key, value in result.items() if not isinstance(value, list | dict)}
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in short.items()}


def is_complete(path: Path) -> bool:
    """Whether a part's file says so."""
    return path.is_file() and json.loads(path.read_text())["complete"]
