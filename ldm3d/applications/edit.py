"""Counterfactuals: the scan of a person as it would be at another age, or with other covariates.

The edited latent is the scan's own plus a difference of two samples that share everything but the covariates:

    x' = x + S(z, c') - S(z, c),    z one of three starts for the same sampler S,

so that x' = x where nothing is changed, and errors of the sampler cancel. Starts, by `method`:

- "ode": z is what the sampler's own steps lead from to x under c (DDIM inversion, Song et al. 2021; exact by fixed-point
  iteration, see `ldm3d.diffusion.inversion.invert_steps`). All that c does not say stays in z: identity, pose, folding.
- "noise": z = alpha x + sigma e, with the same noise e for both samples (SDEdit, Meng et al. 2022, in pairs): several draws of
  e say how sure the change is. The mean of their latents is the stabilisation of BrLP (Puglisi et al. 2024).
- "linear": no sampling: S(c) = E[x | c] by the regression that the model starts with (`ldm3d.start`). The same change for
  everybody: what an edit has to beat.

Covariates that follow from a changed one (`follows` in a config: ventricles from age) are changed as they are among people,
from the value that is given or measured on the scan: abduction, action and prediction of a structural causal model (Pawlowski
et al. 2020). Left open they would follow, too, but by nearly the same amount in everybody: where a Gaussian denoises, it moves
all alike.

Legend: x normalised latent of the scan, (1, c, x, y, z); c, c' covariates; t noise level; N samples, T targets.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.applications.changes import targets_of, with_followers
from ldm3d.applications.placed import PlacedScan, place
from ldm3d.config.data import RegistrationConfig
from ldm3d.covariates import Value
from ldm3d.diffusion.inversion import invert_steps
from ldm3d.diffusion.ode import ode_share
from ldm3d.diffusion.samplers import follow, recommended_spacing
from ldm3d.errors import InputError, choose
from ldm3d.models.unet import cut_to, pad_to
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator
from ldm3d.rulers.volumetry import Measure, apply_measure, load_measure

METHODS = ("ode", "noise", "linear")
STRENGTH = {"ode": 1.0, "noise": 0.9}  # by default
SAMPLER = "heun"
VOLUMETRY = "ldm3d.rulers.volumetry:measure_volumes"

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How an edit is made, see `edit`; checked.

    Raises:
        InputError: out of range, or a method that cannot draw several samples.
    """

    method: str
    strength: float
    steps: int
    guidance: float
    samples: int
    averaged: bool
    seed: int

    def __post_init__(self) -> None:
        choose("method", self.method, METHODS)
        if not 0 < self.strength <= 1 or self.samples < 1 or self.steps < 1 or self.guidance < 0:
            raise InputError(
                f"strength {self.strength:g}, samples {self.samples}, steps {self.steps}, guidance {self.guidance:g}: "
                "strength must be above 0 and at most 1, samples and steps at least 1, guidance at least 0"
            )
        if self.samples > 1 and self.method != "noise":
            raise InputError(
                f"{self.samples} samples by the method {self.method}: it draws no noise, so all would be the same; use noise"
            )


@dataclass(frozen=True, eq=False)
class Edit:
    """Edited latents of one scan.

    Attributes:
        placed: the scan.
        source: its covariates; None where open.
        targets: covariates of the T edits.
        latents: (T, N, c, x, y, z), normalised; N = 1 for a single sample or an average.
        settings: how.
    """

    placed: PlacedScan
    source: dict[str, Value]
    targets: list[dict[str, Value]]
    latents: Tensor
    settings: Settings

    def change(self, target: int = 0) -> tuple[Tensor, Tensor | None]:
        """Mean of D(x') - D(x) over samples, (1, C, X, Y, Z) on the Grid, in [-1, 1]; its deviation, None for one sample."""
        with torch.no_grad():
            volumes = [self.placed.pipe.decode(latent[None]) for latent in self.latents[target]]
        changes = torch.cat(volumes) - self.placed.reconstruction
        spread = changes.std(dim=0, keepdim=True) if len(changes) > 1 else None
        return changes.mean(dim=0, keepdim=True), spread

    def volume(self, target: int = 0) -> Tensor:
        """The edited scan on the Grid, (1, C, X, Y, Z) in [0, 1], with what the autoencoder cannot hold of it."""
        return (self.placed.volume + self.change(target)[0]).clamp(0, 1)

    def image(self, target: int = 0) -> Any:
        """The edited scan on its own voxels, in its own intensities: a nibabel image, marked as derived."""
        return self.placed.image(self.placed.reconstruction + self.change(target)[0])

    def back(self, target: int = 0) -> NDArray:
        """The same as float32 (1, X', Y', Z')."""
        return self.placed.back(self.placed.reconstruction + self.change(target)[0])


