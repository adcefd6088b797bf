"""What happened to a scan, in words, as an operator of volumes on the Grid.

    mask=FILE             only what FILE marks (above 0) is known
    hole=FILE             all but what FILE marks is known: a lesion, an artefact
    ball=-20,35,10:15     all is known but a ball of 15 mm radius around this point, in mm of the file's world
    missing=z:10-14,20    these slices of the file are missing; x, y and z are the first, second and third axis of the file
    slices[=z:6]          slices are thick, of 6 mm across the third axis; by default as the file's voxels are
    blur=8                blurred by a Gaussian of 8 mm, full width at half maximum
    bias=FILE             every voxel was multiplied by FILE's
    noise                 nothing but noise

Legend: y what was measured of the scan, (1, C, X', Y', Z').
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ldm3d.applications.measured_scan import Degraded
from ldm3d.applications.placed import PlacedScan
from ldm3d.data.nifti import read_volume
from ldm3d.data.slicing import sliced, thick_axes
from ldm3d.diffusion.operators import Chain, Identity, Linear, Scaled, blur, mask
from ldm3d.errors import InputError, choose
from ldm3d.geometry import resample, spacing_of

KINDS = ("mask", "hole", "ball", "missing", "slices", "blur", "bias", "noise")
AXES = "xyz"
SURE = 0.999  # share of known voxels around a voxel of the Grid that make it known


def degraded(placed: PlacedScan, operator: str | Sequence[str] | Linear) -> Degraded:
    """What happened to a scan.

    Args:
        placed: the scan.
        operator: words as at the top of this file, one after another as they happened; or A itself, of volumes on the Grid, to
            which `placed.volume` is then the measurement.

    Raises:
        InputError: an unknown word, or one that does not fit the scan.
    """
    if isinstance(operator, Linear):
        measured = operator(placed.volume)
        if measured.shape != placed.volume.shape:
            raise InputError(
                f"the operator makes volumes of shape {tuple(measured.shape[2:])} from the Grid's {placed.volume.shape[2:]}; "
                "for a scan it must keep the shape (for thick slices say slices)"
            )
        return Degraded(type(operator).__name__, operator, placed.volume, None, placed.affine)
    words = [operator] if isinstance(operator, str) else list(operator)
    return _Reader(placed).read(words or ["noise"])


class _Reader:
    """Turns words into an operator."""

    def __init__(self, placed: PlacedScan):
        self.placed, self.shape = placed, placed.scan.shape[1:]
        self.grid_affine = np.array(placed.info["grid_affine"])
        self.operators: list[Linear] = []
        self.known: NDArray | None = None
        self.thick: dict[int, float] | None = None

    def read(self, words: Sequence[str]) -> Degraded:
        for word in words:
            name, _, value = word.partition("=")
            choose("operator", name, KINDS)
            getattr(self, f"_{name}")(value)
        name = " ".join(
            word.partition("=")[0] + ("=" + Path(word.partition("=")[2]).name if "=" in word else "") for word in words
        )
        if self.thick is not None:
            return self._sliced(name)
        if self.known is not None:
            here = resample(self.known.astype(np.float32), self.placed.affine, self.grid_affine, self.placed.pipe.grid.shape)
            self.operators.append(mask(torch.from_numpy(here[0] > SURE)))
        linear = Chain(*self.operators) if self.operators else Identity()
        kept = self.known if all(word.partition("=")[0] in ("mask", "hole", "ball", "missing") for word in words) else None
        return Degraded(name, linear, self.placed.volume, kept, self.placed.affine)

    def _sliced(self, name: str) -> Degraded:
        """The scan's own lattice where it is coarser than the Grid, averaged to the Grid's spacing where it is finer."""
        placed, grid = self.placed, self.placed.pipe.grid
        own, grid_mm = spacing_of(placed.affine), min(grid.spacing_mm)
        if not (thick := self.thick or thick_axes(placed.affine, grid_mm)):
            raise InputError(
                f"{placed.name} has voxels of {' x '.join(f'{mm:g}' for mm in own)} mm and the model {grid_mm:g} mm: no "
                "slice of it is thicker; give axis and thickness, slices=z:6"
            )
        scaled = (placed.seen - placed.info["low"]) / (placed.info["high"] - placed.info["low"])
        seen, lattice = sliced(scaled, placed.affine, self.grid_affine, grid.shape, thick)
        self.operators.append(seen.linear)
        if self.known is not None:
            here = resample(self.known.astype(np.float32), placed.affine, lattice, seen.values.shape[1:])
            self.operators.append(mask(torch.from_numpy(here[0] > SURE)))
        finer = [max(math.ceil(own[axis] / grid_mm - 0.2), 1) if axis in thick else 1 for axis in range(3)]
        affine = placed.affine.copy()
        affine[:3, :3] /= finer
        affine[:3, 3] += placed.affine[:3, :3] @ ((1 / np.array(finer) - 1) / 2)
        return Degraded(name, Chain(*self.operators), seen.values[None].to(placed.volume), None, affine, tuple(finer))

    def _mask(self, value: str) -> None:
        self._keep(self._marked(value, "mask"))

    def _hole(self, value: str) -> None:
        self._keep(~self._marked(value, "hole"))

    def _ball(self, value: str) -> None:
        try:
            *centre, radius = [float(part) for part in value.replace(":", ",").split(",")]
        except ValueError:
            centre, radius = [], math.nan
        if len(centre) != 3 or not all(map(math.isfinite, centre)) or not 0 < radius < math.inf:
            raise InputError(f"ball={value}: give a point in mm and a radius above 0, as in ball=-20,35,10:15")
        indices = np.stack(np.meshgrid(*map(np.arange, self.shape), indexing="ij"), axis=-1)
        places = indices @ self.placed.affine[:3, :3].T + self.placed.affine[:3, 3]
        inside = ((places - np.array(centre)) ** 2).sum(axis=-1) <= radius**2
        if not inside.any():
            raise InputError(f"ball={value}: no voxel of {self.placed.name} lies in it; give a point within the scan")
        self._keep(~inside[None])

    def _missing(self, value: str) -> None:
        axis, numbers = self._axis(value, "missing=z:10-14,20")
        known = np.ones((1, *self.shape), bool)
        for part in numbers.split(","):
            first, _, last = part.partition("-")
            if (
                not (first.isdigit() and (last or first).isdigit())
                or not 0 <= int(first) <= int(last or first) < self.shape[axis]
            ):
                raise InputError(
                    f"missing={value}: {part!r} is no slice or range of the {self.shape[axis]} from 0 on; 10-14,20 is"
                )
            known[(slice(None),) * (axis + 1) + (slice(int(first), int(last or first) + 1),)] = False
        self._keep(known)

    def _slices(self, value: str) -> None:
        self.thick = {}
        if value:
            axis, mm = self._axis(value, "slices=z:6")
            self.thick = {axis: _number(mm, "slices=z:6")}

    def _blur(self, value: str) -> None:
        fwhm = _number(value, "blur=8")
        grid = self.placed.pipe.grid
        self.operators += [blur(axis, n, fwhm / mm) for axis, (n, mm) in enumerate(zip(grid.shape, grid.spacing_mm))]

    def _bias(self, value: str) -> None:
        field, affine = self._file(value, "bias")
        here = resample(field - 1, affine, self.grid_affine, self.placed.pipe.grid.shape)[0] + 1  # 1 outside of it
        if not here.min() > 0:
            raise InputError(f"bias={value}: a field of factors must be above 0 everywhere, and this one has {here.min():g}")
        self.operators.append(Scaled(torch.from_numpy(here)))

    def _noise(self, value: str) -> None:
        if value:
            raise InputError(f"noise={value}: how much noise there is goes to --noise (noise of pipe.restore)")

    def _keep(self, known: NDArray) -> None:
        self.known = known if self.known is None else self.known & known
        if not self.known.any():
            raise InputError("nothing of the scan is known, so there is nothing to restore from; are mask and hole swapped?")

    def _marked(self, value: str, kind: str) -> NDArray:
        marked, affine = self._file(value, kind)
        if marked.shape != self.placed.scan.shape or not np.allclose(affine, self.placed.affine, atol=1e-2):
            marked = resample((marked > 0).astype(np.uint8), affine, self.placed.affine, self.shape, "nearest")
        return marked > 0

    def _file(self, value: str, kind: str) -> tuple[NDArray, NDArray]:
        if not value:
            raise InputError(f"{kind} needs a file: {kind}=FILE.nii.gz")
        if not Path(value).is_file():
            raise InputError(f"{kind}={value}: no such file")
        return read_volume(Path(value))

    def _axis(self, value: str, example: str) -> tuple[int, str]:
        axis, separator, rest = value.partition(":")
        if axis not in AXES or len(axis) != 1 or not separator:
            raise InputError(f"{example.partition('=')[0]}={value}: name an axis of the file and more, as in {example}")
        return AXES.index(axis), rest


def _number(text: str, example: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(f"{example.partition('=')[0]} of {text!r} mm; give a number above 0, as in {example}")
    return number
