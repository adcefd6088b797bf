"""What the header of a scan says, checked before memory is taken: NIfTI's, and FreeSurfer's of .mgz.

A file that claims a terabyte fails here. Header extensions are skipped: nothing here needs them, and their sizes are one more
thing that a file can lie about.
"""

import logging
import math
import warnings
from pathlib import Path

import nibabel
import numpy as np
import psutil
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError, SpatialHeader
from numpy.typing import NDArray

from ldm3d.errors import InputError

# deflate cannot shrink more than 1032 : 1 (zlib's technical details); some room for the file's own header
_MAX_GZIP_RATIO = 1100
_MAX_OFFSET = 2**26  # bytes of header extensions before the voxels; a packed file is unpacked up to there
_PACKED = (".gz", ".bz2", ".mgz")
_SILENT = logging.Logger("silent", logging.CRITICAL + 1)
_HEADER_BYTES = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_MGH = (".mgz", ".mgh")
_MGH_BYTES, _MGH_TYPES = 284, (0, 1, 3, 4)  # of header before the voxels; unsigned 8 bits, 32 bits, float32, 16 bits
_SAME_SIZE, _SAME_DIRECTION = 0.02, math.cos(math.radians(2))  # what sform and qform may differ by, unsaid
_MM = {"meter": 1000.0, "micron": 0.001}


def read_header(path: Path, most: int) -> tuple[SpatialHeader, NDArray, tuple[int, int, int], np.dtype]:
    """Header, affine (4, 4) to RAS+ mm, shape (X, Y, Z) and voxel type of a scan, once they are known to be usable.

    Raises:
        InputError: see `ldm3d.data.nifti.read_volume`.
    """
    is_mgh = _split_name(path)[1].lower() in _MGH
    header, raw = (_read_mgh_header(path), None) if is_mgh else _read_nifti_header(path)
    shape, dtype = _check_header(path, header, files_of(path)[-1], most)
    affine = check_affine(path, header.get_affine() if is_mgh else _nifti_affine(path, header, raw))
    return header, affine, shape, dtype


def files_of(path: Path) -> tuple[Path, ...]:
    """All files of a scan, that of the voxels last: one, or two for a pair of .hdr and .img, whichever is named."""
    stem, kind, packing = _split_name(path)
    if kind.lower() not in (".hdr", ".img"):
        return (path,)
    kinds = (".HDR", ".IMG") if kind.isupper() else (".hdr", ".img")
    return path.with_name(stem + kinds[0] + packing), path.with_name(stem + kinds[1] + packing)


def _split_name(path: Path) -> tuple[str, str, str]:
    """(stem, kind, packing): "brain.nii.gz" is "brain", ".nii" and ".gz"."""
    packing = path.suffix if path.suffix.lower() in (".gz", ".bz2") else ""
    name = Path(path.name.removesuffix(packing))
    return name.stem, name.suffix, packing


def _read_nifti_header(path: Path) -> tuple[nibabel.Nifti1Header, nibabel.Nifti1Header]:
    """The header as nibabel mends it, and as it stands in the file."""
    if _split_name(path)[1].lower() not in (".nii", ".hdr", ".img"):
        raise InputError(f"{path}: is neither NIfTI nor .mgz by its name; convert it to .nii.gz with mri_convert or nibabel")
    holder = files_of(path)[0]
    if not holder.is_file():
        raise InputError(f"{path}: its header should be in {holder.name}, which is not there")
    try:
        with ImageOpener(holder) as file:
            content = file.read(max(_HEADER_BYTES))
        sizes = {size for order in ("little", "big") if (size := int.from_bytes(content[:4], order)) in _HEADER_BYTES}
        size = sizes.pop() if sizes else 348
        if len(content) < size:
            raise HeaderDataError(f"it ends after {len(content)} of {size} bytes of header")
        kind = _HEADER_BYTES[size]
        raw = kind(content[:size], check=False)
        if bytes(raw["magic"])[:3] not in (b"n+1", b"ni1", b"n+2", b"ni2"):
            raise HeaderDataError(f"its magic is {bytes(raw['magic'])[:3]!r}")
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            mended = raw.copy()
            mended.check_fix(logger=_SILENT)  # what it mends, it would say without naming the file
        return mended, raw
    except Exception as error:  # nibabel lets through whatever a broken header sets off in it
        raise InputError(f"{path}: cannot be read as NIfTI ({one_line(error)})") from None


def _read_mgh_header(path: Path) -> MGHHeader:
    """FreeSurfer's header; a warning where it does not say how the head lies."""
    try:
        with ImageOpener(path) as file:
            content = file.read(_MGH_BYTES)
        if len(content) < _MGH_BYTES:
            raise HeaderDataError(f"it ends after {len(content)} of {_MGH_BYTES} bytes of header")
        with np.errstate(all="ignore"):
            header = MGHHeader(content, check=False)
        if header["version"] != 1:
            raise HeaderDataError(f"its version is {header['version']}, not 1")
        if int(header["type"]) not in _MGH_TYPES:
            raise HeaderDataError(f"voxels of type {header['type']}; mri_convert -odt float writes one that is read")
    except Exception as error:  # as above
        raise InputError(f"{path}: cannot be read as FreeSurfer's MGH ({one_line(error)})") from None
    if content[28:30] == b"\0\0":  # goodRASFlag, which nibabel sets when it fills in a default, turned by 180 degrees
        header["Mdc"] = [[-1, 0, 0], [0, 0, -1], [0, 1, 0]]  # to the left, down, to the front
        warnings.warn(
            f"{path}: the header does not say how the head lies; it is taken as coronal, as FreeSurfer does", stacklevel=4
        )
    return header


