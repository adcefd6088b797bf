"""Restore a scan: what was there, given how the scan came from it, drawn from the posterior of a trained model.

A scan y = A x + s n, with a known operator A (holes, missing or thick slices, blur, bias field) and noise, is explained by a
volume x = D(z) + r: a latent z that the diffusion model draws, and a remainder r that the autoencoder cannot hold
(`ldm3d.applications.remainder`). Both are drawn given the scan, several times: their mean is the best guess, their spread says
how far it can be trusted.

Legend: K samples; volumes on the Grid (K, C, X, Y, Z) in [0, 1].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ldm3d.applications.decoding import LatentDecoder
from ldm3d.applications.degraded import degraded
from ldm3d.applications.measured_scan import Degraded
from ldm3d.applications.placed import PlacedScan, place
from ldm3d.applications.prior import Prior, latent_shape, level_times, prior_of
from ldm3d.applications.remainder import Remainder
from ldm3d.config.data import RegistrationConfig
from ldm3d.covariates import Value
from ldm3d.data.nifti import to_image
from ldm3d.diffusion.operators import Linear, Measured
from ldm3d.diffusion.posterior import sample_posterior
from ldm3d.errors import InputError
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator

CORRECTIONS, ITERATIONS = 2, 30  # Gauss-Newton steps a level, and of conjugate gradients in each


@dataclass(frozen=True, eq=False)
class Restored:
    """A restored scan.

    Attributes:
        placed: the scan.
        degraded: how it came to be.
        samples: (K, C, X, Y, Z), draws from the posterior with a remainder drawn, too; not clipped.
        mean: (1, C, X, Y, Z), the mean of draws whose remainder is the expected one.
        settings: all that the result follows from, for sidecars.
    """

    placed: PlacedScan
    degraded: Degraded
    samples: Tensor
    mean: Tensor
    settings: dict[str, Any]

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of the posterior, (1, C, X, Y, Z), in units of the intensity range; needs two samples."""
        return self.samples.std(dim=0, keepdim=True)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Bounds that hold the true voxel with this probability, if the model is right; see `interval_of`."""
        return interval_of(self.mean, self.samples, level)

    def image(self) -> Any:
        """The mean on the scan's own voxels, or finer ones, in its own intensities: a nibabel image, marked as derived."""
        return self._image(self.degraded.back(self.placed, self.mean))

    def sample_image(self, number: int) -> Any:
        """One sample, likewise."""
        return self._image(self.degraded.back(self.placed, self.samples[number : number + 1]))

    def deviation_image(self) -> Any:
        """The deviation, in the scan's intensities; 0 where the scan itself was kept."""
        return self._image(self.degraded.deviation_back(self.placed, self.deviation))

    def _image(self, array: NDArray) -> Any:
        return to_image(array, self.degraded.affine, self.placed.mark)


