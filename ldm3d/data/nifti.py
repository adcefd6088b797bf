"""NIfTI files in and out; the only place that knows nibabel.

What is read is checked first from the header, so that a file which claims a terabyte fails before memory is taken.
"""

import math
import os
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import DTypeLike, NDArray

from ldm3d.errors import InputError

MAX_VOXELS = 2**30  # 1024^3, 4 GiB as float32: beyond any whole-brain scan
# deflate cannot shrink more than 1032 : 1 (zlib's technical details); some room for the file's own header
_MAX_GZIP_RATIO = 1100
_MM = {"meter": 1000.0, "micron": 0.001}


def read_volume(path: Path | str) -> tuple[NDArray, NDArray]:
    """One scan as float32 (X, Y, Z) in the file's own order of axes, and its affine (4, 4) to RAS+ mm.

    Intensities carry the header's scale factor. (X, Y, Z, 1) counts as one volume.

    Raises:
        InputError: the file is missing, no NIfTI or cut short; several volumes; no or too many voxels; complex or
            colour values; NaN, infinite or all-equal voxels; an affine that maps voxels nowhere.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, not a NIfTI file' if path.is_dir() else 'no such file'}")
    image = _open(path)
    shape, dtype = _check_header(path, image)
    affine = _check_affine(path, image)
    try:
        with np.errstate(over="ignore"):  # beyond float32 becomes inf, which is reported below
            volume = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged")).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(
            f"{path}: cut short or damaged, its {math.prod(shape):,} voxels of type {dtype} cannot be read "
            f"({_one_line(error)}); copy or convert it again"
        ) from None
    finite = np.isfinite(volume)
    if not finite.all():
        raise InputError(
            f"{path}: {volume.size - int(finite.sum()):,} of {volume.size:,} voxels are NaN or infinite; "
            "replace them (by 0 in the background) and run again"
        )
    if volume.min() == volume.max():
        raise InputError(f"{path}: every voxel is {volume.flat[0]:g}; there is no image in it")
    return volume, affine


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
    # Same folder, so that the last step is a rename; nibabel chooses the format by the end of the name
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        nibabel.save(image, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def to_image(array: NDArray, affine: NDArray, description: str = "") -> nibabel.Nifti1Image:
    """A volume as nibabel image in mm, its affine stored as qform and sform (both "scanner").

    Args:
        array: (X, Y, Z); kept as float32, or as integers of at most 32 bits.
        affine: (4, 4) to RAS+ mm.
        description: at most 80 bytes of UTF-8, the room a NIfTI header has.
    """
    array, affine = np.asarray(array), np.asarray(affine, dtype=np.float64)
    if array.ndim != 3:
        raise ValueError(f"a volume is (X, Y, Z), got shape {array.shape}")
    if len(description.encode()) > 80:
        raise ValueError(f"description has {len(description.encode())} bytes, a NIfTI header holds 80: {description!r}")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        array = array.astype(np.int32)  # few programs read 64-bit integers
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
    image = nibabel.Nifti1Image(array, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()
    return image


def _open(path: Path) -> nibabel.Nifti1Pair:
    """The header, as an image whose voxels are still on disk."""
    try:
        image = nibabel.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read as NIfTI ({_one_line(error)})") from None
    if not isinstance(image, nibabel.Nifti1Pair):  # what the other NIfTI classes come from
        raise InputError(f"{path}: is {type(image).__name__}, not NIfTI; convert it with mri_convert or nibabel")
    return image


def _check_header(path: Path, image: nibabel.Nifti1Pair) -> tuple[tuple[int, ...], np.dtype]:
    """Shape (X, Y, Z) and voxel type, once they are known to be usable."""
    shape, dtype = tuple(int(n) for n in image.shape), image.get_data_dtype()
    if any(n <= 0 for n in shape) or not shape:
        raise InputError(f"{path}: has shape {shape}, so no voxels at all")
    if len(shape) < 3:
        raise InputError(f"{path}: has shape {shape}; a volume has three axes")
    if any(n > 1 for n in shape[3:]):
        raise InputError(
            f"{path}: has shape {shape}, {math.prod(shape[3:])} volumes in one file; give one volume (X, Y, Z) per scan"
        )
    if dtype.kind not in "iuf":
        what = "complex" if dtype.kind == "c" else "colour" if dtype.names else str(dtype)
        raise InputError(f"{path}: has {what} voxels; give magnitudes or grey values")
    voxels, shape = math.prod(shape), shape[:3]
    if voxels > MAX_VOXELS:
        raise InputError(f"{path}: header claims {shape} = {voxels:,} voxels; at most {MAX_VOXELS:,} are read")
    data_path = Path(image.file_map["image"].filename)
    if not data_path.is_file():
        raise InputError(f"{path}: its voxels should be in {data_path.name}, which is not there")
    held = data_path.stat().st_size
    packed = data_path.suffix.lower() in (".gz", ".bz2", ".zst")
    if voxels * dtype.itemsize > held * (_MAX_GZIP_RATIO if packed else 1):
        raise InputError(
            f"{path}: header claims {voxels * dtype.itemsize:,} bytes of voxels, more than a file of {held:,} bytes "
            "can hold; it is cut short or damaged, copy or convert it again"
        )
    return shape, dtype


def _check_affine(path: Path, image: nibabel.Nifti1Pair) -> NDArray:
    """The affine in mm, once it is known to map voxels to places."""
    header = image.header
    if header["sform_code"] <= 0:
        # nibabel mends zero voxel sizes to 1 mm when it loads, so look at what the file says itself
        holder = image.file_map.get("header", image.file_map["image"])
        with holder.get_prepare_fileobj("rb") as file:
            pixdim = type(header).from_fileobj(file, check=False)["pixdim"][1:4]
        if not (np.isfinite(pixdim) & (pixdim != 0)).all():
            raise InputError(f"{path}: voxel sizes are {_numbers(pixdim)} mm; correct pixdim in its header")
        if header["qform_code"] <= 0:
            warnings.warn(
                f"{path}: the header does not say how the head lies (sform and qform codes are 0); its axes "
                "are taken to run to the left, the front and the top, as nibabel does",
                stacklevel=3,
            )
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= _MM.get(header.get_xyzt_units()[0], 1.0)
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: its affine holds NaN or infinite values; correct sform or qform in its header")
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if not (sides.min() > 0 and abs(np.linalg.det(affine[:3, :3] / sides)) > 1e-3):
        raise InputError(
            f"{path}: its affine is singular (voxel sizes {_numbers(sides)} mm): voxels would fall on a plane; "
            "correct sform or qform in its header"
        )
    if sides.min() < 0.01 or sides.max() > 100:
        raise InputError(f"{path}: voxels measure {_numbers(sides)} mm; no head fits that, correct pixdim or the units")
    return affine


def _numbers(values: NDArray) -> str:
    return " x ".join(f"{v:g}" for v in values)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
