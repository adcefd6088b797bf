"""The autoencoder's linear path: PSNR of held-out volumes, in three steps.

blocks alone       principal components of each block, and back by least squares
with neighbours    back from the latents of the 26 blocks around, too: what `fit_linear_path` sets
trained            analysis and synthesis trained alone for seconds: what the networks start from
"""

import argparse
import time
from pathlib import Path

import torch
from data import load
from protocol import device, write
from torch import Tensor

from ldm3d.metrics.reconstruction import psnr
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.blocks import depth_to_space, space_to_depth
from ldm3d.precision import bf16_is_fast
from ldm3d.training.linear_path import train_linear_path, volumes_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--bids", type=Path, help="rendered or real brains; phantoms if not given")
    arguments = parser.parse_args()
    data, where = load(arguments.bids), device()
    count = volumes_for(data.train.shape[2:])
    train = data.train[:: max(1, len(data.train) // count)][:count].float().to(where)
    test = data.test.float().to(where)
    rows = []

    def half():
        return torch.autocast(where.type, torch.bfloat16, enabled=bf16_is_fast(where))

    print("factor channels  blocks alone  with neighbours  trained  seconds   PSNR in dB")
    for factor, widths in ((4, [8, 8]), (8, [8, 8, 8])):
        for channels in arguments.channels:
            network = Autoencoder(channels, factor, widths, blocks=0).to(where)
            network.fit_linear_path(train)
            alone, neighbours = quality(blocks_alone(network, test, train), test), quality(linear(network, test), test)
            start = time.perf_counter()
            train_linear_path(network, train, data.config.autoencoder.linear_path_steps, 0, half)
            seconds, trained = time.perf_counter() - start, quality(linear(network, test), test)
            print(f"{factor:6} {channels:8} {alone:13.2f} {neighbours:16.2f} {trained:8.2f} {seconds:8.1f}", flush=True)
            row = {"data": data.name, "factor": factor, "channels": channels, "blocks_alone_psnr_db": alone}
            rows.append({**row, "neighbours_psnr_db": neighbours, "trained_psnr_db": trained, "seconds": seconds})
    print(write(f"linear-path-{data.name}", rows))


def quality(again: Tensor, volumes: Tensor) -> float:
    return psnr(again.clamp(0, 1), volumes).mean().item()


@torch.no_grad()
def linear(network: Autoencoder, volumes: Tensor) -> Tensor:
    return network.through_linear_path(volumes)


@torch.no_grad()
def blocks_alone(network: Autoencoder, test: Tensor, train: Tensor) -> Tensor:
    """Inverse principal components: each block from its own latents, by least squares on the training volumes."""

    def rows(values: Tensor) -> Tensor:  # (N, C, x, y, z) -> (N x y z, C)
        return values.movedim(1, -1).flatten(0, -2)

    def latents(volumes: Tensor) -> tuple[Tensor, Tensor]:
        blocks = space_to_depth(volumes, network.downsampling)
        z = rows(network.analysis(blocks))
        return torch.cat([z, torch.ones_like(z[:, :1])], dim=1), blocks

    z, blocks = latents(train)
    solution = torch.linalg.lstsq(z, rows(blocks)).solution
    z, blocks = latents(test)
    again = (z @ solution).reshape(*blocks.movedim(1, -1).shape).movedim(-1, 1)
    return depth_to_space(again, network.downsampling)


if __name__ == "__main__":
    main()
