"""Diffusion models: fidelity to covariates against training time, ldm3d's recipe beside MONAI's.

    python benchmarks/diffusion_quality.py [--bids FOLDER] [--set KEY=VALUE] [--minutes 8] [--autoencoder-minutes 5]

Three sides, trained in turns of a few seconds in one process on the same volumes; only a side's own turns count:

ldm3d          the config's U-Net on latents that were encoded once.
monai-cached   MONAI's DiffusionModelUNet of the 3D latent diffusion tutorial (channels 32, 64, 64) in the same loop: the
               same latents, batch, targets and optimiser. What differs is the network.
tutorial       that tutorial's recipe: MONAI's autoencoder encodes every batch of 2, noise prediction, Adam at 1e-4, covariates
               as one token, DDIM in 50 steps. Its autoencoder was trained for the same time as ldm3d's (with a tuned learning
               rate: at the tutorial's own it would be worse).

Figures: samples a second; r and slope between asked and measured ventricular and brain volume on generated volumes; the kernel
distance of generated to held-out volumes by `ldm3d evaluate`'s own features, beside that of real training volumes (what a
perfect model would get); and a picture, since a distance at low resolution once called noise in the shape of a brain real.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from autoencoder_quality import MonaiTuned, Ours
from data import Data, load
from protocol import RESULTS, device, write
from torch import Tensor
from turns import Training, in_turns

from ldm3d import figures
from ldm3d.covariates import CovariateSchema, drop_covariates
from ldm3d.description import Sampling
from ldm3d.diffusion.denoiser import TIMESTEPS
from ldm3d.diffusion.process import times_from_quantiles
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError
from ldm3d.geometry import Grid
from ldm3d.metrics.distances import kernel_distance
from ldm3d.metrics.features import extract, load_extractor, standardise
from ldm3d.models.monai import MonaiAutoencoder, MonaiUNet
from ldm3d.models.unet import UNet, pad_to
from ldm3d.pipeline import Pipeline
from ldm3d.precision import bf16_is_fast
from ldm3d.rulers.volumetry import apply_measure, measure_volumes
from ldm3d.statistics.agreement import agreement
from ldm3d.training.ema import EMA
from ldm3d.training.optimizer import make_optimizer, set_learning_rate

VOLUMES = 32  # generated at every mark
SHOWN = 3  # of them
JUDGED = ("ventricular_volume_ml", "brain_volume_ml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bids", type=Path, help="rendered or real brains; phantoms if not given")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the config")
    parser.add_argument("--minutes", type=float, default=8, help="of each diffusion model")
    parser.add_argument("--autoencoder-minutes", type=float, default=5, help="of each autoencoder")
    arguments = parser.parse_args()
    data = load(arguments.bids, whole_anatomies=False, overrides=arguments.set)
    seconds = 60 * arguments.autoencoder_minutes
    stage_1 = {"ldm3d": Ours(data, seconds), "monai": MonaiTuned(data, seconds)}
    rows = []
    for name, found in in_turns(stage_1, start_figures=False):
        print(f"autoencoder {name:>6}: {found['seconds']:4.0f} s {found['psnr_db']:6.2f} dB", flush=True)
        rows.append({"stage": "autoencoder", "data": data.name, "side": name, **found})
    autoencoder, theirs = stage_1["ldm3d"].average.network, wrapped(stage_1["monai"])

    limit, schema = 60 * arguments.minutes, data.config.schema().fit(data.train_rows)
    sides = {
        "ldm3d": Ldm3d(data, schema, autoencoder, limit),
        "monai-cached": MonaiCached(data, schema, autoencoder, limit),
        "tutorial": Tutorial(data, schema, theirs, limit),
    }
    null = distance(data.train[: len(data.test)], data.test)
    print(f"kernel distance of real training volumes to the held-out ones: {null:.3f}")
    print("         side  seconds  steps  samples/s  ventricles r  slope  brain r  distance")
    for name, found in in_turns(sides, start_figures=False):
        row = {"stage": "diffusion", "data": data.name, "side": name, **found, "null_distance": null}
        row["samples_per_second"] = found["step"] * sides[name].batch / found["seconds"]
        rows.append(row)
        print(
            f"{name:>13} {row['seconds']:8.0f} {row['step']:6} {row['samples_per_second']:10.2f} "
            f"{row['ventricular_volume_ml_r']:13.3f} {row['ventricular_volume_ml_slope']:6.2f} "
            f"{row['brain_volume_ml_r']:8.3f} {row['distance']:9.3f}",
            flush=True,
        )
        write(f"diffusion-quality-{data.name}", rows)
    real = list(data.test[:SHOWN].float().numpy())
    titles = [name for name in ("real", *sides) for _ in range(SHOWN)]
    pictures = [volume for shown in (real, *(side.shown for side in sides.values())) for volume in shown]
    mosaic = figures.mosaic(pictures, titles, data.config.data.grid.spacing_mm, columns=SHOWN)
    figures.save(mosaic, RESULTS / f"diffusion-quality-{data.name}.png")
    last = {row["side"]: row for row in rows if row["stage"] == "diffusion"}
    for name in ("monai-cached", "tutorial"):
        ratio = last["ldm3d"]["samples_per_second"] / last[name]["samples_per_second"]
        print(f"ldm3d sees {ratio:.1f} times the samples a second of {name}")


class Stage2(Training):
    """One diffusion model; a subclass sets the network, the recipe and how clean latents are had.

    Args:
        data, schema: volumes and their fitted covariates.
        autoencoder: trained; its `latent_mean` and `latent_std` are set here.
        limit: seconds of training.
    """

    process, target, drop, decay = make_process("flow"), "velocity", 0.3, 0.995

    def __init__(self, data: Data, schema: CovariateSchema, autoencoder, limit: float):
        super().__init__(limit)
        self.marks = [limit / 2, limit]  # figures cost as much as minutes of training
        self.data, self.schema, self.where = data, schema, device()
        self.settings = data.config.diffusion
        self.batch, self.drop = self.settings.training.batch_size, self.settings.drop_covariates
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.moments = torch.cat([self.encode(volume[None]) for volume in data.train])  # (N, 2c, x, y, z)
        latents = autoencoder.sample(self.moments, torch.randn(self.moments.chunk(2, dim=1)[0].shape))
        self.autoencoder.latent_mean.copy_(latents.mean(dim=(0, 2, 3, 4)))
        self.autoencoder.latent_std.copy_(latents.std(dim=(0, 2, 3, 4)))
        self.contexts = schema.encode(data.train_rows)
        torch.manual_seed(0)
        self.unet = self.build(autoencoder.latent_channels).to(self.where)
        self.optimizer = self.make_optimizer()
        self.average = EMA(self.unet, self.decay)
        self.generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def encode(self, volume: Tensor) -> Tensor:
        with torch.autocast(self.where.type, torch.bfloat16, enabled=bf16_is_fast(self.where)):
            return self.autoencoder.encode(volume.float().to(self.where)).float()

    def latents(self, chosen: Tensor) -> Tensor:
        """Posterior moments of training volumes."""
        return self.moments[chosen]

    def make_optimizer(self):
        return make_optimizer(self.unet, self.settings.training)

    def rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.settings.training.warmup_steps)
        return self.settings.training.learning_rate * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * self.share)) / 2)

    def times(self) -> Tensor:
        quantiles = (torch.arange(self.batch) + torch.rand((), generator=self.generator)) / self.batch
        time = self.settings.time_sampling
        return times_from_quantiles(time.kind, quantiles.clamp(1e-5, 1 - 1e-5), time.location, time.scale)

    def step(self, step: int) -> None:
        set_learning_rate(self.optimizer, self.rate(step))
        chosen = torch.randint(len(self.moments), (self.batch,), generator=self.generator)
        moments = self.latents(chosen)
        noise = torch.randn((2, *moments.chunk(2, dim=1)[0].shape), generator=self.generator).to(self.where)
        x = self.autoencoder.normalise(self.autoencoder.sample(moments, noise[0]))
        x, e = (pad_to(value, self.unet.padded_shape(value.shape[2:])) for value in (x, noise[1]))
        t = self.times().to(self.where)
        dropping = torch.rand(self.batch, len(self.schema) + 2, generator=self.generator)
        context = drop_covariates(self.contexts[chosen], dropping, self.drop).to(self.where)
        with torch.autocast(self.where.type, torch.bfloat16, enabled=bf16_is_fast(self.where)):
            output = self.unet(self.process.add_noise(x, e, t), TIMESTEPS * t, context)
        loss = (output.float() - self.process.target(self.target, x, e, t)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.unet, step)

    def sampling(self) -> Sampling:
        return Sampling(**self.data.config.generation.model_dump())

    def figures(self) -> dict[str, float]:
        grid = Grid.centred(self.data.config.data.grid.shape, self.data.config.data.grid.spacing_mm)
        networks = self.autoencoder, self.average.network
        pipeline = Pipeline(*networks, self.schema, grid, self.process, self.target, threads=None)
        rows = pipeline.parse([self.data.test_rows[i % len(self.data.test_rows)] for i in range(VOLUMES)])
        with torch.autocast(self.where.type, torch.bfloat16, enabled=bf16_is_fast(self.where)):
            volumes = [volume.copy() for volume in pipeline.volumes(rows, self.sampling())]
        measured = [apply_measure(measure_volumes, volume, grid.spacing_mm) for volume in volumes]
        found = {"batch": self.batch}
        for name in JUDGED:
            try:
                fitted = agreement([row[name] for row in rows], [m[name] for m in measured]).to_dict()
            except InputError:  # nothing that could be measured yet
                fitted = {"r": 0.0, "slope": 0.0}
            found |= {f"{name}_r": fitted["r"], f"{name}_slope": fitted["slope"]}
        generated = torch.from_numpy(np.stack(volumes))
        self.shown = volumes[:SHOWN]
        return found | {"distance": distance(generated, self.data.test)}


class Ldm3d(Stage2):
    def build(self, c: int):
        return UNet(c, c, self.schema.num_categories, **self.settings.network.model_dump(exclude={"kind"}))


class MonaiCached(Stage2):
    def build(self, c: int):
        return MonaiUNet(c, c, self.schema.num_categories, (32, 64, 64), 1, (False, True, True), (64,))


class Tutorial(Stage2):
    process, target, decay = make_process("vp-scaled-linear", beta_start=0.0015, beta_end=0.0195), "noise", 0.0

    def build(self, c: int):
        self.batch, self.drop = 2, 0.0
        return MonaiUNet(c, c, self.schema.num_categories, (32, 64, 64), 1, (False, True, True), (64,), conditioning="values")

    def latents(self, chosen: Tensor) -> Tensor:
        return self.encode(self.data.train[chosen])

    def make_optimizer(self):
        return torch.optim.Adam([{"params": list(self.unet.parameters()), "factor": 1.0}], 1e-4)

    def rate(self, step: int) -> float:
        return 1e-4

    def times(self) -> Tensor:
        return torch.rand(self.batch, generator=self.generator)

    def sampling(self) -> Sampling:
        return Sampling("ddim", 50, guidance=1.0, spacing="leading")


def wrapped(side: MonaiTuned) -> MonaiAutoencoder:
    """The trained AutoencoderKL behind the interface that a pipeline knows."""
    latent = side.settings.network.latent_channels
    network = MonaiAutoencoder(latent, (32, 64, 64), 1, (False, False, True), middle_attention=True, norm_num_groups=16)
    network.network.load_state_dict(side.network.state_dict())
    return network.to(side.where)


def distance(volumes: Tensor, real: Tensor) -> float:
    """Kernel distance of volumes to real ones, both (N, 1, X, Y, Z)."""
    extractor = load_extractor("random")
    of_real, of_volumes = (extract(each.float().numpy(), extractor) for each in (real, volumes))
    return kernel_distance(*standardise(of_real, of_volumes))


if __name__ == "__main__":
    main()