def _check_header(path: Path, header: SpatialHeader, data_path: Path, most: int) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape (X, Y, Z) and voxel type, once they are known to be usable."""
    shape, dtype = tuple(int(n) for n in header.get_data_shape()), np.dtype(header.get_data_dtype())
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
    if voxels > most:
        raise InputError(f"{path}: header claims {shape} = {voxels:,} voxels; at most {most:,} are read")
    if not data_path.is_file():
        raise InputError(f"{path}: its voxels should be in {data_path.name}, which is not there")
    is_mgh = isinstance(header, MGHHeader)
    offset = float(_MGH_BYTES if is_mgh else header["vox_offset"])
    first = 0 if is_mgh or len(files_of(path)) == 2 else header.sizeof_hdr
    if not first <= offset <= _MAX_OFFSET:  # NaN is not, either
        raise InputError(f"{path}: its voxels should begin at byte {offset:g}; correct vox_offset in its header")
    held, wanted = data_path.stat().st_size, int(offset) + voxels * dtype.itemsize
    if wanted > held * (_MAX_GZIP_RATIO if data_path.suffix.lower() in _PACKED else 1):
        raise InputError(
            f"{path}: header claims {voxels * dtype.itemsize:,} bytes of voxels, more than a file of {held:,} bytes "
            "can hold; it is cut short or damaged, copy or convert it again"
        )
    free = psutil.virtual_memory().available
    if voxels * _bytes_per_voxel(dtype) > free:
        raise InputError(f"{path}: {memory(shape, dtype)}, and {free / 2**30:.1f} GiB are free; read it where there is more")
    return shape, dtype


def _nifti_affine(path: Path, header: nibabel.Nifti1Header, raw: nibabel.Nifti1Header) -> NDArray:
    """The affine in mm: sform where there is one, else qform."""
    # `raw` is what the file says itself: nibabel mends zero voxel sizes to 1 mm
    pixdim = np.array(raw["pixdim"][1:4], dtype=np.float64)
    usable = (np.isfinite(pixdim) & (pixdim != 0)).all()
    if header["sform_code"] <= 0:
        if not usable:
            raise InputError(f"{path}: voxel sizes are {_numbers(pixdim)} mm; correct pixdim in its header")
        if header["qform_code"] <= 0:
            warnings.warn(
                f"{path}: the header does not say how the head lies (sform and qform codes are 0); its axes "
                "are taken to run to the left, the front and the top, as nibabel does",
                stacklevel=5,
            )
    try:
        affine = np.array(header.get_best_affine(), dtype=np.float64)
    except (ValueError, HeaderDataError) as error:
        raise InputError(f"{path}: its qform is no rotation ({one_line(error)}); correct it in its header") from None
    if header["sform_code"] > 0 and usable:
        _compare_forms(path, header, affine[:3, :3], np.abs(pixdim))
    affine[:3] *= _MM.get(_unit(header), 1.0)
    return affine


def _compare_forms(path: Path, header: nibabel.Nifti1Header, sform: NDArray, pixdim: NDArray) -> None:
    """Warn where voxel sizes or axes of sform, (3, 3), are not those of pixdim and qform; InputError for mirror images."""
    try:
        qform = np.array(header.get_qform(), dtype=np.float64)[:3, :3] if header["qform_code"] > 0 else None
    except (ValueError, HeaderDataError):
        qform = None  # no rotation, and not what is used
    sides = np.linalg.norm(sform, axis=0)
    if not (np.isfinite(sides) & (sides > 0)).all() or (qform is not None and not np.isfinite(qform).all()):
        return  # `check_affine` judges the first; the second is not used
    said = []
    if (np.abs(pixdim / sides - 1) > _SAME_SIZE).any():
        said.append(f"voxels of {_numbers(sides)} mm by the sform, of {_numbers(pixdim)} mm by pixdim")
    if qform is not None:
        if np.linalg.det(sform) * np.linalg.det(qform) < 0:
            raise InputError(
                f"{path}: sform and qform are mirror images, so left and right cannot be told apart; correct the header "
                "(fslorient -copysform2qform, or -copyqform2sform)"
            )
        if ((sform / sides) * (qform / np.linalg.norm(qform, axis=0))).sum(0).min() < _SAME_DIRECTION:
            said.append("axes that run in other directions by the sform than by the qform")
    if said:
        warnings.warn(f"{path}: {', and '.join(said)}; the sform is used, as nibabel does", stacklevel=6)


def check_affine(path: Path, affine: NDArray) -> NDArray:
    """The affine (4, 4), once it is known to map voxels to places."""
    affine = np.asarray(affine, dtype=np.float64)
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


def _unit(header: nibabel.Nifti1Header) -> str:
    """Of length; a code that no unit has counts as mm."""
    try:
        return header.get_xyzt_units()[0]
    except KeyError:
        return "mm"


def _bytes_per_voxel(dtype: np.dtype) -> int:
    # As stored, as float32, and a flag for whether it is finite; where NaN can be, which of its regions a voxel is in, too
    return dtype.itemsize + (11 if dtype.kind == "f" else 5)


def memory(shape: tuple[int, ...], dtype: np.dtype) -> str:
    needed = math.prod(shape) * _bytes_per_voxel(dtype) / 2**30
    return f"{shape} voxels of type {dtype} take {needed:.1f} GiB of memory to read"


def _numbers(values: NDArray) -> str:
    return " x ".join(f"{v:g}" for v in values)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
