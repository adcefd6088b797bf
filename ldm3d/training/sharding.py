"""Parameters that are spread over processes (FSDP2): how they are spread, and how they are seen as whole tensors.

`whole`, `local` and `spread_like` return what they are given where nothing is spread. `whole` is a collective: every process
has to call it. PyTorch's module of such tensors takes seconds to import, so it is only where it is used.
"""

import dataclasses
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm3d.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}


def is_spread(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every process."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's share of it, which is not a copy."""
    return tensor.to_local() if is_spread(tensor) else tensor


def spread_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A full tensor, the same on all processes, spread as `reference` is."""
    if not is_spread(reference):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Everybody has all of it already, so nothing needs to be sent
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def sharding_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """What Accelerate is told about FSDP2 where its launcher was asked for it; None elsewhere.

    Accelerate's own policy casts what goes into a network to the precision of its parameters. In bfloat16 a time of 998.9
    thousandths arrives as 1000, and gradients are summed in bfloat16. Here inputs stay as they are, and sums are in float32.

    Raises:
        InputError: FSDP in its first version, whose flat parameters have no names.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError("FSDP is supported in its second version; say `fsdp_version: 2` in Accelerate's config")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def prepare(accelerator: Accelerator, network: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """`Accelerator.prepare`, for networks that have but some of the blocks that Accelerate's config names, or none of them.

    Blocks that the config names are spread one by one, and what is left of a network as one piece. A network with running
    statistics (batch normalisation, in a discriminator) keeps its parameters in float32, which the statistics are in.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(network, optimizer)
    network.to(memory_format=torch.contiguous_format)  # other parameters cannot be spread
    plugin = accelerator.state.fsdp_plugin
    named, policy = plugin.transformer_cls_names_to_wrap, plugin.mixed_precision_policy
    there = {type(module).__name__ for module in network.modules()}
    plugin.transformer_cls_names_to_wrap = [name for name in named or () if name in there]
    if any(getattr(module, "running_mean", None) is not None for module in network.modules()):
        plugin.mixed_precision_policy = dataclasses.replace(policy, param_dtype=None)
    try:
        return accelerator.prepare(network, optimizer)
    finally:
        plugin.transformer_cls_names_to_wrap, plugin.mixed_precision_policy = named, policy
