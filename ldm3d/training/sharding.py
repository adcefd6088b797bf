"""Parameters that are sharded over processes (FSDP2): how they are cut into shards, and gathered again.

`gather`, `local_shard`, `from_local` and `shard_like` return what they are given where nothing is sharded. `gather` is a
collective: every process has to call it. PyTorch's module of sharded tensors takes seconds to import, so only functions that
need it do.
"""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm3d.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "no": None}


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def gather(tensor: Tensor) -> Tensor:
    """The full tensor, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of it, without a copy."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def from_local(shard: Tensor, reference: Tensor) -> Tensor:
    """A tensor sharded as `reference` is, of this process's shard; the shard itself where nothing is sharded."""
    if not is_sharded(reference):
        return shard
    from torch.distributed.tensor import DTensor

    size = {"shape": reference.shape, "stride": reference.stride()}
    return DTensor.from_local(shard, reference.device_mesh, reference.placements, run_check=False, **size)


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A full tensor, the same on all processes, sharded as `reference` is."""
    if not is_sharded(reference):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank nothing is sent: every process has the full tensor
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def sharding_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """Accelerate's settings of FSDP2 where its launcher was asked for FSDP; None elsewhere.

    Accelerate's own policy casts the inputs of a network to the precision of its parameters. In bfloat16 a time of 998.9
    thousandths arrives as 1000, and gradients are summed in bfloat16. Here inputs keep their type, and sums are in float32.

    Raises:
        InputError: FSDP in its first version, whose flat parameters have no names.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError("FSDP is supported in its second version; set `fsdp_version: 2` in Accelerate's config")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def distribute(accelerator: Accelerator, network: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """`Accelerator.prepare`, also for networks that have only some of the blocks that Accelerate's config names, or none.

    Blocks that the config names are sharded one by one, and the rest of a network as one piece.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(network, optimizer)
    network.to(memory_format=torch.contiguous_format)  # FSDP shards no other parameters
    plugin = accelerator.state.fsdp_plugin
    named = plugin.transformer_cls_names_to_wrap
    present = {type(module).__name__ for module in network.modules()}
    plugin.transformer_cls_names_to_wrap = [name for name in named or () if name in present]
    try:
        return accelerator.prepare(network, optimizer)
    finally:
        plugin.transformer_cls_names_to_wrap = named
