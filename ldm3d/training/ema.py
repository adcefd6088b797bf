"""Exponential moving average of a network's weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ldm3d.training.sharding import gather, is_sharded, local_shard, shard_like


class EMA:
    """A copy of `network` that follows it: average = decay * average + (1 - decay) * weights.

    In the first steps the decay is at most (1 + step) / (10 + step), so that the random start is soon forgotten. With decay 0
    the copy equals the network.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    def shard_like(self, network: nn.Module) -> None:
        """Shard the average's parameters as the network's are."""
        pairs = zip(self.network.parameters(), network.parameters())
        # A new shard is a view of the full tensor; the copy frees that
        self._replace([shard_like(mine, theirs).clone() if is_sharded(theirs) else mine for mine, theirs in pairs])

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Follow the network after optimiser step number `step` (from 0). Each process averages its shard."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        own, new = ([local_shard(p.detach()) for p in net.parameters()] for net in (self.network, network))
        torch._foreach_lerp_(own, new, weight)
        for mine, theirs in zip(self.network.buffers(), network.buffers()):
            mine.copy_(theirs)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Within it, the average with full parameters on every process. All processes have to enter."""
        shards = list(self.network.parameters())
        self._replace([gather(shard) for shard in shards])
        try:
            yield self.network
        finally:
            self._replace(shards)

    def _replace(self, values: list[torch.Tensor]) -> None:
        """Give the average's parameters these values, without a copy."""
        for (name, old), value in zip(list(self.network.named_parameters()), values):
            if value is not old:
                owner, _, own_name = name.rpartition(".")
                parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
                setattr(self.network.get_submodule(owner), own_name, parameter)
