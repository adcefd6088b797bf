"""Optimiser steps whose gradient is NaN or infinite are not taken."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm3d.errors import InputError
from ldm3d.training.parallel import announce
from ldm3d.training.sharding import gather


class FiniteSteps:
    """Takes optimiser steps, except those whose gradient is NaN or infinite; too many of these end the run.

    The optimisers have to skip a step where their `found_inf` is 1, as PyTorch's fused ones and our Muon do. So the host
    never waits for the GPU to learn whether a step was taken.

    Args:
        accelerator: the run's.
        limit: how many may be skipped.
        subjects: step -> whose scans it read.
        skipped: how many were skipped before the checkpoint that the run goes on from.
    """

    def __init__(self, accelerator: Accelerator, limit: int, subjects: Callable[[int], list[str]], skipped: int):
        self.accelerator, self.limit, self.subjects, self.reported = accelerator, limit, subjects, skipped
        self._skipped = torch.tensor([skipped, 0], device=accelerator.device)  # how many; number of the last, from 1

    def step(self, optimizer: Any, step: int, norm: Tensor) -> None:
        """Take step number `step` (from 0), with the norm of its gradient, on an optimiser that Accelerate wraps."""
        bad = ~torch.isfinite(gather(norm))
        last = torch.stack([self._skipped[0] + 1, torch.full_like(self._skipped[1], step + 1)])
        self._skipped = torch.where(bad, last, self._skipped)
        optimizer.optimizer.found_inf = bad.float()
        optimizer.step()

    def check(self) -> int:
        """How many steps have been skipped; new ones since the last call are announced. All processes have to call it.

        Raises:
            InputError: more than `limit`; the subjects of the last one are named.
        """
        skipped, last = self.accelerator.gather(self._skipped[None]).amax(dim=0).tolist()
        if skipped > self.reported:
            self.reported = skipped
            which = f"the last, step {last}, read the subjects {', '.join(self.subjects(last - 1))}"
            if skipped > self.limit:
                raise InputError(
                    f"the loss or its gradient was NaN or infinite at {skipped} steps, more than training.max_skipped_steps "
                    f"{self.limit}; {which}. Look at their scans, lower training.learning_rate, or set "
                    "training.mixed_precision to no"
                )
            announce(self.accelerator, f"{skipped} step(s) skipped: the loss or its gradient is NaN or infinite; {which}")
        return skipped

    def state(self) -> dict[str, int]:
        """For checkpoints."""
        return {"skipped_steps": int(self._skipped[0])}
