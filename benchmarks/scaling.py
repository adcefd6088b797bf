"""How long is a step of stage 2 on many processes, and where do more of them stop paying?

    python benchmarks/scaling.py [--repeats 5]

A model of the seconds of one step on P processes with a global batch B, b = B / P each:

    step = max(compute(b), read(b)) + exposed            exposed = max(0, reduce(P) - overlap * backward(b))
    compute(b) = fixed + each * b                         measured at three batches on one process, one thread
    read(b)    = b * bytes of a sample's moments / rate   the rate measured, in random order, from the page cache
    reduce(P)  = 2 log2(P) * latency + 2 (P - 1) / P * 4 bytes * parameters / bandwidth

Latency and bandwidth come from all-reduces of gloo on this machine. The model is then checked: it predicts the steps of DDP
on two processes, which are measured, too. Last, the same formula with a GPU's figures in it, assumed and marked so,
goes up to 1,024 of them for configs/brain-1mm.yaml.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from protocol import write
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from ldm3d.config.read import load_config
from ldm3d.config.sections import Config
from ldm3d.models.pretrained import make_network
from ldm3d.precision import bf16_is_fast
from ldm3d.training.optimizer import make_optimizer

CONFIGS = Path(__file__).parents[1] / "configs"
BATCHES = (2, 4, 8)
SIZES_MB = (1, 4, 16, 64)
# Assumed of H100 GPUs in nodes of 8, and not measured: share of 989 TFLOP/s reached, bytes/s of NVLink and network for each
# GPU, seconds a hop, share of the backward pass under which DDP hides its reduction, bytes/s read by each GPU
H100 = {"flops": 0.25 * 989e12, "nvlink": 300e9, "network": 40e9, "latency": 10e-6, "overlap": 0.8, "read": 1e9, "fixed": 5e-3}
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.repeats)
        return
    rows = [*measured(arguments.repeats), *projected()]
    print(write("scaling", rows))


def stage_2(config: Config) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """The U-Net of a config, and the shape (c, x, y, z) of its latents."""
    network = config.autoencoder.network
    shape = (network.latent_channels, *(n // network.downsampling for n in config.data.grid.shape))
    of_data = {"in_channels": shape[0], "out_channels": shape[0], "num_categories": config.schema().num_categories}
    return make_network("UNet", **of_data, **config.diffusion.network.model_dump()), shape


class Steps:
    """Optimiser steps on random latents, as stage 2 takes them."""

    def __init__(self, config: Config, distributed: bool):
        torch.manual_seed(0)
        self.network, self.shape = stage_2(config)
        self.optimizer = make_optimizer(self.network, config.diffusion.training)
        self.model = DistributedDataParallel(self.network) if distributed else self.network

    def seconds(self, batch: int, repeats: int) -> float:
        """Of one step with `batch` samples on this process: the median."""
        x, t, context = torch.randn(batch, *self.shape), torch.rand(batch), torch.ones(batch, self.network.num_covariates, 2)
        found = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_fast("cpu")):
                output = self.model(x, t, context)
            (output.float() - x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            found.append(time.perf_counter() - start)
        return float(np.median(found[1:]))


def worker(out: Path, repeats: int) -> None:
    """One of two gloo processes: all-reduces of several sizes, and steps of DDP."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    reduces = {}
    for size in SIZES_MB:
        tensor, found = torch.zeros(size * 250_000), []
        for _ in range(repeats + 2):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            found.append(time.perf_counter() - start)
        reduces[size] = float(np.median(found[2:]))
    steps = Steps(load_config(CONFIGS / "brains-3mm.yaml"), distributed=True)
    ddp = {batch: steps.seconds(batch, repeats) for batch in BATCHES}
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"reduce": reduces, "ddp": ddp}))
    dist.destroy_process_group()


