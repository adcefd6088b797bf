"""One scan onto the Grid, in whatever process: read, masked, corrected, registered, placed and written, or known already."""

import contextlib
import errno
import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.config.data import DataConfig
from ldm3d.data import bias, registration
from ldm3d.data.extraction import Tool, find_tool
from ldm3d.data.inside import check_inside, root_of
from ldm3d.data.keys import KEY, file_key, settings_of, volume_key, with_mask
from ldm3d.data.masks import mask_root
from ldm3d.data.nifti import read_volume
from ldm3d.data.placing import grid_of
from ldm3d.data.quality import look_at, read_look, write_look
from ldm3d.data.removed import Removed, masked, remove
from ldm3d.errors import InputError
from ldm3d.files import write_atomic

VERSION = 2  # raise it when the numbers that preparing makes change: every volume is then prepared again

TOLD = ("cut_mm", "extent_mm", "around_zero", "notes")  # of a scan's `info`, what all scans together are judged by
TOLD_LATER = ("foreground_ml", "even_background")  # and what earlier versions did not note
REMOVED = ".removed.npz"  # beside a volume: what `ldm3d.data.removed` keeps
DAMAGED = (OSError, ValueError, EOFError)  # what NumPy raises for a file that is none of its own
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Steps:
    """What is done with every scan before it is placed, in this order; each has what it needs, or is None.

    Attributes:
        tool: that extracts brains.
        settings: of all steps, on which prepared volumes depend beside the scan and its mask.
    """

    tool: Tool | None
    settings: dict[str, Any]


def steps_of(data: DataConfig) -> Steps:
    """The steps of a config.

    Raises:
        InputError: a program, a library or a template that they need is not there.
    """
    settings = settings_of(grid_of(data.grid), data.percentiles, VERSION)
    tool = find_tool(data.brain_extraction) if data.brain_extraction else None
    if tool:
        settings["brain_extraction"] = tool.told()
    if data.bias_correction:
        settings["bias_correction"] = bias.settings_of()
    if data.registration:
        settings["register"] = registration.settings_of(data.registration, data.skull_stripped)
    return Steps(tool, settings)


def prepare_scan(path: str, mask: Path | InputError | None, folder: Path, data: DataConfig, steps: Steps) -> dict[str, Any]:
    """One scan, in whatever process: key, cached and what `Prepared` tells of it; or the reason why not."""
    try:
        check_inside(path, root_of(data))  # before a byte of it is read
        if isinstance(mask, InputError):
            raise mask
        if mask:
            check_inside(mask, mask_root(data))
        known = folder / f"{file_key(Path(path), steps.settings, mask)}.key"
        key = _read_key(known)
        info = _read_info(folder, key)
        cached = info is not None
        spacing_mm = data.grid.spacing_mm
        if not cached:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                volume, affine = read_volume(path)
                scan, kept = masked(volume, affine, read_volume(mask), mask) if mask else (volume, None)
                key = volume_key(volume, affine, steps.settings if kept is None else with_mask(steps.settings, kept))
                info = _read_info(folder, key)  # the same voxels in another file
                cached = info is not None
                if not cached:
                    volume, info, removed = _placed(scan, affine, kept, Path(path), data, steps)
            if not cached:
                info |= {"mask": str(mask)} if mask else {}
                info["notes"] = [str(warning.message) for warning in caught]
                buffer, stored = io.BytesIO(), volume.astype(np.float16)
                np.save(buffer, stored)
                write_atomic(folder / f"{key}.npy", buffer.getvalue())
                write_look(folder / f"{key}.npz", look_at(stored, spacing_mm))
                removed.write(folder / f"{key}{REMOVED}")
                write_atomic(folder / f"{key}.json", json.dumps(info))  # last: it says that the volume is there
            write_atomic(known, key)
        if cached and read_look(folder / f"{key}.npz") is None:  # of an earlier version, or damaged
            volume = None
            with contextlib.suppress(*DAMAGED):  # whoever loads it for more than a look says so
                volume = read_stored(folder / f"{key}.npy")
            if volume is not None:
                write_look(folder / f"{key}.npz", look_at(volume, spacing_mm))
        registered = {"correlation": info["registration"]["correlation"]} if data.registration else {}
        return {"key": key, "cached": cached, **{name: info.get(name) for name in (*TOLD, *TOLD_LATER)}, **registered}
    except InputError as error:
        return {"reason": str(error)}
    except MemoryError:
        return {"reason": f"{path}: takes more memory than there is; try it alone, with workers=1"}
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise  # no scan's fault; going on would only blame all the others too
        return {"reason": f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"}


def _placed(
    scan: NDArray, affine: NDArray, kept: NDArray | None, path: Path, data: DataConfig, steps: Steps
) -> tuple[NDArray, dict[str, Any], Removed]:
    """Extraction, bias field, registration, Grid: the volume of `to_grid`, its info, and what was removed before."""
    scan, removed, told = remove(scan, affine, path, kept, steps.tool, bool(data.bias_correction))
    grid, wanted = grid_of(data.grid), data.registration
    volume, info = registration.placed(scan, affine, grid, data.percentiles, wanted, data.skull_stripped)
    return volume, info | told, removed


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
