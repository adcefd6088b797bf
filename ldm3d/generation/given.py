"""Images that volumes are generated from: placed on the model's Grid, and the way from the answer back to their own voxels."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool3d

from ldm3d.conditions import ImageChannels
from ldm3d.config.conditions import Condition, DegradedCondition, ImageCondition
from ldm3d.data.given import read_given
from ldm3d.data.placing import restore
from ldm3d.data.removed import Removed
from ldm3d.data.seam import seamless
from ldm3d.description import Preparation
from ldm3d.diffusion.denoiser import ConditionalDenoiser, Denoiser
from ldm3d.diffusion.guidance import apart
from ldm3d.diffusion.measurement import kept
from ldm3d.errors import InputError, choose
from ldm3d.generation.given_scans import Given, place, told_of
from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import pad_to

KEPT = 8  # placed requests that are remembered
WHOLE = 0.999  # share of a block from which on it counts as measured


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
        for measurement in given.coarse.values():
            volume = measurement.agreed(volume)
        if self.like is None:
            return cropped(volume)
        own = given.own[self.like]
        if own.measured is not None:
            made = own.removed.put_back(restore(volume, own.info)[0], own.affine, own.scan)
            return seamless(made, own.scan, own.measured)
        if self._same_contrast(self.like):
            return own.removed.put_back(restore(volume, own.info)[0], own.affine, None)
        made = restore(volume, {**own.info, "low": 0.0, "high": 1.0})[0]
        return Removed(own.removed.kept).put_back(made, own.affine, None)  # its bias field is not another contrast's

    def affine(self, number: int) -> NDArray | None:
        """Of the answer to a request; None: the Grid's."""
        return None if self.like is None else self.of(number).own[self.like].affine

    def sources(self, number: int) -> list[str]:
        """Paths of the images of a request."""
        return [self.named(own.source) for own in self.of(number).own.values() if own.source]

    def _same_contrast(self, name: str) -> bool:
        condition = self.conditions[name]
        return isinstance(condition, DegradedCondition) or (isinstance(condition, ImageCondition) and bool(condition.visit))


def for_all(pipeline: Any, images: Mapping[str, Any], like: str | None, stripped: bool = False) -> Images:
    """One set of images for all requests; see `place`, which calls `stripped` `has_no_skull`.

    Raises:
        InputError: what `place` raises; `like` is none of them.
    """
    if like and like not in images:
        given = ", ".join(images) or "none"
        raise InputError(f"like {like!r} is no condition that is given; given are: {given}. Name one of them")
    conditions, preparation = pipeline.conditions, pipeline.preparation or Preparation()
    placed = place(conditions, images, pipeline.grid, preparation, pipeline.skull_stripped, stripped)
    placed = replace(placed, told=told_of(conditions, images, pipeline.schema))
    for odd in odd_contrasts(pipeline, placed):
        warnings.warn(odd, stacklevel=3)
    identity = {"given": identity_of(images), **({"stripped": True} if stripped else {})}
    return Images(conditions, lambda _: placed, identity, like)


def odd_contrasts(pipeline: Any, placed: Given) -> list[str]:
    """What is odd about images of a request that look unlike those of the training."""
    known = {name: each for name, each in pipeline.contrasts.items() if name in placed.volumes}
    found = (each.warning(name, placed.volumes[name].numpy(), pipeline.grid.spacing_mm) for name, each in known.items())
    return [each for each in found if each]


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