def measured(repeats: int) -> list[dict]:
    """The model's constants on this machine, and its predictions beside what two processes take."""
    torch.set_num_threads(1)
    config = load_config(CONFIGS / "brains-3mm.yaml")
    alone = Steps(config, distributed=False)
    compute = {batch: alone.seconds(batch, repeats) for batch in BATCHES}
    each, fixed = np.polyfit(list(compute), list(compute.values()), 1)
    rate = reading_rate(alone.shape)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*launcher, __file__, "--repeats", str(repeats), "--worker", str(out)]
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        found = json.loads(out.read_text())
    sizes = np.array([1e6 * float(size) for size in found["reduce"]])
    per_byte, latency = np.polyfit(sizes, list(found["reduce"].values()), 1)
    parameters = sum(p.numel() for p in alone.network.parameters())
    constants = {
        "fixed": float(fixed),
        "each": float(each),
        "read": rate,
        "latency": max(0.0, float(latency)) / 2,
        "bandwidth": 1 / float(per_byte),  # two processes: 2 (P - 1) / P = 1
        "overlap": 0.0,  # the cores that reduce are those that compute
        "parameters": parameters,
        "sample_bytes": 4 * 2 * int(np.prod(alone.shape)),
    }
    print(f"one process: {fixed * 1e3:.0f} ms + {each * 1e3:.1f} ms a sample, {parameters / 1e6:.2f} M parameters")
    print(f"reading {rate / 1e9:.1f} GB/s; all-reduce {1e-9 / per_byte:.2f} GB/s + {constants['latency'] * 1e3:.2f} ms a hop")
    rows = [{"kind": "constants", "machine": "this", **constants}]
    print(f"{'processes':>9} {'batch each':>10} {'measured':>9} {'predicted':>9} {'ratio':>6}")
    for processes, seconds in ((1, compute), (2, {int(batch): value for batch, value in found["ddp"].items()})):
        for batch, value in seconds.items():
            predicted = step_seconds(constants, processes, batch)
            rows.append({"kind": "check", "processes": processes, "batch": batch, "measured": value, "predicted": predicted})
            print(f"{processes:9} {batch:10} {value:8.3f}s {predicted:8.3f}s {predicted / value:6.2f}")
    return rows


def reading_rate(shape: tuple[int, ...]) -> float:
    """Bytes/s at which posterior moments of random samples come from a memory map in the page cache."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        rows = 256
        np.save(file, np.zeros((rows, 2 * shape[0], *shape[1:]), dtype=np.float32))
        file.flush()
        moments, order = np.load(file.name, mmap_mode="r"), np.random.default_rng(0).permutation(rows)
        start = time.perf_counter()
        for row in order:
            torch.from_numpy(moments[row].copy())
        return moments.nbytes / (time.perf_counter() - start)


def step_seconds(constants: dict, processes: int, batch: float, bandwidth: float | None = None) -> float:
    """The model at the top of this file; `batch` of each process."""
    compute = constants["fixed"] + constants["each"] * batch
    alone = max(compute, batch * constants["sample_bytes"] / constants["read"])
    if processes == 1:
        return alone
    sent = 2 * (processes - 1) / processes * 4 * constants["parameters"]
    reduce = 2 * math.log2(processes) * constants["latency"] + sent / (bandwidth or constants["bandwidth"])
    return alone + max(0.0, reduce - constants["overlap"] * 2 / 3 * compute)


def projected() -> list[dict]:
    """Samples a second of configs/brain-1mm.yaml on H100 GPUs, by the model with assumed constants."""
    config = load_config(CONFIGS / "brain-1mm.yaml")
    with torch.device("meta"):
        network, shape = stage_2(config)
        x, t, context = torch.empty(1, *shape), torch.empty(1), torch.empty(1, network.num_covariates, 2)
        with FlopCounterMode(display=False) as counter:
            network(x, t, context)
    parameters = sum(p.numel() for p in network.parameters())
    constants = {
        **H100,
        "each": 3 * counter.get_total_flops() / H100["flops"],  # the backward pass is twice the forward one
        "parameters": parameters,
        "sample_bytes": 4 * 2 * int(np.prod(shape)),
    }
    flops = counter.get_total_flops() / 1e9
    print(f"\nbrain-1mm.yaml: {parameters / 1e6:.0f} M parameters, {flops:.0f} GFLOP forward a sample")
    print("samples a second and efficiency on H100 GPUs, by the model, with figures that are assumed and not measured")
    rows = [{"kind": "constants", "machine": "H100, assumed", **constants}]
    print(f"{'GPUs':>5}" + "".join(f"{f'batch {b}':>22}" for b in (64, 512, 4096)) + f"{'8 each':>22}")
    for gpus in GPUS:
        line = f"{gpus:5}"
        for name, total in (("64", 64), ("512", 512), ("4096", 4096), ("8 each", 8 * gpus)):
            if total < gpus:
                line += f"{'-':>22}"
                continue
            # An all-reduce is as fast as its slowest link
            seconds = step_seconds(constants, gpus, total / gpus, H100["nvlink"] if gpus <= 8 else H100["network"])
            alone = step_seconds(constants, 1, 8) if name == "8 each" else step_seconds(constants, 1, total) / gpus
            found = {"samples_per_second": total / seconds, "efficiency": alone / seconds}
            rows.append({"kind": "projection", "gpus": gpus, "batch": name, **found})
            line += f"{total / seconds:12.0f}/s {100 * alone / seconds:6.0f}%"
        print(line)
    return rows


if __name__ == "__main__":
    main()
