"""Peak memory of a decode against the size of the volume: whole and streamed, ldm3d's autoencoder and MONAI's.

    python benchmarks/memory.py [--quick] [--sizes 96 96 96 160 224 160 ...]

ldm3d's side is the autoencoder of configs/brain-1mm.yaml, MONAI's the published one of the model zoo's
brain_image_synthesis_latent_diffusion_model (Pinaya et al. 2022), decoded by its own `decode` and by ours. Weights are random,
which changes neither figure. Both precisions; every measurement has a process of its own, and memory is the peak above what
the loaded weights take. `estimated` is what `ldm3d.memory` had expected. A decode that would not fit into --limit-gb, or
outgrows it, is not measured, with a note in its row.
"""

import argparse
import json
from math import prod
from pathlib import Path

import torch
from monai.networks.nets import AutoencoderKL
from protocol import GB, device, free_memory, in_own_process, measure, write
from torch import nn

from ldm3d.config.read import load_config
from ldm3d.memory import decode_bytes
from ldm3d.models.pretrained import make_network
from ldm3d.models.streaming import decode_streamed

CONFIG = Path(__file__).parents[1] / "configs" / "brain-1mm.yaml"
SIZES = ((96, 96, 96), (160, 224, 160), (256, 256, 256), (384, 384, 384), (512, 512, 512))
LARGEST_OF_MONAI_ON_CPU = 160 * 224 * 160  # voxels; beyond, minutes become hours
ENOUGH_SECONDS = 20.0  # a decode that takes longer is not repeated
FACTOR = 8  # voxels to a latent, along an axis, on both sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small sizes, bfloat16, one run each")
    parser.add_argument("--sizes", type=int, nargs="+", help="X Y Z X Y Z ..., multiples of 8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-seconds", type=float, default=1800, help="of one process")
    parser.add_argument("--limit-gb", type=float, help="of one process; 85%% of the free memory if not given")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(perform(**arguments.task)))
        return

    sizes = list(zip(*[iter(arguments.sizes)] * 3)) if arguments.sizes else SIZES
    if arguments.quick and not arguments.sizes:
        sizes = ((64, 64, 64), (96, 128, 96))
    limit_gb = arguments.limit_gb or (torch.cuda.mem_get_info()[0] / GB if torch.cuda.is_available() else 0.85 * free_memory())
    rows = []
    print(f"{'volume':>13} {'dtype':>9} {'side':>6} {'mode':>9} {'seconds':>9} {'runs':>4} {'peak GB':>8} {'estimated':>9}")
    for task in tasks(sizes, ("bfloat16",) if arguments.quick else ("bfloat16", "float32")):
        expected = estimate(**task) / GB
        if expected > limit_gb:
            found = {"not_measured": f"about {expected:.1f} GB, more than {limit_gb:.1f}"}
        else:
            repeats = 1 if arguments.quick else arguments.repeats
            found = in_own_process(__file__, {**task, "repeats": repeats}, arguments.limit_seconds, limit_gb)
        rows.append({**task, "estimated_gb": expected, **found})
        print(line(rows[-1]), flush=True)
        write("memory", rows)
    print(*ratios(rows), sep="\n")
    print(write("memory", rows))


def tasks(sizes: list[tuple[int, ...]], dtypes: tuple[str, ...]) -> list[dict]:
    """What is to be measured, the modes of one decoder side by side."""
    found = []
    for shape in sizes:
        for dtype in dtypes:
            for side in ("ldm3d", "monai"):
                if side == "monai" and prod(shape) > LARGEST_OF_MONAI_ON_CPU and device().type == "cpu":
                    continue
                found += [{"shape": shape, "dtype": dtype, "side": side, "mode": mode} for mode in ("whole", "streamed")]
    return found


def network(side: str, dtype: str) -> nn.Module:
    """A decoder with random weights that are not zero anywhere."""
    torch.manual_seed(0)
    if side == "ldm3d":
        settings = load_config(CONFIG).autoencoder.network.model_dump()
        made = make_network("Autoencoder", in_channels=1, **settings)
    else:
        made = AutoencoderKL(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=(64, 128, 128, 128),
            latent_channels=3,
            num_res_blocks=(2, 2, 2, 2),
            norm_num_groups=32,
            norm_eps=1e-6,
            attention_levels=(False,) * 4,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.03)
    return made.to(device(), getattr(torch, dtype)).eval().requires_grad_(False)


def latent_shape(made: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    return 1, made.latent_channels, *(n // FACTOR for n in shape)


def estimate(shape: tuple[int, ...], dtype: str, side: str, mode: str) -> int:
    made = network(side, dtype)
    return decode_bytes(made, latent_shape(made, shape), device(), streamed=mode == "streamed")


@torch.no_grad()
def perform(shape: tuple[int, ...], dtype: str, side: str, mode: str, repeats: int) -> dict[str, float]:
    """One measurement, in this process."""
    made = network(side, dtype)
    z = torch.randn(latent_shape(made, shape), device=device()).to(getattr(torch, dtype))
    decode = (lambda: decode_streamed(made, z)) if mode == "streamed" else (lambda: made.decode(z).float())
    return measure(decode, repeats, ENOUGH_SECONDS)


def line(row: dict) -> str:
    start = f"{'x'.join(map(str, row['shape'])):>13} {row['dtype']:>9} {row['side']:>6} {row['mode']:>9}"
    if "not_measured" in row:
        return f"{start} not measured: {row['not_measured']}"
    return f"{start} {row['median']:9.2f} {row['repeats']:4} {row['peak_gb']:8.2f} {row['estimated_gb']:9.2f}"


def ratios(rows: list[dict]) -> list[str]:
    """Whole over streamed, where both were measured."""
    found = {(tuple(row["shape"]), row["dtype"], row["side"], row["mode"]): row for row in rows if "median" in row}
    lines = []
    for (shape, dtype, side, mode), whole in found.items():
        if mode == "whole" and (streamed := found.get((shape, dtype, side, "streamed"))):
            memory, seconds = (whole[key] / streamed[key] for key in ("peak_gb", "median"))
            size = "x".join(map(str, shape))
            lines.append(
                f"{size} {dtype} {side}: whole takes {memory:.1f} times the memory of a stream, {seconds:.2f} the time"
            )
    return lines


if __name__ == "__main__":
    main()
