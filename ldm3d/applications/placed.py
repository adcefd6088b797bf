"""A scan before the model and back: on the Grid in [0, 1], as a latent, and on its own voxels in its own intensities again.

Legend: v the scan on the Grid, D(z) the decoded latent, w any other volume on the Grid, all (1, C, X, Y, Z) in [0, 1].
"""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import ldm3d
from ldm3d.config.data import MNI152, RegistrationConfig
from ldm3d.data import registration
from ldm3d.data.extraction import tool_of_model
from ldm3d.data.given import read_given
from ldm3d.data.nifti import to_image
from ldm3d.data.placing import restore
from ldm3d.data.removed import Removed, remove
from ldm3d.description import Preparation
from ldm3d.errors import InputError
from ldm3d.geometry import WORLD
from ldm3d.pipeline import Pipeline


@dataclass(frozen=True, eq=False)
class PlacedScan:
    """A scan as a model sees it, and the way back.

    Attributes:
        pipe: the model.
        name: what messages call the scan: its path, where it has one.
        scan: (1, X', Y', Z') float32, its own voxels, axes and intensities.
        seen: like it, what of it was placed: without skull and bias field, where the model's scans were prepared so.
        removed: what it was relieved of.
        affine: (4, 4) of `scan` to RAS+ mm.
        info: of `ldm3d.data.placing.to_grid`, in the scan's own world: how it lies on the Grid, which intensities
            became 0 and 1.
        volume: v, float32 on the pipeline's device.
        z: the normalised latent (1, c, x, y, z) of v, the posterior's mean; float32 on the pipeline's device, unpadded.
    """

    pipe: Pipeline
    name: str
    scan: NDArray
    seen: NDArray
    removed: Removed
    affine: NDArray
    info: Mapping[str, Any]
    volume: Tensor
    z: Tensor

    @functools.cached_property
    def reconstruction(self) -> Tensor:
        """D(z): the scan as far as the autoencoder holds it, (1, C, X, Y, Z) in [0, 1]."""
        with torch.no_grad():
            return self.pipe.decode(self.z)

    def back(self, volume: Tensor, keep_residual: bool = True, reference: Tensor | None = None) -> NDArray:
        """A volume on the Grid on the scan's own voxels, in the scan's own intensities: float32 (1, X', Y', Z').

        With the residual kept this is scan + R(w - D(z)), where R resamples from the Grid to the scan: what the Grid or the
        autoencoder cannot hold (finer detail, what lies outside of the Grid, intensities beyond its range) is the scan's
        own, and w = D(z) gives the scan back exactly. An edge that w moves leaves the finest part of its old place behind.
        Where a skull was taken away the scan stays as it is; a bias field that was divided out multiplies the change.

        Args:
            volume: w, (1, C, X, Y, Z) or (C, X, Y, Z) in [0, 1].
            keep_residual: False: R(w) alone, with background where the Grid does not reach.
            reference: what counts as unchanged, like w; None for D(z). `self.volume` where w did not go through the
                autoencoder.
        """
        if not keep_residual:
            return self.removed.put_back(restore(_as_array(volume), self.info)[0], self.affine, self.scan)
        change = _as_array(volume) - _as_array(self.reconstruction if reference is None else reference)
        return self.scan + self.back_change(change)

    def back_change(self, change: NDArray) -> NDArray:
        """A change (1, X, Y, Z) of `volume`, or a deviation of it, as a change of the scan, (1, X', Y', Z')."""
        moved, _ = restore(change, {**self.info, "low": 0.0, "high": self.info["high"] - self.info["low"]})
        return self.removed.put_back(moved, self.affine, None)

    def image(self, volume: Tensor, keep_residual: bool = True, reference: Tensor | None = None) -> Any:
        """`back` as a nibabel image that is marked as derived."""
        return to_image(self.back(volume, keep_residual, reference), self.affine, self.mark)

    @property
    def mark(self) -> str:
        """What the header of every image that is made from the scan says."""
        return f"DERIVED ldm3d {ldm3d.__version__} model {self.pipe.model_hash}"


def place(pipe: Pipeline, image: Any, register: RegistrationConfig | bool | None = None, stripped: bool = False) -> PlacedScan:
    """Bring a scan to a model's Grid as the scans of its training were, and encode it.

    `pipe.preparation` says which steps these were, for models of this version on: brain extraction, correction of the bias
    field, registration.

    A model whose training scans were registered to a template needs that of every other scan: it has never seen a brain that
    lies otherwise. The scan itself is not resampled on its way back: `info` is in its own world.

    Args:
        pipe: the model.
        image: a path (NIfTI, .mgz) or a nibabel image, in any orientation; without skull if `pipe.skull_stripped`.
        register: to what, before it is placed. None: as the training's were, where that is known, else not at all. False:
            not at all, because the scan lies in that space already. True: rigidly to MNI152.
        stripped: the scan has no skull any more, so no brain is extracted.

    Raises:
        InputError: an unreadable scan, see `read_volume`; one that cannot be placed, see `to_grid`, or registered; no
            program that extracts its brain; a model of volumes with several channels.
    """
    scan, affine, name = read_given(image)
    channels = pipe.autoencoder.in_channels
    if channels != 1:
        of = " and ".join(pipe.suffixes) if len(pipe.suffixes) > 1 else f"{channels} channels"
        raise InputError(f"this model is of volumes of {of}, and {name} is one image; take a model of {pipe.suffix} alone")
    known = pipe.preparation or Preparation()
    wanted = _wanted(pipe, register)
    tool = None if stripped else tool_of_model(known.brain_extraction)
    try:
        # An image in memory has no file of these voxels
        path = Path(image) if isinstance(image, str | Path) else Path("image")
        seen, removed, _ = remove(scan, affine, path, None, tool, bool(known.bias_correction))
        volume, info = registration.placed(seen, affine, pipe.grid, known.percentiles, wanted, pipe.skull_stripped)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    on_grid = torch.from_numpy(volume)[None].to(pipe.device)
    with torch.no_grad():
        moments = pipe.autoencoder.encode(on_grid.to(pipe.dtype)).float()
        z = pipe.autoencoder.normalise(pipe.autoencoder.sample(moments)).float()
    return PlacedScan(pipe, name, scan, seen, removed, affine, info, on_grid, z)


def _wanted(pipe: Pipeline, register: RegistrationConfig | bool | None) -> RegistrationConfig | None:
    """The registration that `place` was asked for."""
    if isinstance(register, RegistrationConfig):
        return register
    if register is not None:
        return RegistrationConfig() if register else None
    wanted = pipe.preparation.registration if pipe.preparation else None
    if wanted and wanted.to != MNI152:
        raise InputError(
            f"the model's scans were registered ({wanted.kind}) to {wanted.to}, a file that it does not come with; give it as "
            "RegistrationConfig(to=FILE), or register=False for a scan that lies in its space"
        )
    if pipe.preparation is None and pipe.grid.place == WORLD:
        warnings.warn(
            "the model does not say whether its scans were registered, and its grid lies in a template's space: this scan is "
            "taken to lie there already",
            stacklevel=4,
        )
    return wanted


def _as_array(volume: Tensor) -> NDArray:
    array: NDArray = volume.detach().float().cpu().numpy()
    return array[0] if array.ndim == 5 else np.asarray(array)
