"""Keys of scans, which follow from their voxels, not from file names, compression or headers.

A key is SCAN-PLACING. SCAN, a hash of the voxels, tells whether a model has seen a scan. It stays the same where a file is
renamed, packed anew or converted without loss, and where its header is corrected or its axes are stored in another order. It
changes with any voxel: by resampling, cropping, defacing, bias correction, or rounding. PLACING is a hash of the affine and
of the settings of preparing, and of the mask where one is applied: both together name a prepared volume. SCAN is of the
voxels before the mask, so that a scan is known under any mask.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.data.headers import files_of
from ldm3d.data.nifti import in_ras_order
from ldm3d.errors import InputError
from ldm3d.geometry import WORLD, Grid

KEY = re.compile(r"[0-9a-f]{20}-[0-9a-f]{8}")


def scan_of(key: str) -> str:
    """The part of a key that follows from the scan's voxels alone."""
    return key.partition("-")[0]


def settings_of(grid: Grid, percentiles: tuple[float, float], version: int) -> dict[str, Any]:
    """The settings that determine a prepared volume, together with the scan."""
    place = [grid.affine.round(4).tolist()] if grid.place == WORLD else []  # else it follows from the scan
    return {"version": version, "grid": [grid.shape, grid.spacing_mm, *place], "percentiles": percentiles}


def with_mask(settings: Mapping[str, Any], kept: NDArray) -> dict[str, Any]:
    """The settings of a scan of which only some voxels, (1, X, Y, Z), are kept."""
    return {**settings, "mask": hashlib.sha256(np.packbits(kept)).hexdigest()[:16]}


def volume_key(volume: NDArray, affine: NDArray, settings: Mapping[str, Any]) -> str:
    """The key of a scan.

    Args:
        volume, affine: from `ldm3d.data.nifti.read_volume`, so intensities carry the header's scale factor.
        settings: from `settings_of`.
    """
    voxels = np.ascontiguousarray(in_ras_order(volume, affine), dtype="<f4") + np.float32(0)  # -0 is 0
    # One channel is hashed as (X, Y, Z), as before volumes had an axis of channels: models know their scans by these keys
    scan = hashlib.sha256(json.dumps(voxels.shape[len(voxels) == 1 :]).encode())
    scan.update(voxels)
    # To 0.1 micrometres: programs that rewrite a header may round its numbers
    placing = json.dumps([(np.round(affine, 4) + 0.0).tolist(), settings])
    return f"{scan.hexdigest()[:20]}-{hashlib.sha256(placing.encode()).hexdigest()[:8]}"


def file_key(path: Path, settings: Mapping[str, Any], mask: Path | None = None) -> str:
    """20 hex digits of the bytes of a scan's files, and of its mask's, and the settings: quick to compute, but changed by
    compressing anew."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in (*files_of(path), *([mask] if mask else ())):
        if not file.is_file():
            raise InputError(f"{file}: no such file")
        with open(file, "rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:20]
