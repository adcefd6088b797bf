"""A scan of thick slices as a measurement of a volume on the Grid, y = A x, and volumes that agree with it.

Legend: x a volume on the Grid, (C, X, Y, Z) or (1, C, X, Y, Z); y what was measured of it, (..., X', Y', Z').
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.diffusion.measurement import conjugate_gradients
from ldm3d.diffusion.operators import Linear, Sampled
from ldm3d.geometry import resample, spacing_of

COARSER = 1.2  # times the Grid's spacing: from there on a slice counts as thick
DAMPING, ITERATIONS, TOLERANCE = 1e-2, 20, 1e-3
INTERPOLATED = (
    8 * np.log(2) / 6
)  # square of a Gaussian's full width with the mean second moment of linear interpolation, voxels
AIR, UNSURE = 0.1, 0.03  # intensity below which a volume counts as air in part; t, by how much an answer may be off
REACH = 1.5  # of a Gaussian slice profile, in full widths at half maximum


@dataclass(frozen=True, eq=False)
class Measurement:
    """What is known of a volume.

    Attributes:
        linear: A.
        values: y, (C, X', Y', Z'), in [0, 1] as volumes are.
        noise_std: s, of y.
    """

    linear: Linear
    values: Tensor
    noise_std: float = 0.0

    def agreed(self, volume: NDArray) -> NDArray:
        """A volume near to another that was measured as y, in [0, 1].

        x + C A' (A C A' + d)^-1 (y - A x), the mean of x given y if x is off by C = t^2 c: c is 1, and falls to 0 in air,
        which no noise of the scan should get into. d is s^2 / t^2, and at least so large that directions that were hardly
        measured stay as they are. To keep within [0, 1] disturbs the answer a little, so what that would be measured as is
        sought once more (alternating projections, Cheney & Goldstein 1959).

        Args:
            volume: x, (C, X, Y, Z).
        """
        x, y = torch.from_numpy(volume)[None], self.values[None].to(torch.float32)
        free, noise = (x / AIR).clamp(0, 1), max((self.noise_std / UNSURE) ** 2, DAMPING)
        for damping in (noise, DAMPING):
            x = x + free * self._weights(y - self.linear(x), free, damping)
            y, x = self.linear(x), x.clamp(0, 1)  # what the answer would be measured as, were it not for its bounds
        return x[0].numpy()

    def _weights(self, left: Tensor, free: Tensor, damping: float) -> Tensor:
        """A' (A C A' + d)^-1 of what is left of y."""

        def system(w: Tensor) -> Tensor:
            return self.linear(free * self.linear.transpose(w)) + damping * w

        return self.linear.transpose(conjugate_gradients(system, left, ITERATIONS, tolerance=TOLERANCE))


def thick_axes(affine: NDArray, grid_mm: float) -> dict[int, float]:
    """Axes of a scan along which its voxels are thicker than the Grid's, and by how many mm they are."""
    return {axis: float(mm) for axis, mm in enumerate(spacing_of(affine)) if mm > COARSER * grid_mm}


def sliced(
    scaled: NDArray,
    affine: NDArray,
    grid_affine: NDArray,
    shape: Sequence[int],
    thick: Mapping[int, float],
    profile: str = "box",
    noise_std: float = 0.0,
) -> tuple[Measurement, NDArray]:
    """A scan as a measurement, on its own lattice where that is coarser than the Grid, else averaged to the Grid's spacing.

    Args:
        scaled: the scan, (C, X', Y', Z'), in the intensities of volumes on the Grid.
        affine: (4, 4), of the scan.
        grid_affine: (4, 4), of the Grid in the scan's world; `shape`: (X, Y, Z), of the Grid.
        thick: by the scan's axis, mm of a slice.
        profile: of the slices, "box", or "gaussian" with that full width at half maximum.
        noise_std: of the scan.

    Returns:
        The measurement, and the affine of its values.
    """
    own, grid_mm = spacing_of(affine), float(spacing_of(grid_affine).min())
    step = np.maximum(own, grid_mm * (1 - 1e-6))
    counts = [max(int(n * mm / s + 1e-6), 1) for n, mm, s in zip(scaled.shape[1:], own, step)]
    lattice = affine.copy()
    lattice[:3, :3] *= step / own
    middle = (np.array(scaled.shape[1:]) - 1) / 2, (np.array(counts) - 1) / 2
    lattice[:3, 3] += affine[:3, :3] @ middle[0] - lattice[:3, :3] @ middle[1]
    y = resample(scaled.clip(0, 1).astype(np.float32), affine, lattice, counts)
    offsets, shares = [], []
    for axis in range(3):
        width = thick.get(axis, 0.0)
        if profile == "gaussian":  # second moments add: of the Grid's own voxels, of linear interpolation between them
            width = np.sqrt(max(width**2 - (1 + INTERPOLATED) * grid_mm**2, 0.0))
        reach = 1.0 if profile == "box" or not width else 2 * REACH
        parts = max(round(reach * width / grid_mm), 1)
        places = ((np.arange(parts) + 0.5) / parts - 0.5) * reach
        offsets.append(places * width / step[axis])
        shares.append(np.ones(parts) if profile == "box" else np.exp(-4 * np.log(2) * places**2))
    steps = np.stack(np.meshgrid(*offsets, indexing="ij"), axis=-1).reshape(-1, 3)
    weights = np.einsum("i,j,k->ijk", *shares).reshape(-1)
    to_grid = torch.from_numpy(np.linalg.solve(grid_affine, lattice))
    linear = Sampled(to_grid, shape, counts, torch.from_numpy(steps), torch.from_numpy(weights / weights.sum()))
    return Measurement(linear, torch.from_numpy(y), noise_std), lattice
