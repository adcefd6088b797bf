"""Exponential moving average of a network's weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ldm3d.training.sharding import is_spread, local, spread_like, whole


class EMA:
    """A copy of `network` that follows it: average = decay * average + (1 - decay) * weights.

    In the first steps the decay is held at (1 + step) / (10 + step), so that the random start is forgotten; decay 0 makes
    the copy equal to the network.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    def spread_like(self, network: nn.Module) -> None:
        """Once the network's parameters are spread over processes, keep the same share of the average's on each."""
        pairs = zip(self.network.parameters(), network.parameters())
        # A share is a view of the whole at first; its copy lets the whole go
        self._replace([spread_like(mine, theirs).clone() if is_spread(theirs) else mine for mine, theirs in pairs])

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Follow the network after optimiser step number `step` (from 0). Each process averages its share."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        own, new = ([local(p.detach()) for p in net.parameters()] for net in (self.network, network))
        torch._foreach_lerp_(own, new, weight)
        for mine, theirs in zip(self.network.buffers(), network.buffers()):
            mine.copy_(theirs)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Within it, the average as a network that computes: with whole parameters on every process. All have to enter."""
        shares = list(self.network.parameters())
        self._replace([whole(share) for share in shares])
        try:
            yield self.network
        finally:
            self._replace(shares)

    def _replace(self, values: list[torch.Tensor]) -> None:
        """Give the average's parameters these values, without a copy."""
        for (name, old), value in zip(list(self.network.named_parameters()), values):
            if value is not old:
                owner, _, own_name = name.rpartition(".")
                parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
                setattr(self.network.get_submodule(owner), own_name, parameter)
