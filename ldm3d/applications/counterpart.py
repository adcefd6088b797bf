"""The healthy counterpart of a scan: the same brain as a model of healthy people would have it.

Noise drowns what is there, and the model, asked for the person's covariates, draws it again as it knows brains: at low noise
only fine detail, at high noise large structures, too. As in AutoDDPM (Bercea et al. 2023) a first guess from several noise
levels tells where scan and model agree. These voxels are kept as a measurement, and all others are drawn given them
(`ldm3d.applications.restore`): so the counterpart is the person's own wherever that is likely, without a rim.

Legend: v the scan on the Grid, D(z) decoded latents, (1, C, X, Y, Z) in [0, 1]; x its normalised latent; K samples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm3d.applications.placed import PlacedScan, place
from ldm3d.applications.prior import LOWEST
from ldm3d.applications.restore import posterior_volumes
from ldm3d.config.data import RegistrationConfig
from ldm3d.covariates import Value
from ldm3d.diffusion.operators import Chain, blur, mask
from ldm3d.diffusion.process import time_of_ratio
from ldm3d.diffusion.samplers import follow
from ldm3d.errors import InputError
from ldm3d.models.unet import cut_to, pad_to
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator

STRENGTHS = (0.5, 1.0, 2.0)  # sigma / alpha
NOISE = 0.01  # of scans, of the intensity range
WIDTH = 2.0  # voxels over which agreement is judged, full width at half maximum
BRAIN = 0.05  # of the intensity range: what is darker in scan and guess is no brain


@dataclass(frozen=True, eq=False)
class Counterpart:
    """A healthy counterpart.

    Attributes:
        placed: the scan.
        mean: (1, C, X, Y, Z), the mean of the samples: the scan where the two agree.
        samples: (K, C, X, Y, Z).
        decoded: (1, C, X, Y, Z), the mean of D(z) of the samples: without what only the scan knows.
        agreed: (X, Y, Z) bool, voxels that were kept.
        settings: all that the result follows from, for sidecars.
    """

    placed: PlacedScan
    mean: Tensor
    samples: Tensor
    decoded: Tensor
    agreed: Tensor
    settings: dict[str, Any]

    @property
    def residual(self) -> Tensor:
        """v - D(z), (1, C, X, Y, Z): bright where the scan is brighter than the model expects."""
        return self.placed.volume - self.decoded

    def image(self) -> Any:
        """The counterpart on the scan's own voxels, with its finest detail: a nibabel image, marked as derived."""
        return self.placed.image(self.mean, reference=self.placed.volume)


def counterpart(
    pipe: Pipeline,
    image: Any,
    covariates: Mapping[str, Any] | None = None,
    *,
    strengths: Sequence[float] = STRENGTHS,
    doubted: float = 0.1,
    steps: int = 6,
    samples: int = 4,
    levels: int = 6,
    seed: int = 0,
    register: RegistrationConfig | bool | None = None,
    stripped: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Counterpart:
    """Draw the healthy counterpart of a scan, by a model of healthy people.

    Args:
        pipe: the model.
        image: see `ldm3d.applications.placed.place`; or what that returned.
        covariates: of the person, by name; those left out are open. Leave out what a disease changes (volumes).
        strengths: noise levels sigma / alpha of the first guess.
        doubted: share of the brain, above 0 and below 1, where scan and first guess differ most, and which is drawn again.
        steps: from each strength down to the data.
        samples: K.
        levels: see `ldm3d.applications.restore.restore`.
        seed: of all random numbers.
        register, stripped: see `place`.
        progress: called with the numbers of strengths and levels that are done and that there will be, over all samples.

    Raises:
        InputError: what `place` and `Pipeline.parse` raise; a setting out of range.
    """
    if not strengths or min(strengths) <= LOWEST or not 0 < doubted < 1 or min(steps, samples, levels) < 1:
        raise InputError(
            f"strengths {list(strengths)}, doubted {doubted:g}, steps {steps}, samples {samples}, levels {levels}: strengths "
            f"must be above {LOWEST:g}, doubted between 0 and 1, the others at least 1"
        )
    (row,) = pipe.parse([dict(covariates or {})])
    placed = image if isinstance(image, PlacedScan) else place(pipe, image, register, stripped)
    total, done = len(strengths) + samples * levels, 0

    def count(_level: int = 0) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    guesses = []
    for number, strength in enumerate(strengths):
        guesses.append(_drawn_again(pipe, placed.z, row, strength, steps, seed, number))
        count()
    agreed = agreement(placed.volume, torch.stack(guesses).mean(dim=0), doubted)
    linear = mask(agreed)
    measured = linear(placed.volume)
    drawn = list(posterior_volumes(pipe, linear, measured, row, NOISE, range(samples), levels, seed, progress=count))
    decoded = torch.stack([each.decoded for each in drawn]).mean(dim=0)[None].clamp(0, 1)
    expected = torch.stack([each.expected for each in drawn]).clamp(0, 1)
    mean = torch.where(agreed, placed.volume, expected.mean(dim=0, keepdim=True))
    settings = {"covariates": {k: v for k, v in row.items() if v is not None}, "strengths": list(strengths)}
    settings |= {"doubted": doubted, "steps": steps, "samples": samples, "levels": levels, "seed": seed}
    return Counterpart(placed, mean, expected, decoded, agreed, settings)


@torch.no_grad()
def _drawn_again(
    pipe: Pipeline, z: Tensor, row: Mapping[str, Value], strength: float, steps: int, seed: int, number: int
) -> Tensor:
    """The scan's latent with noise, and down again (SDEdit, Meng et al. 2022), decoded."""
    process = pipe.process
    times = [time_of_ratio(process, ratio) for ratio in np.geomspace(strength, LOWEST, steps)] + [0.0]
    padded = pad_to(z, pipe.unet.padded_shape(z.shape[2:]))
    noise = torch.randn(padded.shape, generator=generator("counterpart", seed, number)).to(padded)
    start = process.add_noise(padded, noise, times[0])
    return pipe.decode(cut_to(follow("dpmpp-2m", pipe.denoiser([row]), start, times, process), z.shape[2:]))


def agreement(volume: Tensor, guess: Tensor, doubted: float) -> Tensor:
    """Where a scan and the first guess agree, (X, Y, Z) bool: all but the share of the brain in which they differ most.

    Args:
        volume, guess: (1, C, X, Y, Z).
        doubted: the share.
    """
    near = Chain(*(blur(axis, n, WIDTH) for axis, n in enumerate(volume.shape[2:])))
    difference = near((volume - guess).abs().mean(dim=1))[0]
    brain = (torch.maximum(volume, guess) > BRAIN).any(dim=1)[0]
    if not brain.any():
        raise InputError("the scan is black on the model's grid, so it has no counterpart; look at how it lies")
    return difference <= torch.quantile(difference[brain], 1 - doubted)