def interval_of(mean: Tensor, samples: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Bounds of the next draw from a Gaussian of which K samples were seen: mean -+ q sd sqrt(1 + 1/K), q of Student's t."""
    count = len(samples)
    if count < 2:
        raise InputError("an interval needs two samples or more; ask for 8")
    reach = stats.t.ppf((1 + level) / 2, count - 1) * (1 + 1 / count) ** 0.5 * samples.std(dim=0, keepdim=True)
    return (mean - reach).clamp(0, 1), (mean + reach).clamp(0, 1)


def restore(
    pipe: Pipeline,
    image: Any,
    operator: str | Sequence[str] | Linear = (),
    noise: float = 0.01,
    *,
    covariates: Mapping[str, Any] | None = None,
    samples: int = 8,
    levels: int = 8,
    seed: int = 0,
    register: RegistrationConfig | bool | None = None,
    stripped: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Restored:
    """Draw what a degraded scan can have been.

    >>> pipe.restore("scan.nii.gz", "hole=lesion.nii.gz").image()

    Args:
        pipe: the model.
        image: see `ldm3d.applications.placed.place`; or what that returned.
        operator: what happened to the scan, see `ldm3d.applications.degraded.degraded`; or A itself, of volumes on the Grid.
        noise: standard deviation s of the scan's noise, in units of its intensity range (from black to white); it is taken
            out. What else the model cannot explain counts as anatomy, and is kept.
        covariates: of the person, by name; those left out are open.
        samples: K.
        levels: of noise, from pure noise down; each costs a call of the U-Net and a few of the decoder.
        seed: of all random numbers; sample i is the same among any number.
        register, stripped: see `place`.
        progress: called with the numbers of levels that are done and that there will be, over all samples.

    Raises:
        InputError: what `place`, `degraded` and `Pipeline.parse` raise; noise, samples or levels out of range.
    """
    if samples < 1 or levels < 1 or not noise > 0:
        raise InputError(f"samples {samples}, levels {levels}, noise {noise:g}: at least 1, 1, and above 0")
    (row,) = pipe.parse([dict(covariates or {})])
    placed = image if isinstance(image, PlacedScan) else place(pipe, image, register, stripped)
    found = degraded(placed, operator)
    done = 0

    def level(_done: int) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, samples * levels)

    drawn = list(
        posterior_volumes(pipe, found.linear, found.measured, row, noise, range(samples), levels, seed, progress=level)
    )
    settings = {"operator": found.name, "noise": noise, "covariates": {k: v for k, v in row.items() if v is not None}}
    settings |= {"samples": samples, "levels": levels, "seed": seed}
    mean = torch.stack([each.expected for each in drawn]).mean(dim=0)[None].clamp(0, 1)
    return Restored(placed, found, torch.stack([each.drawn for each in drawn]), mean, settings)


class Drawn(NamedTuple):
    """A draw of a volume x = D(z) + r, (C, X, Y, Z) each, not clipped.

    Attributes:
        drawn: x with r drawn.
        expected: x with r as it is to be expected.
        decoded: D(z).
    """

    drawn: Tensor
    expected: Tensor
    decoded: Tensor


def posterior_volumes(
    pipe: Pipeline,
    linear: Linear,
    y: Tensor,
    row: Mapping[str, Value],
    noise: float,
    numbers: Sequence[int],
    levels: int,
    seed: int = 0,
    corrections: int = CORRECTIONS,
    iterations: int = ITERATIONS,
    prior: Prior | None = None,
    keep_remainder: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Drawn]:
    """Draws of what was measured: one after another, so that each is the same whichever others are asked for.

    Args:
        pipe: the model.
        linear: A, of volumes on the Grid.
        y: the measurement (1, C, X', Y', Z'), on the pipeline's device.
        row: covariates, from `Pipeline.parse`.
        noise: s, above 0.
        numbers: of the draws; draw i follows from (seed, i).
        levels, seed, progress: see `restore`; progress is called after each level.
        corrections, iterations: see `sample_posterior`.
        prior: None: `prior_of`.
        keep_remainder: whether there is r; else x = D(z), for comparison.
    """
    decoder, times = LatentDecoder(pipe), level_times(pipe, levels)
    denoise, spread = prior or prior_of(pipe, row)
    shape = latent_shape(pipe)
    for number in numbers:
        stream = generator("restore", seed, number)

        def draw(shape: Sequence[int], stream: torch.Generator = stream) -> Tensor:
            return torch.randn(1, *shape, generator=stream).to(y)

        remainder = Remainder(linear, noise, (pipe.autoencoder.in_channels, *pipe.grid.shape), y)
        operator = remainder.operator if keep_remainder else Measured(linear, noise)
        z = sample_posterior(
            *(denoise, spread, decoder, operator, y, draw(shape), times, pipe.process, draw),
            corrections=corrections,
            iterations=iterations,
            renew=remainder.learn if keep_remainder else None,
            progress=progress,
        )
        with torch.no_grad():
            volume = decoder(z)
            drawn = expected = volume
            if keep_remainder:
                residual = y - linear(volume)
                drawn, expected = volume + remainder.draw(residual, draw), volume + remainder.mean(residual)
            yield Drawn(drawn[0], expected[0], volume[0])
