"""How well a model that is given an image draws what belongs to it, on held-out scans, beside simpler answers.

    python benchmarks/conditions.py CONFIG [--set key=value] [--scans 8] [--samples 8] [--steps 12] [--picture FILE.png]

Compares single samples and their mean with
    given        the image itself, where it is a worse version of the scan (linear interpolation of thick slices)
    cubic        the same by cubic interpolation, for a lower resolution along one axis
    mean         the mean of 32 training scans
    reconstructed   the truth through the autoencoder: no sample can be expected to be nearer
    one step     E[x | image], the answer of the same network to pure noise: what a regression with it would give
Each by PSNR (dB), MAE and SSIM within the brain, or within the hole where voxels are missing; CRPS and the standard deviation
of samples are of the same voxels. `in 90%` is how often intervals of 90%, from the mean and deviation of the samples, hold the
truth. Volumes are prepared ones, in [0, 1].
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from ldm3d import figures
from ldm3d.config.conditions import DegradedCondition
from ldm3d.config.read import load_config
from ldm3d.data.batches import evenly
from ldm3d.data.conditions import cached_conditions, find_files, load_condition
from ldm3d.data.degrade import degraded
from ldm3d.data.preparing import load_prepared, read_scan_table
from ldm3d.generation.given import Given, Images
from ldm3d.metrics.reconstruction import psnr, ssim
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator

BRAIN = 0.05  # intensity from which on a voxel counts


def given_of(config, files, table, row, only):
    """(truth, what is given, region) of a scan; `files` are those of the conditions, by name and key."""
    key, volumes, measured = table["key"].iloc[row], {}, {}
    truth = load_prepared(config, key)
    for condition in config.given_conditions:
        if only and condition.name not in only:
            continue
        if isinstance(condition, DegradedCondition):
            of = torch.from_numpy(truth), config.data.grid.spacing_mm, condition.degradations
            volumes[condition.name], known = degraded(*of, generator("benchmark", row))
            if condition.hides:
                measured[condition.name] = known
        elif condition not in config.diffusion.conditions:  # the scan itself
            volumes[condition.name] = torch.from_numpy(truth)
            made = next(each for each in config.diffusion.conditions if each.name == config.diffusion.makes)
            truth = load_condition(config, made, files[made.name], key)
        else:
            volumes[condition.name] = torch.from_numpy(load_condition(config, condition, files[condition.name], key))
    region = truth[0] > BRAIN
    for known in measured.values():
        region = region & (known[0].numpy() == 0)
    return truth, Given(volumes, measured, {}), region


def figures_of(volume, truth, region):
    """PSNR in dB, MAE and SSIM of the voxels of a region."""
    pair = torch.from_numpy(volume)[None].float(), torch.from_numpy(truth)[None].float(), torch.from_numpy(region)[None, None]
    return {"psnr": psnr(*pair).item(), "mae": float(np.abs(volume - truth)[0][region].mean()), "ssim": ssim(*pair).item()}


def crps(samples, truth, region):
    """Continuous ranked probability score of an ensemble (Gneiting & Raftery 2007, eq. 21), mean over a region."""
    x = np.stack(samples)[:, 0][:, region]
    spread = np.abs(x[:, None] - x[None]).mean((0, 1))
    return float((np.abs(x - truth[0][region]).mean(0) - spread / 2).mean())


def cubic(volume, truth, condition, spacing_mm):
    """A thick-sliced volume by cubic interpolation, instead of the linear one that the model is given."""
    each = condition.degradations[0]
    axis = "xyz".index(each.axes)
    factor = np.mean(each.strength) / spacing_mm[axis]
    middles = np.arange((factor - 1) / 2, truth.shape[axis + 1] - 0.5, factor)
    slices = ndimage.map_coordinates(
        volume[0],
        np.meshgrid(*[middles if a == axis else np.arange(n) for a, n in enumerate(truth.shape[1:])], indexing="ij"),
        order=1,
    )
    places = [(np.arange(n) - middles[0]) / factor if a == axis else np.arange(n) for a, n in enumerate(truth.shape[1:])]
    return ndimage.map_coordinates(slices, np.meshgrid(*places, indexing="ij"), order=3, mode="nearest")[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", action="append", help="give these conditions alone")
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(asked.config, asked.set)
    pipeline, table = Pipeline.from_pretrained(config.model_folder), read_scan_table(config)
    pipeline.threads = None
    held_out = evenly([i for i, split in enumerate(table["split"]) if split == "test"], asked.scans)
    training = evenly([i for i, split in enumerate(table["split"]) if split == "train"], 32)
    files = {each.name: dict(zip(table["key"], find_files(config, each, table))) for each in cached_conditions(config)}
    average = np.mean([given_of(config, files, table, row, asked.only)[0] for row in training], axis=0)
    sampling = pipeline.sampling.replace(steps=asked.steps)
    rows: dict[str, list[dict]] = {}
    shown = []
    for row in held_out:
        truth, given, region = given_of(config, files, table, row, asked.only)
        covariates = [{c.name: table[c.name].iloc[row] for c in config.schema()}]
        covariates = pipeline.parse(covariates)
        one = pipeline.given(Images(pipeline.conditions, lambda _, given=given: given, {}, None))
        samples = [next(one.volumes(covariates, sampling, 1, [n])) for n in range(asked.samples)]
        channels, *shape = pipeline.autoencoder.latent_shape(pipeline.grid.shape)
        noise = torch.randn(1, channels, *pipeline.unet.padded_shape(shape), generator=generator("benchmark", row))
        with torch.no_grad():
            expected = one.decode(one.denoiser(covariates, numbers=[0])(noise.to(pipeline.device), 1.0))[0].cpu().numpy()
            again = pipeline.reconstruct(torch.from_numpy(truth)[None])[0].cpu().numpy()
        answers = {"a sample": samples[0], "mean of samples": np.mean(samples, axis=0), "one step": expected}
        answers |= {"mean": average, "reconstructed": again}
        for condition in pipeline.conditions:
            if isinstance(condition, DegradedCondition) and condition.name in given.volumes:
                answers["given"] = given.volumes[condition.name].numpy()
                if condition.degradations[0].operator == "resolution" and condition.degradations[0].axes in ("x", "y", "z"):
                    answers["cubic"] = cubic(answers["given"], truth, condition, config.data.grid.spacing_mm)
        for name, volume in answers.items():
            rows.setdefault(name, []).append(figures_of(volume, truth, region))
        deviation = np.stack(samples).std(0, ddof=1)[0][region]
        spread = {"crps": crps(samples, truth, region), "deviation": float(deviation.mean())}
        # Of a Gaussian with the samples' mean and deviation, where they vary
        off = np.abs(np.mean(samples, axis=0) - truth)[0][region]
        inside = off <= 1.645 * np.sqrt(1 + 1 / len(samples)) * deviation
        spread["in 90%"] = float(inside[deviation > 0.01].mean())
        rows.setdefault("samples", []).append(spread)
        first = next(iter(given.volumes.values())).numpy()
        shown.append(
            [first[:1] if len(first) == 1 else first.argmax(0)[None] / len(first), samples[0], samples[1], expected, truth]
        )
    table_of = {name: {key: float(np.mean([each[key] for each in of])) for key in of[0]} for name, of in rows.items()}
    print(json.dumps(table_of, indent=1))
    for name, of in table_of.items():
        print(f"{name:16}", "  ".join(f"{key} {value:.4g}" for key, value in of.items()))
    if asked.picture:
        titles = ["given", "a sample", "another", "one step", "truth"] * min(len(shown), 3)
        flat = [volume for line in shown[:3] for volume in line]
        figures.save(figures.mosaic(flat, titles, config.data.grid.spacing_mm, columns=5), asked.picture)


if __name__ == "__main__":
    main()
