"""What a Gaussian knows that the network has not learned: samples of the network, of a Gaussian, and of one after the other.

    python benchmarks/gaussian_start.py CONFIG [--until 1] [--components 120] [--num 4] [--out PICTURE]

A Gaussian is fitted in closed form to the training latents of an experiment that is trained (`ldm3d.diffusion.gaussian`).
Volumes are then drawn from the same noise by the network alone; by the Gaussian while sigma / alpha is above `--until` and
by the network from there on (Wang & Vastola 2024); and by the Gaussian alone. Neither is given a covariate.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm3d import figures
from ldm3d.config.read import load_config
from ldm3d.data.latents import read_latents
from ldm3d.diffusion.denoiser import Denoiser, in_turn
from ldm3d.diffusion.gaussian import fit_gaussian
from ldm3d.diffusion.samplers import sample
from ldm3d.experiment import latents_origin
from ldm3d.models.unet import cut_to
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator

STEPS, SPACING = 30, "lambda"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--until", type=float, default=1.0, help="sigma / alpha at which the network takes over")
    parser.add_argument("--components", type=int, default=120)
    parser.add_argument("--num", type=int, default=4, help="volumes of each kind")
    parser.add_argument("--out", type=Path, default=Path("gaussian-start.png"))
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    pipeline = Pipeline.from_pretrained(config.model_folder)
    moments, scans = read_latents(config.latents_folder, latents_origin(config))
    rows = np.flatnonzero(scans["split"] == "train")
    latents = [pipeline.autoencoder.normalise(mean_of(moments[row], pipeline)) for row in rows]
    gaussian = fit_gaussian(torch.cat(latents), arguments.components).denoiser(pipeline.process)
    network = pipeline.denoiser(pipeline.parse([{}] * arguments.num))
    kinds = {
        "network": network,
        f"Gaussian, then network from {arguments.until:g}": in_turn(gaussian, network, arguments.until, pipeline.process),
        "Gaussian": gaussian,
    }
    volumes, titles = [], []
    for kind, denoise in kinds.items():
        volumes += draw(pipeline, denoise, arguments.num)
        titles += [kind] * arguments.num
    figures.save(figures.mosaic(volumes, titles, pipeline.grid.spacing_mm, columns=arguments.num), arguments.out)
    print(f"written to {arguments.out}")


def mean_of(moments: np.ndarray, pipeline: Pipeline) -> Tensor:
    """The mean of a scan's posterior, (1, c, x, y, z)."""
    return pipeline.autoencoder.sample(torch.from_numpy(np.array(moments)[None]).to(pipeline.device)).cpu()


@torch.inference_mode()
def draw(pipeline: Pipeline, denoise: Denoiser, count: int) -> list[np.ndarray]:
    """Volumes (C, X, Y, Z), number i from noise i."""
    channels, *shape = pipeline.autoencoder.latent_shape(pipeline.grid.shape)
    padded = channels, *pipeline.unet.padded_shape(shape)
    noise = torch.stack([torch.randn(padded, generator=generator("gaussian start", i)) for i in range(count)])
    z = sample("unipc", denoise, noise.to(pipeline.device), pipeline.process, STEPS, spacing=SPACING)
    return list(pipeline.decode(cut_to(z, shape)).cpu().numpy())


if __name__ == "__main__":
    main()
