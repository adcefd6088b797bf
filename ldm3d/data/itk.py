"""Scans as SimpleITK sees them (Lowekamp et al. 2013): coarse copies, in its own world. No files."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.errors import InputError
from ldm3d.geometry import resample

WORKING_MM = 4.0  # voxels of the copies: a pose and a bias field need no finer ones
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world is left and posterior


def simple_itk(key: str) -> Any:
    """The module, on one thread.

    Raises:
        InputError: it is not installed, and `key` of the config needs it.
    """
    try:
        import SimpleITK
    except ImportError:
        raise InputError(f"{key} needs SimpleITK; install it with: pip install 'ldm3d[prepare]'") from None
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # scans go through in parallel, and sums stay the same
    return SimpleITK


def at_working_size(volume: NDArray, affine: NDArray) -> tuple[NDArray, NDArray]:
    """(X, Y, Z) of WORKING_MM along the world's axes, in the range 0 to 1, and its affine."""
    shape = np.array(volume.shape[1:])
    corners = np.array([np.where(end, shape - 0.5, -0.5) for end in np.ndindex(2, 2, 2)])
    corners = corners @ affine[:3, :3].T + affine[:3, 3]
    low, high = corners.min(axis=0), corners.max(axis=0)
    to = np.diag([WORKING_MM] * 3 + [1.0])
    to[:3, 3] = low + WORKING_MM / 2
    placed = resample(volume[:1], affine, to, np.maximum(np.ceil((high - low) / WORKING_MM), 8).astype(int))[0]
    bottom = np.median(placed[[0, -1]]) if placed.min() < 0 else 0.0  # of standardised scans, the background
    placed = np.maximum(placed - bottom, 0)
    top = np.percentile(placed[placed > 0], 99.5) if (placed > 0).any() else 1.0
    return (placed / top).clip(0, 1), to


def as_image(itk: Any, voxels: NDArray, affine: NDArray) -> Any:
    """SimpleITK's image of (X, Y, Z) voxels, float32 or, of masks, uint8."""
    kind = np.uint8 if voxels.dtype == bool else np.float32
    image = itk.GetImageFromArray(np.ascontiguousarray(voxels.T.astype(kind)))
    in_lps = TO_LPS @ affine
    spacing = np.linalg.norm(in_lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(in_lps[:3, 3].tolist())
    image.SetDirection((in_lps[:3, :3] / spacing).ravel().tolist())
    return image
