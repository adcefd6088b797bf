"""At which noise levels a trained model loses the brain: errors by level, and sampling that starts from held-out brains.

    python benchmarks/where_lost.py CONFIG [--model FOLDER] [--only source=rendered] [--num 2] [--out PICTURE]

Printed, for each sigma / alpha, are errors of the denoiser on validation latents and of the Gaussian that a model starts
with (`ldm3d.start`): of the first channel and of all, relative to the variance of the same, in the units of the latents. For
the picture validation latents are noised to a level and sampled down from there, under their own covariates. The lowest level
whose volumes look worse than the reconstruction is where the model has to get better; what is above it cannot be judged.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from gaussian_start import means

from ldm3d import figures
from ldm3d.config.read import load_config
from ldm3d.data.latents import read_latents
from ldm3d.diffusion.gaussian import denoising_errors
from ldm3d.diffusion.process import time_of_ratio
from ldm3d.diffusion.samplers import follow
from ldm3d.experiment import latents_origin
from ldm3d.models.unet import cut_to, pad_to
from ldm3d.pipeline import Pipeline

LEVELS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # sigma / alpha
LOWEST, STEPS = 0.03, 16  # sigma / alpha before the last step of sampling, and steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--model", type=Path, help="by default that of the experiment")
    parser.add_argument("--only", metavar="NAME=VALUE", help="people with this value in the table")
    parser.add_argument("--num", type=int, default=2, help="people in the picture")
    parser.add_argument("--levels", type=float, nargs="+", default=(1.0, 4.0, 16.0), help="sigma / alpha, of the picture")
    parser.add_argument("--out", type=Path, default=Path("where-lost.png"))
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    pipeline = Pipeline.from_pretrained(arguments.model or config.model_folder, "cpu")
    moments, scans = read_latents(config.latents_folder, latents_origin(config))
    chosen = scans["split"] == "validation"
    if arguments.only:
        name, value = arguments.only.split("=", 1)
        chosen &= scans[name].astype(str) == value
    numbers = np.flatnonzero(chosen)[:16]
    x = means(moments, numbers, pipeline)  # (N, c, x, y, z)
    shape = x.shape[2:]
    x = pad_to(x, pipeline.unet.padded_shape(shape))
    rows = scans[pipeline.schema.names].iloc[numbers].to_dict("records")
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    denoisers = {"network": pipeline.denoiser(rows)}
    if pipeline.start is not None:
        context = pipeline.schema.encode(rows)
        denoisers["Gaussian"] = pipeline.start.denoiser(context, pipeline.process)
    variances = x.var(dim=(0, 2, 3, 4))
    print(f"{len(numbers)} validation latents; standard deviations of channels {variances.sqrt().numpy().round(2)}")
    times = [time_of_ratio(pipeline.process, level) for level in LEVELS]
    with torch.inference_mode():
        for name, denoise in denoisers.items():
            for level, errors in zip(LEVELS, denoising_errors(denoise, x, e, times, pipeline.process)):
                first, every = float(errors[0] / variances[0]), float(errors.sum() / variances.sum())
                print(f"{name} at {level:g}: first channel {first:.4f}, all {every:.4f}")
        few = slice(arguments.num)
        denoise = pipeline.denoiser(rows[few])
        volumes = [pipeline.decode(cut_to(x[few], shape))]
        for level in arguments.levels:
            down = [time_of_ratio(pipeline.process, ratio) for ratio in np.geomspace(level, LOWEST, STEPS)]
            z = pipeline.process.add_noise(x[few], e[few], down[0])
            volumes.append(pipeline.decode(cut_to(follow("unipc", denoise, z, [*down, 0.0], pipeline.process), shape)))
    titles = ["reconstruction", *(f"from {level:g}" for level in arguments.levels)]
    pictures = [volume[person].numpy() for person in range(arguments.num) for volume in volumes]
    figure = figures.mosaic(pictures, titles * arguments.num, pipeline.grid.spacing_mm, columns=len(titles))
    figures.save(figure, arguments.out)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
