"""Run by test_sharding.py on two gloo processes: a run whose parameters are spread over both (FSDP2)."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ldm3d.config import TrainingConfig
from ldm3d.models.blocks import ResBlock
from ldm3d.models.unet import UNet
from ldm3d.training import checkpoint
from ldm3d.training.ema import EMA
from ldm3d.training.optimizer import make_optimizer


def start(optimizer: str):
    torch.manual_seed(0)
    network = UNet(2, 2, [0, 3], [8, 16], 1, [False, True], head_channels=8, context_dim=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    settings = TrainingConfig(steps=4, batch_size=2, learning_rate=1e-2, weight_decay=0.1, optimizer=optimizer)
    return network, EMA(network, 0.9), settings


def steps(network, ema, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        rng = torch.Generator().manual_seed(step)
        z, context = torch.randn(2, 2, 6, 5, 4, generator=rng), torch.ones(2, 2, 2)
        network(z, torch.tensor([100.0, 700.0]), context).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(network, step)


def main(folder: Path, kind: str) -> None:
    dist.init_process_group("gloo")
    network, ema, settings = start(kind)
    settings_json = {"kind": kind}
    newest = [checkpoint.newest_intact(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(newest)
    restored = checkpoint.restore(folder, newest[0], {"model": network, "ema": ema.network}, settings_json)
    network.to(memory_format=torch.contiguous_format)
    for module in network.modules():
        if isinstance(module, ResBlock):
            fully_shard(module)
    fully_shard(network)
    assert all(isinstance(p, DTensor) for p in network.parameters())
    optimizer = make_optimizer(network, settings)
    optimizers = {"optimizer": (network, optimizer)}
    first = 0
    if restored:
        checkpoint.restore_optimizers(restored[0], optimizers)
        first = restored[1]["step"]
    steps(network, ema, optimizer, first, first + 2)
    networks, state = {"model": network, "ema": ema.network}, {"settings": settings_json, "best": None}
    checkpoint.save_checkpoint(folder, first + 2, networks, optimizers, state, None, dist.get_rank() == 0)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
