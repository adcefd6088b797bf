"""A scan that a caller has: a path, or an image that is in memory already."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ldm3d.data.headers import check_affine
from ldm3d.data.nifti import MAX_VOXELS, fill_background, read_volume
from ldm3d.errors import InputError


def read_given(image: Any) -> tuple[NDArray, NDArray, str]:
    """One scan as float32 (1, X, Y, Z) in its own order of axes, its affine (4, 4) to RAS+ mm, and what messages call it.

    Args:
        image: a path of NIfTI or .mgz; or a nibabel image, which need not have a file.

    Raises:
        InputError: what `read_volume` raises.
    """
    if isinstance(image, str | Path):
        return (*read_volume(image), str(image))
    if not hasattr(image, "dataobj") or not hasattr(image, "affine"):
        raise InputError(f"a scan is a path or a nibabel image, not {type(image).__name__}")
    name = Path(cast(Any, getattr(image, "get_filename", lambda: None)()) or "the image")
    if image.affine is None:
        raise InputError(f"{name}: has no affine, so nothing says how the head lies; give it one")
    shape = tuple(int(n) for n in image.shape)
    if len(shape) < 3 or min(shape) < 1 or any(n > 1 for n in shape[3:]) or math.prod(shape) > MAX_VOXELS:
        raise InputError(f"{name}: has shape {shape}; give one volume (X, Y, Z) of at most {MAX_VOXELS:,} voxels")
    affine = check_affine(name, image.affine)
    try:
        stored = np.asarray(image.dataobj)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{name}: its voxels cannot be read ({error}); copy or convert it again") from None
    if stored.dtype.kind not in "biuf":
        raise InputError(f"{name}: has voxels of type {stored.dtype}; give magnitudes or grey values")
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 becomes inf, which is reported below
        volume = np.array(stored, dtype=np.float32).reshape(shape[:3])
    if not np.isfinite(volume).all():
        fill_background(name, volume)
    if volume.min() == volume.max():
        raise InputError(f"{name}: every voxel is {volume.flat[0]:g}; there is no image in it")
    return volume[None], affine, str(name)
