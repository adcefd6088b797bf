"""A scan as a measurement of the volume that is sought, and the way back of what was restored to the scan's own voxels.

Legend: v the scan on the Grid (1, C, X, Y, Z); y what was measured of it.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.applications.placed import PlacedScan
from ldm3d.diffusion.operators import Linear
from ldm3d.geometry import resample


@dataclass(frozen=True, eq=False)
class Degraded:
    """A measurement and its operator.

    Attributes:
        name: in words.
        linear: A, of volumes on the Grid.
        measured: y, (1, C, X', Y', Z') on the pipeline's device.
        known: (X', Y', Z') voxels of the scan that are kept as they are; None: every voxel is restored.
        affine: (4, 4) of what `back` gives.
        finer: how many voxels of the result lie in one of the scan, along each axis of its.
    """

    name: str
    linear: Linear
    measured: Tensor
    known: NDArray | None
    affine: NDArray
    finer: tuple[int, int, int] = (1, 1, 1)

    def back(self, placed: PlacedScan, volume: Tensor) -> NDArray:
        """A restored volume (1, C, X, Y, Z) on the scan's own voxels, or finer ones, in its intensities.

        What is known stays as it was scanned. From thick slices finer detail within them stays, too: the scan plus what
        restoring changes.
        """
        volume = volume.clamp(0, 1)
        if self.finer != (1, 1, 1):
            shape = [n * k for n, k in zip(placed.scan.shape[1:], self.finer)]
            change = (volume - placed.volume)[0].cpu().numpy() * (placed.info["high"] - placed.info["low"])
            moved = resample(change, np.array(placed.info["grid_affine"]), self.affine, shape)
            return resample(placed.scan, placed.affine, self.affine, shape) + self._put_back(placed, moved)
        restored = placed.back(volume, keep_residual=False)
        return restored if self.known is None else np.where(self.known, placed.scan, restored)

    def deviation_back(self, placed: PlacedScan, deviation: Tensor) -> NDArray:
        """A deviation (1, C, X, Y, Z) likewise; 0 where the scan was kept."""
        values = deviation[0].cpu().numpy()
        if self.finer != (1, 1, 1):
            shape = [n * k for n, k in zip(placed.scan.shape[1:], self.finer)]
            values = values * (placed.info["high"] - placed.info["low"])
            return self._put_back(placed, resample(values, np.array(placed.info["grid_affine"]), self.affine, shape))
        moved = placed.back_change(values)
        return moved if self.known is None else np.where(self.known, np.float32(0), moved)

    def _put_back(self, placed: PlacedScan, change: NDArray) -> NDArray:
        """A change on the finer voxels as one of the scan, with its bias field; none where its skull was taken away."""
        kept = placed.removed.kept
        if kept is not None:
            kept = resample(kept.astype(np.float32), placed.affine, self.affine, change.shape[1:], "nearest") > 0.5
        return replace(placed.removed, kept=kept).put_back(change, self.affine, None)
