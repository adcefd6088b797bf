"""Decode: peak memory and seconds against the size of the volume, whole and streamed.

    python benchmarks/memory.py [--quick] [--precision float32]

Every measurement has a process of its own; memory is what a decode takes above the loaded weights, float32 volume included.
ldm3d's side is configs/brain-1mm.yaml's autoencoder; MONAI's is the published one (channels 64, 128, 128, 128), whole as MONAI
decodes and streamed as ldm3d does with its weights. Weights are random: neither depends on them.
"""

import argparse
import json
from pathlib import Path

import torch
from protocol import device, free_memory, in_own_process, measure, write

from ldm3d.config import load_config
from ldm3d.memory import decode_bytes
from ldm3d.models.autoencoder import Autoencoder, LatentSpace
from ldm3d.models.monai import MonaiAutoencoder
from ldm3d.models.streaming import decode_streamed
from ldm3d.training.run import bf16_is_fast

CONFIG = Path(__file__).parents[1] / "configs" / "brain-1mm.yaml"
PUBLISHED = (160, 224, 160)
SHAPES = ((96, 96, 96), PUBLISHED, (256, 256, 256), (384, 384, 384), (512, 512, 512))
LIMIT_SECONDS, SPARE_GB = 900, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest size alone, and ldm3d at 160x224x160")
    parser.add_argument("--precision", default="bfloat16" if bf16_is_fast() else "float32")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(perform(**json.loads(arguments.task))))
        return
    tasks = [("ldm3d", mode, shape) for shape in SHAPES for mode in ("whole", "streamed")]
    tasks += [("monai", mode, shape) for shape in SHAPES[:2] for mode in ("whole", "streamed")]
    if arguments.quick:
        tasks = [task for task in tasks if task[2] == SHAPES[0] or (task[0] == "ldm3d" and task[2] == PUBLISHED)]
    rows = []
    print(f"{arguments.precision}\n{'side':>6} {'mode':>9} {'volume':>12} {'seconds':>8} {'peak GB':>8} {'planned':>8}")
    for side, mode, shape in tasks:
        task = {"side": side, "mode": mode, "shape": shape, "precision": arguments.precision}
        rows.append({**task, **in_own_process(__file__, task, LIMIT_SECONDS, free_memory() - SPARE_GB)})
        print(line(rows[-1]), flush=True)
        write(f"memory-{arguments.precision}", rows)
    print(*ratios(rows), sep="\n")


def line(row: dict) -> str:
    start = f"{row['side']:>6} {row['mode']:>9} {'x'.join(map(str, row['shape'])):>12}"
    if "not_measured" in row:
        return f"{start} not measured: {row['not_measured']}"
    return f"{start} {row['median']:8.2f} {row['peak_gb']:8.2f} {row['planned_gb']:8.2f}"


def ratios(rows: list[dict]) -> list[str]:
    """What streaming takes of MONAI's own decode, and what ldm3d's network takes of it."""
    found = {(row["side"], row["mode"], tuple(row["shape"])): row for row in rows if "peak_gb" in row}
    theirs, lines = found.get(("monai", "whole", PUBLISHED)), []
    for side in ("monai", "ldm3d") if theirs else ():
        if row := found.get((side, "streamed", PUBLISHED)):
            memory, seconds = row["peak_gb"] / theirs["peak_gb"], theirs["median"] / row["median"]
            lines.append(f"{side} streamed: {memory:.2f} of the memory of MONAI's own decode, {seconds:.1f} times as fast")
    return lines


@torch.no_grad()
def perform(side: str, mode: str, shape: list[int], precision: str) -> dict:
    """Measure one decode, in a process of its own."""
    torch.manual_seed(0)
    network = ours() if side == "ldm3d" else MonaiAutoencoder(3, (64, 128, 128, 128))
    network = network.to(device(), getattr(torch, precision)).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    z = torch.randn(1, *network.latent_shape(shape)).to(device(), getattr(torch, precision))
    small = z[:, :, :4, :4, :4]

    def decode(latent: torch.Tensor) -> torch.Tensor:
        return decode_streamed(network, latent) if mode == "streamed" else network.decode(latent).float()

    decode(small)  # what libraries set up at their first use is not the volume's
    return {
        **measure(lambda: decode(z), 2, 60),
        "planned_gb": decode_bytes(network, z.shape, z.device, mode == "streamed") / 1e9,
    }


def ours() -> LatentSpace:
    return Autoencoder(**load_config(CONFIG).autoencoder.network.model_dump(exclude={"kind"}))


if __name__ == "__main__":
    main()
