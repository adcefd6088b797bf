"""NIfTI files in and out, and FreeSurfer's .mgz in; the only place that knows nibabel, with `ldm3d.data.headers`."""

import gzip
import math
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError
from numpy.typing import DTypeLike, NDArray
from scipy import ndimage

from ldm3d.data.headers import files_of, memory, one_line, read_header
from ldm3d.errors import InputError
from ldm3d.files import replacing

MAX_VOXELS = 2**30  # 1024^3, 4 GiB as float32: beyond any whole-brain scan


def read_volume(path: Path | str, most: int = MAX_VOXELS) -> tuple[NDArray, NDArray]:
    """One scan as float32 (1, X, Y, Z) in the file's own order of axes, and its affine (4, 4) to RAS+ mm.

    Intensities carry the header's scale factor. A file of shape (X, Y, Z, 1) is one volume. NaN around the head, as SPM, CAT12
    and ANTs write it, becomes 0, with a warning. A file of more than `most` voxels is not read.

    Raises:
        InputError: the file is missing, no NIfTI (or .mgz) or cut short; several volumes; no or too many voxels; complex or
            colour values; infinite or all-equal voxels, NaN that voxels with values enclose; an affine that maps voxels
            nowhere, or sform and qform that mirror each other; too little memory.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, not a NIfTI file' if path.is_dir() else 'no such file'}")
    header, affine, shape, dtype = read_header(path, most)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 becomes inf, which is reported below
            # No memory map: a file that shrinks meanwhile would kill the process
            volume = np.asarray(ArrayProxy(str(files_of(path)[-1]), header, mmap=False), dtype=np.float32).reshape(shape)
    except MemoryError:
        raise InputError(f"{path}: {memory(shape, dtype)}, more than there is; read it where there is more") from None
    except (OSError, EOFError, zlib.error, ValueError, HeaderDataError) as error:
        raise InputError(
            f"{path}: cut short or damaged, its {math.prod(shape):,} voxels of type {dtype} cannot be read "
            f"({one_line(error)}); copy or convert it again"
        ) from None
    if not np.isfinite(volume).all():
        fill_background(path, volume)
    if volume.min() == volume.max():
        raise InputError(f"{path}: every voxel is {volume.flat[0]:g}; there is no image in it")
    return volume[None], affine


def fill_background(path: Path, volume: NDArray) -> None:
    """Set NaN that reaches the faces of (X, Y, Z) to 0, in place; an InputError for any other, and where nothing is left."""
    nan = np.isnan(volume)
    parts, _ = ndimage.label(nan)
    faces = [np.take(parts, end, axis) for axis in range(3) for end in (0, -1)]
    outside = np.unique(np.concatenate([face.ravel() for face in faces]))
    background = np.isin(parts, outside[outside > 0])
    bad = int(np.isinf(volume).sum() + nan.sum() - background.sum())
    if bad or background.all():
        raise InputError(
            f"{path}: {bad or volume.size:,} of {volume.size:,} voxels are NaN or infinite and not the background around the "
            "head; replace them and run again"
        )
    volume[background] = 0
    warnings.warn(
        f"{path}: NaN in {background.mean():.0%} of its voxels, around the head, is taken as background", stacklevel=3
    )


def in_ras_order(volume: NDArray, affine: NDArray) -> NDArray:
    """The voxels with axes that run mostly to the right, the front and the top, in whatever order a file has them."""
    turned = nibabel.orientations.apply_orientation(np.moveaxis(volume, 0, -1), nibabel.orientations.io_orientation(affine))
    return np.moveaxis(turned, -1, 0)


def write_volume(
    path: Path | str, array: NDArray, affine: NDArray, description: str = "", dtype: DTypeLike | None = None
) -> None:
    """Write one volume as .nii.gz; the file appears whole or not at all.

    Args:
        path: ends in .nii.gz; its folder is made where it is missing.
        array, affine, description: see `to_image`.
        dtype: of the voxels on disk; None for `to_image`'s. Fractions in an integer type get a scale factor.
    """
    path = Path(path)
    if not path.name.endswith(".nii.gz"):
        raise ValueError(f"{path}: volumes are written as .nii.gz")
    image = to_image(array, affine, description)
    if dtype is not None:
        image.set_data_dtype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        nibabel.save(image, unfinished)


def pack_volume(array: NDArray, affine: NDArray, description: str = "") -> bytes:
    """The content of a .nii.gz file; arguments as in `to_image`.

    The same voxels are the same bytes: gzip writes no time. Level 1: for generated volumes, 9 saves a seventh of the space and
    takes 40 times as long.
    """
    return gzip.compress(to_image(array, affine, description).to_bytes(), compresslevel=1, mtime=0)


def unpack_volume(content: bytes) -> NDArray:
    """The volume of `pack_volume`."""
    return from_image(nibabel.Nifti1Image.from_bytes(gzip.decompress(content)))


def to_image(array: NDArray, affine: NDArray, description: str = "") -> nibabel.Nifti1Image:
    """A volume as nibabel image in mm, its affine stored as qform and sform (both "scanner").

    Args:
        array: (C, X, Y, Z); kept as float32, or as integers of at most 32 bits. One channel makes an image (X, Y, Z), several
            one (X, Y, Z, C).
        affine: (4, 4) to RAS+ mm.
        description: at most 80 bytes of UTF-8, the room a NIfTI header has.
    """
    array, affine = np.asarray(array), np.asarray(affine, dtype=np.float64)
    if array.ndim != 4:
        raise ValueError(f"a volume is (C, X, Y, Z), got shape {array.shape}")
    if len(description.encode()) > 80:
        raise ValueError(f"description has {len(description.encode())} bytes, a NIfTI header holds 80: {description!r}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        array = array.astype(np.int32)  # few programs read 64-bit integers
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
    image = nibabel.Nifti1Image(np.moveaxis(array, 0, -1) if len(array) > 1 else array[0], affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()
    return image


def from_image(image: nibabel.Nifti1Image) -> NDArray:
    """The volume (C, X, Y, Z) of `to_image`."""
    array = np.asarray(image.dataobj)
    return array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)
