"""Images that volumes are generated from: placed on the model's Grid, and the way from the answer back to their own voxels."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool3d

from ldm3d.conditions import ImageChannels
from ldm3d.config.conditions import Condition, DegradedCondition, ImageCondition, LabelsCondition
from ldm3d.covariates import CovariateSchema
from ldm3d.data.conditions import as_t1w, at, on_grid
from ldm3d.data.given import read_given
from ldm3d.data.placing import restore
from ldm3d.data.registration import placed as placed_scan
from ldm3d.data.seam import seamless
from ldm3d.description import Preparation
from ldm3d.diffusion.denoiser import ConditionalDenoiser, Denoiser
from ldm3d.diffusion.guidance import apart
from ldm3d.diffusion.measurement import kept
from ldm3d.errors import InputError, choose
from ldm3d.geometry import Grid, resample
from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import pad_to

KEPT = 8  # placed requests that are remembered
WHOLE = 0.999  # share of a block from which on it counts as measured
MOSTLY = 0.95  # share of a voxel, as wide as its point spread, from which on it counts as measured


@dataclass(frozen=True, eq=False)
class Own:
    """An image as it came.

    Attributes:
        scan, affine: (1, X', Y', Z') in its own voxels and intensities.
        info: of `ldm3d.data.placing.to_grid`, the way back.
        measured: (X', Y', Z'), which of its voxels count; None: all.
        source: its path; "" for an image without a file.
    """

    scan: NDArray
    affine: NDArray
    info: Mapping[str, Any]
    measured: NDArray | None
    source: str


@dataclass(frozen=True, eq=False)
class Given:
    """The images of one request, on the Grid.

    Attributes:
        volumes: by the condition's name, (C, X, Y, Z).
        measured: of conditions with voxels missing, by name: (1, X, Y, Z), 1 where a voxel is there.
        own: by name, the image as it came.
        told: of visits, by name: standardised covariates that they tell, (K,), NaN for unknown; see `told_of`.
    """

    volumes: Mapping[str, Tensor]
    measured: Mapping[str, Tensor]
    own: Mapping[str, Own]
    told: Mapping[str, Tensor] = field(default_factory=dict)


class Images:
    """The images of a series of requests.

    Args:
        conditions: of the model.
        place: number of a request -> its images.
        identity: JSON values that change with any of them.
        like: name of the condition on whose own voxels answers are given; None: on the Grid.
    """

    def __init__(
        self, conditions: Sequence[Condition], place: Callable[[int], Given], identity: Mapping[str, Any], like: str | None
    ):
        self.conditions, self.like = {each.name: each for each in conditions}, like
        if like is not None:
            choose("condition", like, self.conditions)
        self.identity = {**identity, **({"like": like} if like else {})}
        self.links: Mapping[str, str] = {}  # BIDS DatasetLinks that sources refer to
        self.named: Callable[[str], str] = str  # what sidecars call the file at a path
        self.of = lru_cache(KEPT)(place)
        self._encoded: dict[int, tuple[Tensor, ...]] = {}

    def encoded(self, numbers: Sequence[int], channels: ImageChannels, device: torch.device) -> tuple[Tensor, ...]:
        """(images, known, latents that stay, where they do), each (N, ..., x, y, z); one by one, for equal bits."""
        if len(self._encoded) > KEPT:
            self._encoded.clear()
        for number in numbers:
            if number not in self._encoded:
                self._encoded[number] = self._encode(self.of(number), channels, device)
        return tuple(torch.cat(parts) for parts in zip(*(self._encoded[number] for number in numbers)))

    @torch.no_grad()
    def _encode(self, given: Given, channels: ImageChannels, device: torch.device) -> tuple[Tensor, ...]:
        told = {name: numbers[None] for name, numbers in given.told.items()}
        raw = {
            name: channels.encoded(self.conditions[name], volume[None].to(device), told.get(name))
            for name, volume in given.volumes.items()
        }
        masks = {name: mask[None].to(device) for name, mask in given.measured.items()}
        images, known = channels.stacked(raw, {name: channels.measured(mask) for name, mask in masks.items()})
        stays, missing = torch.zeros_like(images[:, :1]), torch.ones_like(images[:, :1])
        if (name := self._hidden(given)) is not None:
            stays = channels.autoencoder.normalise(channels.latents(given.volumes[name][None].to(device)))
            missing = 1 - (channels.shares(masks[name]) >= WHOLE).float()
        # A block beside one with voxels missing was encoded with them in view
        return images.float(), known, stays.float(), 1 - max_pool3d(missing, 3, stride=1, padding=1)

    def denoiser(
        self,
        denoise: ConditionalDenoiser,
        asked: Conditions,
        pipeline: Any,
        numbers: Sequence[int],
        guidance: float,
        image_guidance: float,
        rescale: float,
        interval: tuple[float, float],
    ) -> Denoiser:
        """The denoiser of requests with these numbers, for latents as the U-Net of the pipeline takes them, padded.

        Args:
            denoise: the network.
            asked: covariates of each request.
            pipeline: whose channels and U-Net they are.
            numbers: of the requests in their series.
            guidance, image_guidance, rescale, interval: see `ldm3d.diffusion.guidance.apart`.
        """
        images, known, stays, where = self.encoded(numbers, pipeline.channels, pipeline.device)
        asked = replace(asked, images=images, known=known)
        guided = apart(denoise, asked, asked.open(images=False), asked.open(), guidance, image_guidance, rescale, interval)
        padded = pipeline.unet.padded_shape(where.shape[2:])
        return kept(guided, pad_to(stays, padded), pad_to(where, padded)) if where.any() else guided

    def _hidden(self, given: Given) -> str | None:
        """The condition of a request whose missing voxels are made, and whose others stay; None where there is none."""
        return next((name for name in given.measured if self.conditions[name].kind == "degraded"), None)

    def finished(self, number: int, volume: NDArray, cropped: Callable[[NDArray], NDArray]) -> NDArray:
        """A decoded volume (C, X, Y, Z) with what is known in it, on the Grid or on the voxels of `like`."""
        given = self.of(number)
        if (name := self._hidden(given)) is not None:
            mask = given.measured[name][0].numpy() >= WHOLE
            volume = seamless(volume, given.volumes[name].numpy(), mask)
        if self.like is None:
            return cropped(volume)
        own = given.own[self.like]
        if own.measured is not None:
            return seamless(restore(volume, own.info)[0], own.scan, own.measured)
        return restore(volume, own.info if self._same_contrast(self.like) else {**own.info, "low": 0.0, "high": 1.0})[0]

    def affine(self, number: int) -> NDArray | None:
        """Of the answer to a request; None: the Grid's."""
        return None if self.like is None else self.of(number).own[self.like].affine

    def sources(self, number: int) -> list[str]:
        """Paths of the images of a request."""
        return [self.named(own.source) for own in self.of(number).own.values() if own.source]

    def _same_contrast(self, name: str) -> bool:
        condition = self.conditions[name]
        return isinstance(condition, DegradedCondition) or (isinstance(condition, ImageCondition) and bool(condition.visit))


def for_all(pipeline: Any, images: Mapping[str, Any], like: str | None) -> Images:
    """One set of images for all requests; see `place`.

    Raises:
        InputError: what `place` raises; `like` is none of them.
    """
    if like and like not in images:
        given = ", ".join(images) or "none"
        raise InputError(f"like {like!r} is no condition that is given; given are: {given}. Name one of them")
    conditions, preparation = pipeline.conditions, pipeline.preparation or Preparation()
    placed = place(conditions, images, pipeline.grid, preparation, pipeline.skull_stripped)
    placed = replace(placed, told=told_of(conditions, images, pipeline.schema))
    for odd in odd_contrasts(pipeline, placed):
        warnings.warn(odd, stacklevel=3)
    return Images(conditions, lambda _: placed, {"given": identity_of(images)}, like)


def odd_contrasts(pipeline: Any, placed: Given) -> list[str]:
    """What is odd about images of a request that look unlike those of the training."""
    known = {name: each for name, each in pipeline.contrasts.items() if name in placed.volumes}
    found = (each.warning(name, placed.volumes[name].numpy(), pipeline.grid.spacing_mm) for name, each in known.items())
    return [each for each in found if each]


def place(
    conditions: Sequence[Condition], images: Mapping[str, Any], grid: Grid, preparation: Preparation, stripped: bool
) -> Given:
    """Bring the images of one request to the Grid: the first that is a scan as the training's scans were, the others with it.

    Args:
        conditions: of the model.
        images: by the condition's name a path or a nibabel image in any space; or a pair of it and a mask, which is above 0
            where the image was measured. Those of one subject and session share a world. A scan of another visit is placed
            by itself; it may be a pair with covariates, see `told_of`.
        grid, preparation, stripped: of the model.

    Raises:
        InputError: no image, an unknown condition, images of different subjects; what `read_given` and `to_grid` raise.
    """
    known = {each.name: each for each in conditions}
    for name in images:
        choose("condition", name, known)
    if not images:
        raise InputError(f"no condition is given; this model takes {', '.join(known) or 'none'}")
    read = {name: _read(name, known[name], image) for name, image in images.items()}
    _check_one_subject({name: source for name, (*_, source) in read.items()})
    anchor = min(read, key=lambda name: (isinstance(known[name], LabelsCondition), list(known).index(name)))
    volumes, measured, own = {}, {}, {}
    lies: Grid | None = None
    for name in (anchor, *(each for each in read if each != anchor)):
        condition, (scan, affine, mask, source) = known[name], read[name]
        try:
            alone = lies is None or (isinstance(condition, ImageCondition) and bool(condition.visit))
            if alone:
                shape = as_t1w(scan) if isinstance(condition, LabelsCondition) else scan
                volume, info = placed_scan(shape, affine, grid, preparation.percentiles, preparation.registration, stripped)
                lies = lies or at(grid, info)
            if not alone or isinstance(condition, LabelsCondition):
                assert lies is not None
                volume, info = on_grid(condition, (scan, affine), lies, preparation.percentiles)
        except InputError as error:
            raise InputError(f"{name}: {source or 'the image'}: {error}") from None
        volumes[name] = torch.from_numpy(volume)
        inside = None
        if mask is not None:
            voxels, of_mask = mask
            inside = resample(voxels.astype(np.float32), of_mask, affine, scan.shape[1:])[0] > 0.5
            there = resample(inside[None].astype(np.float32), affine, np.array(info["grid_affine"]), grid.shape)
            outside = resample(np.ones_like(scan), affine, np.array(info["grid_affine"]), grid.shape) < MOSTLY
            measured[name] = torch.from_numpy(np.where(outside, 1.0, there >= MOSTLY).astype(np.float32))
            volumes[name] = volumes[name] * measured[name]
        own[name] = Own(scan, affine, info, inside, source)
    return Given(volumes, measured, own)


def _read(name: str, condition: Condition, image: Any) -> tuple[NDArray, NDArray, tuple[NDArray, NDArray] | None, str]:
    """(voxels, affine, mask with its affine or None, path or "") of an image."""
    image, mask = image if isinstance(image, tuple) else (image, None)
    mask = None if isinstance(mask, Mapping) else mask  # covariates of a visit
    hides = isinstance(condition, DegradedCondition) and condition.hides
    if hides and mask is None:
        raise InputError(
            f"{name}: say which voxels were measured: give (image, mask) (generate: --measured {name}=MASK.nii.gz)"
        )
    if mask is not None and not hides:
        raise InputError(f"{name}: a mask of what was measured goes with conditions that hide voxels; leave it out")
    try:
        scan, affine, source = read_given(image)
        if isinstance(condition, LabelsCondition):
            scan = np.rint(scan).astype(np.int32)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    path = source if isinstance(image, str | Path) or Path(source).is_file() else ""
    return scan, affine, None if mask is None else read_given(mask)[:2], path


def told_of(conditions: Sequence[Condition], images: Mapping[str, Any], schema: CovariateSchema) -> dict[str, Tensor]:
    """What visits tell, standardised, by the condition's name; those that are not given are NaN.

    Args:
        conditions: of the model.
        images: as `place` takes them; a visit's may be a pair of an image and its covariates, {"age": 63}.
        schema: of the model.

    Raises:
        InputError: covariates that the condition does not tell, or a value that is none.
    """
    told = {}
    for condition in conditions:
        pair = images.get(condition.name)
        values = pair[1] if isinstance(pair, tuple) and isinstance(pair[1], Mapping) else {}
        names = condition.tells if isinstance(condition, ImageCondition) else ()
        if strangers := [name for name in values if name not in names]:
            tells = ", ".join(names) or "no covariates"
            raise InputError(f"{condition.name}: it tells {tells}, not {strangers[0]}; leave that out")
        if names and condition.name in images:
            value, known = schema.encode([values])[0].unbind(-1)  # (K,) each
            of = [schema.names.index(name) for name in names]
            told[condition.name] = torch.where(known > 0, value, torch.nan)[of]
    return told


def _check_one_subject(sources: Mapping[str, str]) -> None:
    """Raise InputError where names of files say that they are of different subjects."""
    subjects = {
        name: found[0] for name, path in sources.items() if (found := re.findall(r"sub-([A-Za-z0-9]+)", Path(path).name))
    }
    if len(set(subjects.values())) > 1:
        listed = ", ".join(f"{name} of sub-{subject}" for name, subject in subjects.items())
        raise InputError(f"the conditions are of different subjects: {listed}; give those of one")


def identity_of(images: Mapping[str, Any]) -> str:
    """16 hex digits of images in memory or in files, which change with any voxel, affine or mask."""
    digest = hashlib.sha256()
    for name in sorted(images):
        pair = images[name] if isinstance(images[name], tuple) else (images[name],)
        for each in pair:
            if isinstance(each, Mapping):
                digest.update(json.dumps([name, {key: str(value) for key, value in each.items()}], sort_keys=True).encode())
                continue
            voxels, affine, _ = read_given(each)
            digest.update(json.dumps([name, voxels.shape, np.round(affine, 4).tolist()]).encode())
            digest.update(np.ascontiguousarray(voxels).tobytes())
    return digest.hexdigest()[:16]