def edit(
    pipe: Pipeline,
    image: Any,
    source: Mapping[str, Any] | None = None,
    to: Mapping[str, Any] | None = None,
    *,
    method: str | None = None,
    strength: float | None = None,
    samples: int = 1,
    average: bool = False,
    steps: int = 20,
    guidance: float = 1.0,
    seed: int = 0,
    hold: Sequence[str] = (),
    measure: str | Measure | None = VOLUMETRY,
    register: RegistrationConfig | bool | None = None,
    stripped: bool = False,
    progress: Report | None = None,
    **changes: Any,
) -> Edit:
    """Change covariates of a scan, and let all else stay.

    >>> pipe.edit("scan.nii.gz", {"age": 62, "sex": "F"}, age="+10").image()

    What `source` gives and `to` does not change is held, unless it follows from what changes: the model's schema says what
    does, and how.

    Args:
        pipe: the model.
        image: see `ldm3d.applications.placed.place`; or what that returned.
        source: the scan's own covariates; those left out are left open.
        to: the changes, see `ldm3d.applications.changes.targets_of`: 72, "+10", "50:90:5". Also as `changes`, where the
            covariate is not called like an argument.
        method: see the top of this file; None: "ode" for one sample, "noise" for several.
        strength: the noise level from which is sampled, sigma / (alpha + sigma), above 0 to 1: 1 is pure noise. None: 1 for
            "ode", 0.9 for "noise". At low levels only fine structure can change, and ventricles hardly do.
        samples: N, draws of the noise; more than one for "noise" alone.
        average: one latent, the mean of the samples'. It is smoother than any of them.
        steps: of the sampler over all noise levels.
        guidance: of the samples (not of the inversion), see `classifier_free`; more makes the change larger, not truer.
        seed: of the noise; sample i is the same among any number.
        hold: covariates that stay, although they follow from changed ones.
        measure: finds what follows and is not in `source` on the scan, see `ldm3d.rulers.volumetry.load_measure`; None: it
            stays open.
        register, stripped: see `place`.
        progress: called with the numbers of sampled latents that are done and that there will be, N (T + 1).

    Raises:
        InputError: what `place`, `targets_of` and `Pipeline.parse` raise; a method that does not go with the model or with
            several samples; strength, steps or samples out of range.
    """
    name = method or ("ode" if samples == 1 else "noise")
    level = STRENGTH.get(name, 1.0) if strength is None else strength
    settings = Settings(name, level, steps, guidance, samples, average, seed)
    if name == "linear" and pipe.start is None:
        raise InputError("the method linear needs a model that was trained with diffusion.start; use ode or noise")
    pipe.check_sampling(pipe.sampling.replace(guidance=guidance))
    (own,) = pipe.schema.parse_all([dict(source or {})])
    asked = {**(to or {}), **changes}
    targets = pipe.schema.parse_all(targets_of(pipe.schema, own, asked))
    held = {pipe.schema[name].name for name in (*hold, *asked)}
    placed = image if isinstance(image, PlacedScan) else place(pipe, image, register, stripped)
    function = load_measure(measure) if isinstance(measure, str) else measure
    own, targets = with_followers(pipe.schema, own, targets, held, functools.partial(_measured, placed, function))
    pipe.schema.warn_beyond_seen(targets)
    with torch.no_grad():
        if name == "linear":
            latents = _linear(pipe, placed.z, own, targets)
        else:
            latents = _sampled(pipe, placed.z, own, targets, settings, progress)
    if average:
        latents = latents.mean(dim=1, keepdim=True)
    return Edit(placed, own, targets, latents, settings)


def _measured(placed: PlacedScan, measure: Measure | None) -> Mapping[str, float]:
    return apply_measure(measure, placed.volume[0].cpu().numpy(), placed.pipe.grid.spacing_mm) if measure else {}


def _linear(pipe: Pipeline, x: Tensor, own: Mapping[str, Value], targets: Sequence[Mapping[str, Value]]) -> Tensor:
    """E[x | c'] - E[x | c] added to x. What is open in one and given in the other is integrated out there."""
    assert pipe.start is not None
    means = pipe.start.expected(pipe.schema.encode([own, *targets]).to(x.device))
    return (x + cut_to(means[1:] - means[:1], x.shape[2:]).to(x))[:, None]


def _sampled(
    pipe: Pipeline,
    x: Tensor,
    own: Mapping[str, Value],
    targets: Sequence[Mapping[str, Value]],
    how: Settings,
    progress: Report | None,
) -> Tensor:
    """x' for all targets and samples, (T, N, c, x, y, z)."""
    process, shape = pipe.process, x.shape[2:]
    padded = pad_to(x, pipe.unet.padded_shape(shape))
    times = process.times(how.steps, recommended_spacing(SAMPLER, process))
    times = times[min(range(how.steps), key=lambda k: abs(ode_share(process, times[k]) - how.strength)) :]
    if how.method == "ode":
        starts = [invert_steps(pipe.denoiser([own]), padded, process, times, name=SAMPLER)]
    else:
        draws = (torch.randn(padded.shape, generator=generator("edit", how.seed, i)).to(padded) for i in range(how.samples))
        starts = [process.add_noise(padded, noise, times[0]) for noise in draws]
    done = 0

    def sampled(z: Tensor, row: Mapping[str, Value]) -> Tensor:
        nonlocal done
        denoise = pipe.denoiser([row], how.guidance)
        found = cut_to(follow(SAMPLER, denoise, z, times, process), shape)
        done += 1
        if progress:
            progress(done, len(starts) * (len(targets) + 1))
        return found

    edited = []
    for z in starts:  # one by one: a batch would not be faster on a CPU, and would change the last bits
        unchanged = sampled(z, own)
        edited.append([x + (sampled(z, row) - unchanged) for row in targets])
    return torch.stack([torch.cat(row) for row in zip(*edited)])
