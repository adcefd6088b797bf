"""Stage 2: train the U-Net on cached latents.

    accelerate launch -m ldm3d.training.diffusion CONFIG [--set key=value ...]

Reads OUTPUT/autoencoder and OUTPUT/latents, writes OUTPUT/diffusion-training (checkpoints, metrics.jsonl, previews,
TensorBoard) and, at the end, the pipeline OUTPUT/model. Started again with the same command, it continues.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm3d import figures
from ldm3d.base_model import first_schema, first_start, first_unet
from ldm3d.conditions import ImageChannels
from ldm3d.config.sections import Config
from ldm3d.contrast import Contrast
from ldm3d.covariates import describe, drop_covariates
from ldm3d.data.batches import evenly
from ldm3d.data.latents import MOMENTS, condition_file, mirrored_file, read_latents
from ldm3d.data.placing import grid_of
from ldm3d.data.samples import LatentSamples
from ldm3d.description import Preparation, Sampling
from ldm3d.diffusion.denoiser import NetworkDenoiser, call_network, in_turn
from ldm3d.diffusion.gaussian_fit import FOLDS, most_components
from ldm3d.diffusion.objective import make_objective
from ldm3d.errors import InputError
from ldm3d.experiment import latents_origin, save_experiment
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.conditioning import Conditions
from ldm3d.models.pretrained import make_network
from ldm3d.models.unet import LatentUNet, pad_to, width_of_images
from ldm3d.pipeline import Pipeline
from ldm3d.preemption import Stop
from ldm3d.randomness import generator
from ldm3d.start import GaussianStart
from ldm3d.training import checkpoint, command
from ldm3d.training.decoder import best_decoder
from ldm3d.training.images import TrainingImages, contrasts_of
from ldm3d.training.loop import fit
from ldm3d.training.noise_schedule import learn, schedule_optimizer
from ldm3d.training.parallel import start_accelerator
from ldm3d.training.ruler import HELD_OUT, GaussianRuler, few_enough, in_pairs, in_words
from ldm3d.training.scales import deviations
from ldm3d.training.task import MAIN, Task, Trained, batches_of, sampling_of

MAX_VALIDATION = 256  # latents, evenly chosen; more would not change which checkpoint is best
VALIDATION_REPEATS = 4  # times at which each held-out latent is scored: the loss depends on the time more than on the latent
VALIDATION_BATCH = 16


def train(config: Config, stop: Stop) -> None:
    """Train as the config describes, from the last checkpoint if there is one, until the end or a request to stop."""
    training, run = config.diffusion.training, config.diffusion_run
    origin = latents_origin(config)
    autoencoder = LatentSpace.from_pretrained(config.autoencoder_folder)
    moments, scans = read_latents(config.latents_folder, origin)
    if not (scans["split"] == "train").any():
        raise InputError("no scan in the training split; lower data.splits and run `ldm3d prepare` again")
    accelerator = start_accelerator(training, run, config.seed)
    fit(DiffusionTask(config, autoencoder, moments, scans, origin, accelerator), training, run, accelerator, stop)


class DiffusionTask(Task):
    """The U-Net and, for a variational diffusion model, its schedule.

    Args:
        config: of the experiment.
        autoencoder: from stage 1.
        moments: the latent cache, (scans, 2c, x, y, z).
        scans: its table.
        origin: what the cache was made from.
        accelerator: of the run.
    """

    estimate: GaussianStart | None = None  # whose remainder the network learns
    title, takes_other_scans = "diffusion", True  # its settings hold the origin of the latents, which names their scans

    def __init__(self, config: Config, autoencoder: LatentSpace, moments, scans, origin: dict, accelerator: Accelerator):
        settings, training = config.diffusion, config.diffusion.training
        self.config, self.accelerator = config, accelerator
        self.autoencoder, self.moments, self.scans = autoencoder.to(accelerator.device), moments, scans
        self.file = file = condition_file(settings.makes) if settings.makes and not config.made_labels else MOMENTS
        if file != MOMENTS:
            moments = self.moments = np.load(config.latents_folder / file, mmap_mode="r")
        # What is made may be missing for some scans; a scan's own latent that is not finite is a fault, which steps skip
        there = np.isfinite(moments[:, 0, 0, 0, 0]) if settings.makes else np.ones(len(scans), bool)
        self.split = {
            name: [i for i, s in enumerate(scans["split"]) if s == name and there[i]] for name in ("train", "validation")
        }
        whole = ~self.autoencoder.lacking(torch.from_numpy(np.array(moments[:, :, :1, :1, :1]))).any(dim=1)
        self.complete = {name: [i for i in rows if whole[i]] for name, rows in self.split.items()}  # which lack no contrast
        rows = scans[[c.name for c in config.covariates]].to_dict("records")
        trained = [rows[i] for i in self.split["train"]]
        self.schema = config.schema().fit(trained)
        by_channel = config.autoencoder.latent_scaling == "voxels" or settings.learns_residual
        self.scales = deviations(self.autoencoder, moments, self.complete["train"]) if by_channel else ()
        model = self.first_network(trained).to(accelerator.device)
        self.contexts = self.schema.encode(rows)  # (scans, K, 2)
        self.images = TrainingImages(config, self.autoencoder, scans, self.contexts, self.schema.names)
        self.padded = model.padded_shape(moments.shape[2:])
        self.estimate = self.start if settings.learns_residual else None
        self.objective = make_objective(**settings.objective(), scales=self.scales, estimated=settings.learns_residual)
        self.trained = {MAIN: Trained.of(model, training)}
        if (schedule := self.objective.schedule) is not None:  # 64 numbers, whose gradient `learn` sums over the processes
            self.companions = {
                "schedule": (
                    schedule.to(accelerator.device),
                    schedule_optimizer(schedule, settings.process.schedule_learning_rate),
                )
            }
        self.settings = {
            "diffusion": settings.model_dump(mode="json"),
            "covariates": checkpoint.as_json(self.schema.to_dict()),
            "latents": origin,
            "seed": config.seed,
            **sampling_of(config),
        }
        numbers = self.contexts, self.padded, self.images.readers, file
        samples = LatentSamples(config.latents_folder, tuple(self.split["train"]), *numbers, settings.mirror)
        self.batches = batches_of(samples, training, config, accelerator, scans.iloc[self.split["train"]])

    def first_network(self, rows: Sequence[Mapping[str, Any]]) -> LatentUNet:
        """A new U-Net; or that of `diffusion.init_from`, whose normalisations are then kept. rows: of the training scans."""
        settings, images = self.config.diffusion, ImageChannels(self.config.given_conditions, self.autoencoder).count
        if settings.init_from:
            model, schema, parts = first_unet(self.config, images)
            self.schema, self.scales = first_schema(schema, self.schema, rows), parts["scales"]
            return model
        channels = self.autoencoder.latent_channels
        of_data = {**settings.channels(channels), "num_categories": self.schema.num_categories}
        of_data |= {"image_channels": images, "image_width": width_of_images(images)} if images else {}
        return make_network("UNet", **of_data, **settings.network.model_dump())

    def losses(self, batch: Mapping[str, Tensor], step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The U-Net's; batch: moments (n, 2c, x, y, z), context (n, K, 2), and the random numbers of `LatentSamples`."""
        x = self.normalised(batch["moments"], batch["posterior_noise"])  # (n, c, *padded)
        context = drop_covariates(batch["context"], batch["drop"], self.config.diffusion.drop_covariates)
        loss = self.loss(self.trained[MAIN].module, x, batch["noise"], batch["quantile"], self.images.given(context, batch))
        yield MAIN, loss, {"loss": loss}

    def normalised(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """A posterior's sample, or its mean, as the U-Net sees it."""
        return pad_to(self.autoencoder.normalise(self.autoencoder.sample(moments, noise)), self.padded)

    def loss(self, unet: nn.Module, x: Tensor, noise: Tensor, u: Tensor, conditions: Conditions) -> Tensor:
        """Mean of the objective over a batch: x, noise (n, c, *padded); u (n,).

        A contrast that is missing is NaN in x. The network then sees noise on 0, the mean, and nothing is asked of it there.
        """
        lacking = self.autoencoder.lacking(x) if self.config.data.channels else None
        if lacking is not None:
            x = x.masked_fill(lacking[:, :, None, None, None], 0)

        def predict(z: Tensor, network_time: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return call_network(unet, z, network_time, conditions)

        estimate = self.estimate and self.estimate.under(conditions, self.objective.process)
        return self.objective.losses(predict, x, noise, u, estimate, lacking).mean()

    def before_step(self, loss: Tensor) -> None:
        for schedule, optimizer in self.companions.values():
            learn(schedule, optimizer, loss, self.accelerator)

    @torch.no_grad()
    def score(self, average: LatentUNet, step: int) -> dict[str, float]:
        """Loss on held-out latents with all covariates given; the same noise and times every time, so that steps compare.

        Each latent is scored `VALIDATION_REPEATS` times. Time and noise follow from the number of latent and repeat alone, so
        the figure does not depend on the number of processes nor on the size of a batch, but for rounding.
        """
        if not self.split["validation"]:
            return {}
        rows, accelerator = evenly(self.split["validation"], MAX_VALIDATION), self.accelerator
        device, total = accelerator.device, 0.0
        numbers = range(accelerator.process_index, len(rows) * VALIDATION_REPEATS, accelerator.num_processes)
        for first in range(0, len(numbers), VALIDATION_BATCH):
            chosen = torch.tensor(numbers[first : first + VALIDATION_BATCH])
            scans = [rows[n % len(rows)] for n in chosen]
            x = self.normalised(torch.from_numpy(np.stack([self.moments[scan] for scan in scans])).to(device))
            noise = torch.stack([torch.randn(x.shape[1:], generator=generator("validation", int(n))) for n in chosen])
            # Quantiles even over all pairs, in an order that does not depend on that of the samples
            u = ((chosen.double() * 0.6180339887498949 + 0.5) % 1).float()
            given = self.conditions_of(scans, [int(n) for n in chosen])
            loss = self.loss(average, x, noise.to(device), u.to(device), given)
            total += loss.item() * len(chosen)
        total = accelerator.reduce(torch.tensor(total, device=device), "sum").item()
        return {"validation_loss": total / (len(rows) * VALIDATION_REPEATS), **self.beside_gaussian(average)}

    def conditions_of(
        self, rows: Sequence[int], numbers: Sequence[int] | None = None, mirrored: Sequence[bool] | None = None
    ) -> Conditions:
        """All that is known of some rows of the cache; what is random of their images follows from `numbers`, or the rows.

        `mirrored` says of each whether its images are mirrored; None: none of them.
        """
        covariates, device = self.contexts[rows].to(self.accelerator.device), self.accelerator.device
        if not self.images:
            return Conditions(covariates)
        return self.images.given(
            covariates, self.images.of_rows(rows, numbers or rows, device, mirrored or [False] * len(rows))
        )

    def beside_gaussian(self, average: LatentUNet) -> dict[str, float]:
        """See `GaussianRuler.compare`; {} where there are too few training latents, or off the main process."""
        if self.ruler is None or not self.accelerator.is_main_process:
            return {}
        rows = evenly(self.complete["validation"], HELD_OUT)
        given, device = self.conditions_of(rows), self.accelerator.device
        process = self.objective.process
        model = NetworkDenoiser(average, process, self.config.diffusion.target, self.scales, self.estimate).given(given)
        if self.start is not None and not self.images:
            model = in_turn(self.start.denoiser(given.covariates, process), model, self.start.until, process)

        def denoise(z: Tensor, t: float) -> Tensor:
            with self.accelerator.autocast():
                return model(z.to(device), t).cpu()

        return self.ruler.compare(denoise)

    @functools.cached_property
    def ruler(self) -> GaussianRuler | None:
        """Fitted at the first validation, but for a learned schedule, which moves; the means of posteriors, as in `score`."""
        if not self.for_gaussian or not self.complete["validation"] or self.objective.schedule is not None:
            return None
        held_out = evenly(self.complete["validation"], HELD_OUT)
        return GaussianRuler(self.to_fit(self.for_gaussian)[0], self.means(held_out), self.objective.process)

    @functools.cached_property
    def start(self) -> GaussianStart | None:
        """Where sampling starts, if the config asks for it; fitted when it is first needed."""
        settings = self.config.diffusion.start
        if settings is None:
            return None
        rows = self.for_gaussian or self.complete["train"]
        # Else its network has learned what another Gaussian leaves
        own = settings.refit or not (self.config.diffusion.init_from and settings.residual)
        latents, contexts = self.to_fit(rows) if own or settings.images else (None, None)
        if own:
            components = min(settings.components, most_components(len(latents)))
            of_config = self.schema.num_categories, components, settings.until, settings.residual
            start = GaussianStart.fit(latents, contexts, *of_config)
        else:
            start = first_start(self.config)
        if settings.images:
            start = start.with_images(latents, contexts, functools.partial(self.of_fitted, rows))
        return start.to(self.accelerator.device)

    @functools.cached_property
    def for_gaussian(self) -> list[int]:
        """The training latents that Gaussians are fitted to; none where there are too few, or each is too large."""
        values = math.prod(self.padded) * self.autoencoder.latent_channels * (1 + self.config.diffusion.mirror)
        count = few_enough(len(self.complete["train"]), values)
        return evenly(self.complete["train"], count) if count else []

    def to_fit(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(latents, contexts) of some scans that a Gaussian is fitted to; with `mirror`, the mirrored ones follow.

        Then there are as many scans as folds divide: a brain and its mirror image lie in one fold of the cross-validation.
        """
        if not self.config.diffusion.mirror:
            return self.means(rows), self.contexts[rows]
        rows = self.in_folds(rows)
        mirrored = np.load(self.config.latents_folder / mirrored_file(self.file), mmap_mode="r")
        return torch.cat([self.means(rows), self.means(rows, mirrored)]), self.contexts[[*rows, *rows]]

    @staticmethod
    def in_folds(rows: Sequence[int]) -> Sequence[int]:
        return rows[: max(len(rows) - len(rows) % FOLDS, 1)]

    def of_fitted(self, rows: Sequence[int], chosen: Sequence[int]) -> Conditions:
        """`conditions_of` the latents of these numbers among those that `to_fit` gives for some rows."""
        rows = self.in_folds(rows) if self.config.diffusion.mirror else rows
        mirrored = [i >= len(rows) for i in chosen]
        return self.conditions_of([rows[i % len(rows)] for i in chosen], mirrored=mirrored)

    def means(self, rows: Sequence[int], moments: NDArray | None = None) -> Tensor:
        """The latents of some scans, (N, c, *padded), on the CPU: the means of their posteriors, by default of the cache."""
        cache = self.moments if moments is None else moments
        latents = (torch.from_numpy(np.array(cache[i])[None]).to(self.accelerator.device) for i in rows)
        return torch.cat([self.normalised(moments).cpu() for moments in latents])

    def preview(self, average: LatentUNet, path: Path) -> None:
        draw_sweep(self.pipeline(average), path, self.accelerator)

    def export(self, average: LatentUNet, which: str) -> None:
        if self.accelerator.is_main_process:
            pipeline = self.pipeline(average)
            pipeline.autoencoder = best_decoder(self.config, self.autoencoder)
            errors = self.beside_gaussian(average) if self.split["validation"] else {}
            pipeline.denoising = in_pairs(errors)
            pipeline.save_pretrained(self.config.model_folder)
            save_experiment(self.config, self.config.model_folder)
            print(f"model written to {self.config.model_folder} ({which})")
            if errors:
                print(in_words(errors))

    @functools.cached_property
    def contrasts(self) -> dict[str, Contrast]:
        """How the images look that the network is given."""
        return contrasts_of(self.config, self.scans.iloc[self.split["train"]].reset_index(drop=True))

    def pipeline(self, unet: LatentUNet) -> Pipeline:
        """The pipeline of these networks with the config's defaults for generation, on as many threads as the training."""
        data, target, process = self.config.data, self.config.diffusion.target, self.objective.process
        grid, sampling = grid_of(data.grid), Sampling(**self.config.generation.model_dump())
        networks = self.autoencoder, unet, self.schema
        facts = {
            "skull_stripped": data.skull_stripped,
            "suffix": self.config.made_suffix,
            "scales": self.scales,
            "start": self.start,
        }
        facts["conditions"], facts["suffixes"] = self.config.given_conditions, data.channels
        facts["labels"] = self.config.made_labels.groups if self.config.made_labels else None
        facts["preparation"] = Preparation.of(data)
        facts["contrasts"] = self.contrasts
        return Pipeline(*networks, grid, process, target, sampling, threads=None, **facts)


def draw_sweep(pipeline: Pipeline, path, accelerator: Accelerator, columns: int = 6) -> None:
    """One sample over the seen range of the first continuous covariate, the others left open, as a picture."""
    swept = next((c for c in pipeline.schema if c.seen), None)
    rows = [{}] * columns
    if swept:
        low, high = swept.seen
        rows = [{swept.name: low + (high - low) * i / (columns - 1)} for i in range(columns)]
    requests = pipeline.parse(rows)
    with accelerator.autocast():
        # Number 0 for all: the same noise, so that differences come from the covariate
        volumes = [next(pipeline.volumes([row], pipeline.sampling)) for row in requests]
    titles = [describe(row) for row in requests]
    figures.save(figures.mosaic(volumes, titles, pipeline.grid.spacing_mm, columns=3), path)


def main() -> None:
    command.run(train, "Train the diffusion model of an experiment (stage 2).", "diffusion")


if __name__ == "__main__":
    main()
