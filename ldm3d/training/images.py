"""The image conditions of a training: what reads them with each sample, and what a step makes of them."""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from ldm3d.conditions import ImageChannels
from ldm3d.config.conditions import Condition, DegradedCondition, ImageCondition
from ldm3d.config.sections import Config
from ldm3d.data.samples import IMAGE, MEASURED, CachedImages, DegradedVolumes, Visits
from ldm3d.errors import InputError
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.conditioning import Conditions
from ldm3d.randomness import generator

Reader = Callable[[int, Generator], dict[str, Tensor]]


class TrainingImages:
    """The conditions of an experiment; none is a case like any other.

    Args:
        config: of the experiment.
        autoencoder: of stage 1, on the accelerator's device.
        scans: table of the latent cache.
        accelerator: of the run.
    """

    def __init__(self, config: Config, autoencoder: LatentSpace, scans: pd.DataFrame, accelerator: Accelerator):
        self.conditions, self.accelerator = config.given_conditions, accelerator
        self.channels = ImageChannels(self.conditions, autoencoder)
        self.readers = tuple(_reader(config, each, scans) for each in self.conditions)

    def __len__(self) -> int:
        return len(self.conditions)

    def given(self, covariates: Tensor, batch: Mapping[str, Tensor]) -> Conditions:
        """Covariates (n, K, 2) and the images of a batch; images are left open where `drop_images` (n, images) says so.

        Args:
            covariates: of each sample.
            batch: what `readers` have read, stacked, on the device; with `drop_images` in training.
        """
        if not self.conditions:
            return Conditions(covariates)
        raw, measured, given = {}, {}, {}
        for i, condition in enumerate(self.conditions):
            name = condition.name
            raw[name] = self._raw(condition, batch[f"{IMAGE}{name}"])
            if f"{MEASURED}{name}" in batch:
                measured[name] = self.channels.shares(batch[f"{MEASURED}{name}"])
            if "drop_images" in batch:
                given[name] = batch["drop_images"][:, i] >= condition.drop
        return Conditions(covariates, *self.channels.stacked(raw, measured, given or None))

    def of_rows(self, rows: Sequence[int], numbers: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The images of some rows of the cache as a batch, with random numbers that follow from `numbers` alone."""
        samples = []
        for row, number in zip(rows, numbers):
            rng, sample = generator("validation images", int(number)), {}
            for reader in self.readers:
                sample |= reader(row, rng)
            samples.append(sample)
        return {name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]}

    @torch.no_grad()
    def _raw(self, condition: Condition, images: Tensor) -> Tensor:
        """Channels on the latent grid: of the cache as they are, of a volume that is worse since this step by the encoder."""
        if not isinstance(condition, DegradedCondition):
            return images
        with self.accelerator.autocast():
            return self.channels.encoded(condition, images)


def _reader(config: Config, condition: Condition, scans: pd.DataFrame) -> Reader:
    """What reads a condition of a row of the cache."""
    if isinstance(condition, DegradedCondition):
        return DegradedVolumes(condition, config, tuple(scans["key"]))
    if condition not in config.diffusion.conditions:  # the scan itself, where something else is made
        return Visits(condition.name, config.latents_folder, tuple((row,) for row in range(len(scans))))
    if isinstance(condition, ImageCondition) and condition.visit:
        return Visits(condition.name, config.latents_folder, _visits(condition, scans))
    return CachedImages(condition.name, config.latents_folder)


def _visits(condition: ImageCondition, scans: pd.DataFrame) -> tuple[tuple[int, ...], ...]:
    """For each row those of the same subject's other visits that the condition allows, by the order of their sessions."""
    rows: dict[str, list[int]] = {}
    for row, subject in enumerate(scans["subject"]):
        rows.setdefault(subject, []).append(row)
    sessions = list(scans["session"])

    def allowed(row: int, other: int) -> bool:
        before, after = sessions[other] < sessions[row], sessions[other] > sessions[row]
        return {"earlier": before, "later": after, "other": before or after}[str(condition.visit)]

    others = [tuple(o for o in rows[s] if allowed(row, o)) for row, s in enumerate(scans["subject"])]
    if not any(others):
        raise InputError(f"diffusion.conditions {condition.name}: no subject has an {condition.visit} visit (session)")
    return tuple(others)
