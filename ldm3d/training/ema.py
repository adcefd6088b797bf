"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import nn

from ldm3d.training.sharding import whole


class EMA:
    """A copy of `network` that follows it: average = decay * average + (1 - decay) * weights.

    In the first steps the decay is held at (1 + step) / (10 + step), so that the random start is forgotten; decay 0 makes
    the copy equal to the network.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Follow the network after optimiser step number `step` (from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        own = list(self.network.parameters())
        torch._foreach_lerp_(own, [whole(p.detach()) for p in network.parameters()], weight)
        for mine, theirs in zip(self.network.buffers(), network.buffers()):
            mine.copy_(theirs)
