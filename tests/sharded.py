"""Run by test_sharding.py on two gloo processes: what spreads parameters over both of them (FSDP2).

Accelerate spreads parameters over GPUs only, PyTorch over CPUs as well. So Accelerate is told that it may; from there on all
is its own doing, its mixed precision included, from the environment that `accelerate launch` makes of the config.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, state
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ldm3d.config.read import load_config
from ldm3d.config.training import AdversarialConfig, TrainingConfig
from ldm3d.models import unet as unet_module
from ldm3d.models.blocks import ResBlock
from ldm3d.models.monai import MonaiAutoencoder, MonaiUNet
from ldm3d.models.unet import UNet
from ldm3d.preemption import Stop
from ldm3d.training import checkpoint, task
from ldm3d.training.ema import EMA
from ldm3d.training.optimizer import make_optimizer
from ldm3d.training.parallel import start_accelerator
from ldm3d.training.sharding import distribute

FSDP = Path(__file__).parents[1] / "configs/accelerate/fsdp.yaml"
TIMES = [123.4, 998.9]  # bfloat16 would make 123.5 and 1000 of them


def start(optimizer: str):
    torch.manual_seed(0)
    # In float64: AdamW makes a full step of a gradient that is rounding, and two ways of summing round otherwise
    network = UNet(2, 2, [0, 3], [8, 16], 1, [False, True], head_channels=8, context_dim=8).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    settings = TrainingConfig(steps=4, batch_size=2, learning_rate=1e-2, weight_decay=0.1, optimizer=optimizer)
    return network, EMA(network, 0.9), settings


def steps(network, ema, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        rng = torch.Generator().manual_seed(step)
        z, context = torch.randn(2, 2, 6, 5, 4, generator=rng).double(), torch.ones(2, 2, 2)
        network(z, torch.tensor([100.0, 700.0]), context).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(network, step)


def two_steps_from_the_last_checkpoint(folder: Path, kind: str) -> None:
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
    ema.shard_like(network)
    for net in (network, ema.network):
        assert all(isinstance(p, DTensor) for p in net.parameters())
    kept = sum(p.to_local().untyped_storage().nbytes() for p in ema.network.parameters())
    assert kept < 0.6 * sum(p.nbytes for p in ema.network.parameters())
    optimizer = make_optimizer(network, settings)
    optimizers = {"optimizer": (network, optimizer)}
    first = 0
    if restored:
        checkpoint.restore_optimizers(restored[0], optimizers)
        assert restored[0] == {}  # nothing of the checkpoint stays in memory
        first = restored[1]["step"]
    steps(network, ema, optimizer, first, first + 2)
    networks, state = {"model": network, "ema": ema.network}, {"settings": settings_json, "best": None}
    checkpoint.save_checkpoint(folder, first + 2, networks, optimizers, state, None, dist.get_rank() == 0)
    with ema.gathered() as average:
        assert not any(isinstance(p, DTensor) for p in average.parameters())
    assert all(isinstance(p, DTensor) for p in ema.network.parameters())
    dist.barrier()


def environment() -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/fsdp.yaml` gives to its processes about FSDP."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FSDP), "train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    given = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in given.items() if "FSDP" in name}


def spread_over_cpus() -> None:
    begin = state.AcceleratorState.__init__

    def begin_spread(self, *arguments, fsdp_plugin=None, **options):
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = self.distributed_type
            if self._mixed_precision != "no":  # as it does on GPUs
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    state.AcceleratorState.__init__ = begin_spread
    Accelerator.end_training = lambda self: None  # the processes stay together for what comes next


def train(stage: str, config: Path, *settings: str) -> None:
    from ldm3d.training import autoencoder, diffusion

    AcceleratorState._reset_state(reset_partial_state=True)
    module = {"autoencoder": autoencoder, "diffusion": diffusion}[stage]
    module.train(load_config(config, settings, stage), Stop())


def a_step_of_each_network(folder: Path) -> dict[str, list[str]]:
    """One step in bfloat16 of every network that the config's blocks are not all in: name -> what was spread one by one."""
    from ldm3d.training.monai_losses import Adversary

    AcceleratorState._reset_state(reset_partial_state=True)
    training = TrainingConfig(steps=1, batch_size=2, learning_rate=1e-3, mixed_precision="bf16")
    accelerator = start_accelerator(training, folder, 0)
    z, t, context = torch.randn(1, 2, 4, 4, 4), torch.tensor(TIMES[accelerator.process_index])[None], torch.ones(1, 1, 2)
    volume, noise, seen, spread = torch.randn(1, 1, 8, 8, 8), torch.randn(1, 2, 4, 4, 4), [], {}
    embedding = unet_module.sinusoidal_embedding
    unet_module.sinusoidal_embedding = lambda t, dim: (seen.append((t.dtype, t.tolist())), embedding(t, dim))[1]
    monai_unet = {"channels": [8, 16], "blocks": 1, "norm_num_groups": 4, "head_channels": [8], "context_dim": 8}
    monai_autoencoder = {"channels": [4, 8], "blocks": 1, "norm_num_groups": 2, "middle_attention": True}
    networks = {
        "U-Net": (UNet(2, 2, [0], [8, 16], 1, [False, True], 8, 8), (z, t, context)),
        "U-Net without attention": (UNet(2, 2, [], [8], 1, [False]), (z, t)),
        "MONAI U-Net": (MonaiUNet(2, 2, [0], attention=[False, True], **monai_unet), (z, t, context)),
        "MONAI autoencoder": (MonaiAutoencoder(2, **monai_autoencoder), (volume, noise)),
        "adversary": (Adversary(AdversarialConfig(weight=1.0, start=0, channels=4, layers=1), 1), (volume, volume)),
    }
    for name, (network, inputs) in networks.items():
        model, optimizer = distribute(accelerator, network, make_optimizer(network, training))
        assert not (bare := [n for n, p in network.named_parameters() if not isinstance(p, DTensor)]), (name, bare)
        with accelerator.autocast():
            output = model(*inputs)
        loss = (output[0] if isinstance(output, tuple) else output).float().square().mean()
        assert torch.isfinite(loss), name
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in network.parameters()), name
        optimizer.step()
        units = {type(m).__name__.removeprefix("FSDP") for m in network.modules() if isinstance(m, FSDPModule)}
        spread[name] = sorted(units - {type(network).__name__.removeprefix("FSDP")})
    unet_module.sinusoidal_embedding = embedding
    assert seen == [(torch.float32, t.tolist())] * 2, seen  # as they were given, in both of our U-Nets
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    return spread


def train_spread(config: str, device: str) -> None:
    """Stage 2 on one process of its own, spread over it, from the environment of configs/accelerate/fsdp.yaml."""
    os.environ.update(environment())
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        dist.init_process_group("gloo")
        spread_over_cpus()
    spread = []
    distribute_one = task.distribute
    task.distribute = lambda *arguments: spread.append(distribute_one(*arguments)) or spread[-1]
    train("diffusion", Path(config))
    assert all(isinstance(p, DTensor) for module, _ in spread for p in module.parameters())


def main(folder: Path, config: Path, stage_1: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in ("adamw", "muon"):
        for _ in range(2):
            two_steps_from_the_last_checkpoint(folder / kind, kind)
    os.environ.update(environment() | {"ACCELERATE_USE_CPU": "true"})
    spread_over_cpus()
    spread = a_step_of_each_network(folder / "networks")
    if dist.get_rank() == 0:
        (folder / "spread.json").write_text(json.dumps(spread))
    train("diffusion", config)
    short = ["training.steps=2", "training.mixed_precision=bf16", "training.optimizer=adamw"]
    train("autoencoder", stage_1, *short, "adversarial={weight: 0.01, start: 0, channels: 4, layers: 1}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
