"""Optimiser steps whose gradient is NaN or infinite are not taken."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from ldm3d.errors import InputError
from ldm3d.training.parallel import say
from ldm3d.training.sharding import whole


class FiniteSteps:
    """Takes optimiser steps, but those whose gradient is NaN or infinite: they change nothing, and too many end the run.

    The optimisers have to do nothing where their `found_inf` is 1, as PyTorch's fused ones and our Muon do: so the host
    need not wait to know.

    Args:
        accelerator: the run's.
        limit: how many may be skipped.
        subjects: step -> whose scans it read.
        skipped: how many were before the checkpoint that the run goes on from.
    """

    def __init__(self, accelerator: Accelerator, limit: int, subjects: Callable[[int], list[str]], skipped: int):
        self.accelerator, self.limit, self.subjects, self.said = accelerator, limit, subjects, skipped
        self._skipped = torch.tensor([skipped, 0], device=accelerator.device)  # how many; 1 + the last of them

    def step(self, optimizer: AcceleratedOptimizer, step: int, norm: Tensor) -> None:
        """One step, number `step` from 0, with the gradients' norm."""
        bad = ~torch.isfinite(whole(norm))
        last = torch.stack([self._skipped[0] + 1, torch.full_like(self._skipped[1], step + 1)])
        self._skipped = torch.where(bad, last, self._skipped)
        optimizer.optimizer.found_inf = bad.float()
        optimizer.step()

    def check(self) -> int:
        """How many steps have been skipped; what has come since the last call is said. All processes have to call it.

        Raises:
            InputError: more than `limit`; the subjects of the last one are named.
        """
        skipped, last = self.accelerator.gather(self._skipped[None]).amax(dim=0).tolist()
        if skipped > self.said:
            self.said = skipped
            which = f"the last, step {last}, read the subjects {', '.join(self.subjects(last - 1))}"
            if skipped > self.limit:
                raise InputError(
                    f"the loss was NaN or infinite at {skipped} steps, more than training.max_skipped_steps {self.limit}; "
                    f"{which}. Look at their scans, lower training.learning_rate, or use mixed_precision bf16 or no"
                )
            say(self.accelerator, f"{skipped} step(s) skipped: the loss is NaN or infinite; {which}")
        return skipped

    def state(self) -> dict[str, int]:
        """For checkpoints."""
        return {"skipped_steps": int(self._skipped[0])}
