"""What training reads of one sample: volumes for stage 1, latents for stage 2.

Both are small objects that a process which reads ahead gets as a copy. They name their files and open them when the first
sample is read, in the process that reads: a memory map would be copied as its whole content.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from ldm3d.conditions import with_told
from ldm3d.config.conditions import DegradedCondition
from ldm3d.config.sections import Config
from ldm3d.data.degrade import degraded
from ldm3d.data.latents import MOMENTS, condition_file, mirrored_file
from ldm3d.data.preparing import load_prepared
from ldm3d.models.blocks import space_to_depth


def moved(volume: Tensor, reach: int, rng: Generator) -> Tensor:
    """A volume (C, X, Y, Z), mirrored from left to right or not, and shifted by less than `reach` voxels along each axis.

    An autoencoder codes blocks of `reach` voxels. Shifted volumes cut the same anatomy into other blocks, so a small dataset
    shows it many more of them. Zeros come in where a volume is shifted.
    """
    if torch.rand((), generator=rng) < 0.5:
        volume = volume.flip(1)
    shifts = torch.randint(1 - reach, reach, (3,), generator=rng).tolist()
    return nn.functional.pad(volume, [side for shift in reversed(shifts) for side in (shift, -shift)])


@dataclass(frozen=True)
class VolumeSamples:
    """Prepared volumes: `volume` (C, X, Y, Z) and `noise` (c, x, y, z) for the posterior's sample.

    Volumes are moved at random (`moved`) where the config says `autoencoder.augment`.

    Args:
        config: of the experiment.
        keys: of the prepared scans; sample i is the i-th.
        latent_shape: (c, x, y, z).
        load: the key of a scan -> its volume.
    """

    config: Config
    keys: tuple[str, ...]
    latent_shape: tuple[int, ...]
    load: Callable[[str], NDArray]

    def __len__(self) -> int:
        return len(self.keys)

    def __call__(self, sample: int, rng: Generator) -> dict[str, Tensor]:
        volume, noise = torch.from_numpy(self.load(self.keys[sample])), torch.randn(self.latent_shape, generator=rng)
        if self.config.autoencoder.augment:
            volume = moved(volume, self.config.autoencoder.network.downsampling, rng)
        return {"volume": volume, "noise": noise}


class PerturbedSamples(VolumeSamples):
    """`VolumeSamples` with noise to disturb the latent by: `perturbation` (c, x, y, z), and `strength` () in [0, 1)."""

    def __call__(self, sample: int, rng: Generator) -> dict[str, Tensor]:
        read = super().__call__(sample, rng)
        perturbation = torch.randn(self.latent_shape, generator=rng)
        return {**read, "perturbation": perturbation, "strength": torch.rand((), generator=rng)}


Reader = Callable[[int, Generator, bool], dict[str, Tensor]]  # of a row of the cache, or of its mirror image
IMAGE, MEASURED = "image ", "measured "  # before the name of a condition: its channels or volume; voxels that are not missing


@dataclass(frozen=True)
class CachedRows:
    """An array of the latent cache, and that of the mirrored volumes: the number of a row -> (..., x, y, z)."""

    folder: Path
    file: str = MOMENTS

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "file": self.file}

    @cached_property
    def _own(self) -> NDArray:
        return np.load(self.folder / self.file, mmap_mode="r")

    @cached_property
    def _mirrored(self) -> NDArray:
        return np.load(self.folder / mirrored_file(self.file), mmap_mode="r")

    def __call__(self, row: int, mirrored: bool = False) -> Tensor:
        return torch.from_numpy((self._mirrored if mirrored else self._own)[row].copy())


def prepared(config: Config, key: str, mirrored: bool) -> Tensor:
    """A prepared scan (1, X, Y, Z), mirrored from left to right if asked for."""
    volume = torch.from_numpy(load_prepared(config, key))
    return volume.flip(1) if mirrored else volume


@dataclass(frozen=True)
class CachedImages:
    """A condition of each scan from the latent cache: channels (c', x, y, z), NaN where the scan has none."""

    name: str
    folder: Path

    @cached_property
    def _rows(self) -> CachedRows:
        return CachedRows(self.folder, condition_file(self.name))

    def __call__(self, row: int, rng: Generator, mirrored: bool = False) -> dict[str, Tensor]:
        return {f"{IMAGE}{self.name}": self._rows(row, mirrored)}


@dataclass(frozen=True)
class Visits:
    """The latent (c, x, y, z) of another visit of the subject, a random one of those in `others` of a row; NaN for none.

    What that visit tells, a row of `told` (scans, K), follows as channels that are the same everywhere.
    """

    name: str
    folder: Path
    others: tuple[tuple[int, ...], ...]
    told: Tensor

    @cached_property
    def _rows(self) -> CachedRows:
        return CachedRows(self.folder)

    def __call__(self, row: int, rng: Generator, mirrored: bool = False) -> dict[str, Tensor]:
        others, chosen = self.others[row], float(torch.rand((), generator=rng))
        visit = others[int(chosen * len(others))] if others else row
        image = with_told(self._rows(visit, mirrored).chunk(2)[0], self.told[visit])
        return {f"{IMAGE}{self.name}": image if others else torch.full_like(image, torch.nan)}


@dataclass(frozen=True)
class DegradedVolumes:
    """The scan's volume made worse, (C, X, Y, Z), and which of its voxels are still there, (1, X, Y, Z)."""

    condition: DegradedCondition
    config: Config
    keys: tuple[str, ...]

    def __call__(self, row: int, rng: Generator, mirrored: bool = False) -> dict[str, Tensor]:
        volume, spacing_mm = prepared(self.config, self.keys[row], mirrored), self.config.data.grid.spacing_mm
        worse = degraded(volume, spacing_mm, self.condition.degradations, rng)
        return {f"{IMAGE}{self.condition.name}": worse.volume, f"{MEASURED}{self.condition.name}": worse.known}


@dataclass(frozen=True)
class ScanBlocks:
    """The scan itself, as the voxels of each block: (f^3, x, y, z)."""

    name: str
    config: Config
    keys: tuple[str, ...]

    def __call__(self, row: int, rng: Generator, mirrored: bool = False) -> dict[str, Tensor]:
        volume = prepared(self.config, self.keys[row], mirrored)[None]
        return {f"{IMAGE}{self.name}": space_to_depth(volume, self.config.autoencoder.network.downsampling)[0]}


@dataclass(frozen=True)
class LatentSamples:
    """Cached posteriors: `moments` (2c, x, y, z), `context` (K, 2), and all random numbers that a step needs.

    Args:
        folder: of the latent cache.
        rows: of the cache; sample i is the i-th.
        contexts: encoded covariates of all rows of the cache, (scans, K, 2).
        padded: (x, y, z) that the U-Net sees: the shape of `noise`.
        images: of the conditions, each (row, generator, whether mirrored) -> its tensors by name.
        file: of the moments, in the folder.
        mirrored: whether every second sample, by chance, is of the mirrored volume and images.
    """

    folder: Path
    rows: tuple[int, ...]
    contexts: Tensor
    padded: tuple[int, ...]
    images: tuple[Reader, ...] = ()
    file: str = MOMENTS
    mirrored: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _rows(self) -> CachedRows:
        return CachedRows(self.folder, self.file)

    def __call__(self, sample: int, rng: Generator) -> dict[str, Tensor]:
        row = self.rows[sample]
        moments = self._rows(row)  # (2c, x, y, z)
        channels = len(moments) // 2
        read = {
            "moments": moments,
            "context": self.contexts[row],
            "posterior_noise": torch.randn(moments[:channels].shape, generator=rng),
            "noise": torch.randn((channels, *self.padded), generator=rng),
            "drop": torch.rand(self.contexts.shape[1] + 2, generator=rng),
        }
        # Drawn last, so that all other numbers are those of a training without mirrored volumes and images
        mirrored = self.mirrored and bool(torch.rand((), generator=rng) < 0.5)
        if mirrored:
            read["moments"] = self._rows(row, mirrored)
        for image in self.images:
            read |= image(row, rng, mirrored)
        return read | ({"drop_images": torch.rand(len(self.images), generator=rng)} if self.images else {})
