"""The image conditions of a training: what reads them with each sample, and what a step makes of them."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from ldm3d.conditions import ImageChannels, in_voxels
from ldm3d.config.conditions import Condition, DegradedCondition, ImageCondition, LabelsCondition
from ldm3d.config.sections import Config
from ldm3d.contrast import Contrast
from ldm3d.data.batches import evenly
from ldm3d.data.conditions import ScanImages, visits_of
from ldm3d.data.samples import IMAGE, MEASURED, CachedImages, DegradedVolumes, Reader, ScanBlocks, Visits
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.conditioning import Conditions
from ldm3d.randomness import generator

LOOKED_AT = 64  # scans from which is learned how an image looks


class TrainingImages:
    """The conditions of an experiment; none is a case like any other.

    Args:
        config: of the experiment.
        autoencoder: of stage 1, on the device of the run.
        scans: table of the latent cache.
        contexts: encoded covariates of all its rows, (scans, K, 2).
        names: of these covariates.
    """

    def __init__(self, config: Config, autoencoder: LatentSpace, scans: pd.DataFrame, contexts: Tensor, names: Sequence[str]):
        self.conditions = config.given_conditions
        self.channels = ImageChannels(self.conditions, autoencoder)
        self.readers = tuple(_reader(config, each, scans, contexts, names) for each in self.conditions)

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
            raw[name] = batch[f"{IMAGE}{name}"]  # channels of the cache, or a volume that is worse since it was read
            if isinstance(condition, DegradedCondition):
                raw[name] = self.channels.encoded(condition, raw[name])
                measured[name] = self.channels.measured(batch[f"{MEASURED}{name}"])
            if "drop_images" in batch:
                given[name] = batch["drop_images"][:, i] >= condition.drop
        return Conditions(covariates, *self.channels.stacked(raw, measured, given or None))

    def of_rows(
        self, rows: Sequence[int], numbers: Sequence[int], device: torch.device, mirrored: Sequence[bool]
    ) -> dict[str, Tensor]:
        """The images of some rows of the cache as a batch, mirrored or not, with random numbers that follow from `numbers`."""
        samples = []
        for row, number, flipped in zip(rows, numbers, mirrored):
            rng, sample = generator("validation images", int(number)), {}
            for reader in self.readers:
                sample |= reader(row, rng, flipped)
            samples.append(sample)
        return {name: torch.stack([sample[name] for sample in samples]).to(device) for name in samples[0]}


def contrasts_of(config: Config, scans: pd.DataFrame) -> dict[str, Contrast]:
    """How the images of each condition look, on some of the scans that lack none, by the condition's name."""
    names = [each.name for each in config.given_conditions if not isinstance(each, LabelsCondition)]
    images = ScanImages(config, scans) if names else None
    given = [images.given(i)[0] for i in evenly(images.complete, LOOKED_AT)] if images else []
    fitted = {name: Contrast.fit([each[name].numpy() for each in given], config.data.grid.spacing_mm) for name in names}
    return {name: each for name, each in fitted.items() if each}


def _reader(config: Config, condition: Condition, scans: pd.DataFrame, contexts: Tensor, names: Sequence[str]) -> Reader:
    """What reads a condition of a row of the cache."""
    if isinstance(condition, DegradedCondition):
        return DegradedVolumes(condition, config, tuple(scans["key"]))
    if condition not in config.diffusion.conditions and in_voxels(condition):  # the scan itself, where labels are made
        return ScanBlocks(condition.name, config, tuple(scans["key"]))
    if condition not in config.diffusion.conditions:  # where another contrast is
        return Visits(condition.name, config.latents_folder, tuple((row,) for row in range(len(scans))), contexts[:, :0, 0])
    if isinstance(condition, ImageCondition) and condition.visit:
        told = contexts[:, [names.index(name) for name in condition.tells]]  # (scans, K', 2)
        told = torch.where(told[..., 1] > 0, told[..., 0], torch.nan)
        return Visits(condition.name, config.latents_folder, visits_of(condition, scans), told)
    return CachedImages(condition.name, config.latents_folder)
