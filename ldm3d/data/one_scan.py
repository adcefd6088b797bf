"""One scan onto the Grid, in whatever process: read, masked, registered, placed and written, or known already."""

import contextlib
import errno
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.config.data import RegistrationConfig
from ldm3d.data import registration
from ldm3d.data.inside import check_inside
from ldm3d.data.keys import KEY, file_key, settings_of, volume_key, with_mask
from ldm3d.data.masks import apply_mask
from ldm3d.data.nifti import read_volume
from ldm3d.data.quality import look_at, read_look, write_look
from ldm3d.errors import InputError
from ldm3d.files import write_atomic
from ldm3d.geometry import Grid

VERSION = 2  # raise it when the numbers that preparing makes change: every volume is then prepared again

TOLD = ("cut_mm", "extent_mm", "around_zero", "notes")  # of a scan's `info`, what all scans together are judged by
DAMAGED = (OSError, ValueError, EOFError)  # what NumPy raises for a file that is none of its own
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def prepare_scan(
    path: str,
    mask: Path | InputError | None,
    masks_root: Path,
    root: Path,
    folder: Path,
    grid: Grid,
    percentiles: tuple[float, float],
    register: RegistrationConfig | None,
    stripped: bool,
) -> dict[str, Any]:
    """One scan, in whatever process: key, cached and what `Prepared` tells of it; or the reason why not."""
    try:
        check_inside(path, root)  # before a byte of it is read
        if isinstance(mask, InputError):
            raise mask
        if mask:
            check_inside(mask, masks_root)
        settings = settings_of(grid, percentiles, VERSION)
        if register:
            settings["register"] = registration.settings_of(register, stripped)
        known = folder / f"{file_key(Path(path), settings, mask)}.key"
        key = _read_key(known)
        info = _read_info(folder, key)
        cached = info is not None
        if not cached:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                volume, affine = read_volume(path)
                scan, kept = _masked(volume, affine, mask) if mask else (volume, None)
                key = volume_key(volume, affine, settings if kept is None else with_mask(settings, kept))
                info = _read_info(folder, key)  # the same voxels in another file
                cached = info is not None
                if not cached:
                    volume, info = registration.placed(scan, affine, grid, percentiles, register, stripped)
            if not cached:
                info |= {"mask": str(mask), "mask_keeps": round(float(kept.mean()), 4)} if mask else {}
                info["notes"] = [str(warning.message) for warning in caught]
                buffer, stored = io.BytesIO(), volume.astype(np.float16)
                np.save(buffer, stored)
                write_atomic(folder / f"{key}.npy", buffer.getvalue())
                write_look(folder / f"{key}.npz", look_at(stored, grid.spacing_mm))
                write_atomic(folder / f"{key}.json", json.dumps(info))  # last: it says that the volume is there
            write_atomic(known, key)
        if cached and read_look(folder / f"{key}.npz") is None:  # of an earlier version, or damaged
            volume = None
            with contextlib.suppress(*DAMAGED):  # whoever loads it for more than a look says so
                volume = read_stored(folder / f"{key}.npy")
            if volume is not None:
                write_look(folder / f"{key}.npz", look_at(volume, grid.spacing_mm))
        registered = {"correlation": info["registration"]["correlation"]} if register else {}
        return {"key": key, "cached": cached, **{name: info[name] for name in TOLD}, **registered}
    except InputError as error:
        return {"reason": str(error)}
    except MemoryError:
        return {"reason": f"{path}: takes more memory than there is; try it alone, with workers=1"}
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise  # no scan's fault; going on would only blame all the others too
        return {"reason": f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"}


def _masked(volume: NDArray, affine: NDArray, path: Path) -> tuple[NDArray, NDArray]:
    """See `apply_mask`."""
    mask = read_volume(path)
    try:
        return apply_mask(volume, affine, *mask)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_key(path: Path) -> str | None:
    """The key of a file that was prepared; None if it was not."""
    try:
        key = path.read_text(encoding="utf-8")
    except (FileNotFoundError, ValueError):
        return None
    return key if KEY.fullmatch(key) else None


def _read_info(folder: Path, key: str | None) -> dict[str, Any] | None:
    """What stands beside a prepared volume; None if it is not there or damaged, and then the scan is prepared again."""
    if key is None or not (folder / f"{key}.npy").is_file():
        return None
    try:
        info = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        return info if info.keys() >= {*TOLD} else None
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        return None


def read_stored(path: Path) -> NDArray:
    """The volume of a .npy file of `prepare_scan` as float32 (C, X, Y, Z); one of `DAMAGED` if it cannot be read."""
    volume = np.load(path).astype(np.float32)
    return volume.reshape(-1, *volume.shape[-3:])  # what earlier versions prepared is (X, Y, Z)
