"""Which averaged network a finished run hands on to the next stage."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldm3d.training.checkpoint import load_best


class Choice:
    """The average after the last step, or the best of validation by the loss that is trained.

    Args:
        keep: "last" or "best".
        best: the best so far, {"step", "validation_loss"}, of the checkpoint that the run goes on from; None if there is none.
        after: only what more steps than these made is a candidate. An adversary makes the other losses worse, so that
            without it every network from before its start would be better than those that it taught.
    """

    def __init__(self, keep: str, best: Mapping[str, Any] | None, after: int = 0):
        self.keep, self.after = keep, after
        usable = keep == "best" and best and "validation_loss" in best and best["step"] > after
        self.best = dict(best) if usable else None

    @property
    def step(self) -> int | None:
        """Of the best so far: its checkpoint has to stay."""
        return self.best and self.best["step"]

    def add(self, step: int, loss: float) -> None:
        """A network after `step` steps with its validation loss."""
        candidate = self.keep == "best" and step > self.after and math.isfinite(loss)
        if candidate and (self.best is None or loss < self.best["validation_loss"]):
            self.best = {"step": step, "validation_loss": loss}

    def load(self, run: Path, networks: Mapping[str, nn.Module]) -> str:
        """Load the chosen weights into networks that are at the last step; says in words which they are, and why."""
        if self.keep == "last":
            return "average after the last step"
        best = load_best(run, self.best, networks)
        if best:
            return f"best of validation, step {best['step']}: loss {best['validation_loss']:.4f}"
        return "average after the last step: `keep: best` has none to choose from"
