"""What a training writes while it runs: metrics.jsonl, TensorBoard, other trackers, loss curves, a progress bar."""

import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from ldm3d import figures
from ldm3d.files import write_atomic


class Metrics:
    """metrics.jsonl, TensorBoard and the loss curves of a run; each step once, also after resuming.

    TensorBoard's files are made anew from metrics.jsonl at every start, because a killed process leaves them with missing
    steps, and resuming would write others twice.

    Args:
        run: folder.
        accelerator: only its main process writes.
        first_step: lines of later steps, from an interrupted run, are removed.
        tensorboard: whether its files are written. Other trackers are the accelerator's; they only get what is new.
    """

    def __init__(self, run: Path, accelerator: Accelerator, first_step: int, tensorboard: bool = True):
        self.path, self.is_writer = run / "metrics.jsonl", accelerator.is_main_process
        self.accelerator, self.tensorboard = accelerator, None
        self.rows: list[dict[str, Any]] = []
        if not self.is_writer:
            return
        if self.path.exists():
            self.rows = [row for row in read_metrics(self.path) if row["step"] <= first_step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        shutil.rmtree(run / "tensorboard", ignore_errors=True)
        if tensorboard and (writer := tensorboard_writer(run / "tensorboard")):
            self.tensorboard = writer
            for row in self.rows:
                self._to_tensorboard(row)

    def add(self, step: int, values: dict[str, float]) -> None:
        if not self.is_writer:
            return
        # JSON has no NaN. Nine significant digits are all of a float32; six decimals would round a small learning rate away.
        finite = {key: float(f"{value:.9g}") for key, value in values.items() if math.isfinite(value)}
        row = {"step": step, **finite}
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self._to_tensorboard(row)
        self.accelerator.log(finite, step=step)

    def _to_tensorboard(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and self.tensorboard:
                self.tensorboard.add_scalar(name, value, row["step"])

    def to_disk(self) -> None:
        """Flush all rows to disk, before a checkpoint that follows them."""
        if self.is_writer:
            if self.tensorboard:
                self.tensorboard.flush()
            with open(self.path, "a") as file:
                os.fsync(file.fileno())

    def draw(self) -> None:
        """Loss curves as curves.png."""
        if self.is_writer:
            figures.save(figures.curves(self.rows), self.path.with_name("curves.png"))

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()


def tensorboard_writer(folder: Path) -> Any:
    """PyTorch's writer of TensorBoard's files; None, with a warning, where the package is missing.

    A training goes on without it: metrics.jsonl has all numbers, and its next start writes the files from there.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "TensorBoard is not installed, so only metrics.jsonl and curves.png are written; install it with: pip install "
            "'ldm3d[tensorboard]', or set training.tracker=[]",
            stacklevel=2,
        )
        return None
    return SummaryWriter(folder)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a half-written last line is ignored."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            warnings.warn(f"{path}: a half-written line is ignored", stacklevel=2)
    return rows


def progress_bar(accelerator: Accelerator, title: str, first_step: int, steps: int) -> tqdm:
    """A bar on the main process alone; in a log file it is written twice a minute."""
    every = 0.1 if sys.stderr.isatty() else 30
    hidden = not accelerator.is_main_process
    return tqdm(total=steps, initial=first_step, desc=title, unit="step", mininterval=every, disable=hidden, smoothing=0.05)
