"""Linear operators of volumes: how a scan comes from what was there. Each with its transpose, for CPU or GPU tensors.

Legend: x a volume or a batch of them, (..., X, Y, Z); A x its measurement, (..., X', Y', Z'); <A x, y> = <x, A' y>. Axes are
named 0, 1, 2 for X, Y, Z.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from ldm3d.errors import InputError, choose

PROFILES = ("box", "gaussian")
FWHM = math.sqrt(8 * math.log(2))  # full width at half maximum of a Gaussian, in standard deviations


class Linear(ABC):
    """A linear map of volumes, A."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def transpose(self, y: Tensor) -> Tensor:
        """A' y."""


class Identity(Linear):
    """A = 1: what is only noisy."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def transpose(self, y: Tensor) -> Tensor:
        return y


class Scaled(Linear):
    """Every voxel times its own factor: a mask (0 and 1), or a bias field.

    Args:
        factors: broadcasts against volumes, (X, Y, Z).
    """

    def __init__(self, factors: Tensor):
        self.factors = factors

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factors.to(x)

    def transpose(self, y: Tensor) -> Tensor:
        return y * self.factors.to(y)


class Along(Linear):
    """A matrix along one axis: any blur, slice profile or downsampling in that direction.

    Args:
        axis: 0, 1 or 2.
        matrix: (n', n), from the n voxels of that axis.

    Raises:
        InputError: another axis.
    """

    def __init__(self, axis: int, matrix: Tensor):
        if axis not in (0, 1, 2):
            raise InputError(f"axis is {axis!r}; use 0, 1 or 2 for X, Y, Z")
        self.axis, self.matrix = axis, matrix

    def __call__(self, x: Tensor) -> Tensor:
        return self._applied(self.matrix, x)

    def transpose(self, y: Tensor) -> Tensor:
        return self._applied(self.matrix.T, y)

    def _applied(self, matrix: Tensor, x: Tensor) -> Tensor:
        return (x.movedim(self.axis - 3, -1) @ matrix.T.to(x)).movedim(-1, self.axis - 3)


class Chain(Linear):
    """Operators one after another: Chain(a, b) x = b(a(x))."""

    def __init__(self, *operators: Linear):
        self.operators = operators

    def __call__(self, x: Tensor) -> Tensor:
        for operator in self.operators:
            x = operator(x)
        return x

    def transpose(self, y: Tensor) -> Tensor:
        for operator in reversed(self.operators):
            y = operator.transpose(y)
        return y


class Sampled(Linear):
    """Linear interpolation at the voxels of another lattice, which may be turned; 0 outside of the volume.

    Args:
        matrix: (4, 4), from voxels of the lattice to voxels of the volume.
        shape: of the volume, (X, Y, Z).
        lattice: its shape, (X', Y', Z').
        steps: offsets in voxels of the lattice, (K, 3), over which a sample is averaged: its profile; none for points.
        weights: of these, (K,), that sum to 1.
    """

    def __init__(
        self,
        matrix: Tensor,
        shape: Sequence[int],
        lattice: Sequence[int],
        steps: Tensor | None = None,
        weights: Tensor | None = None,
    ):
        self.shape, self.lattice = tuple(shape), tuple(lattice)
        matrix = matrix.double()
        axes = [torch.arange(n, dtype=torch.float64) for n in lattice]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) @ matrix[:3, :3].T + matrix[:3, 3]
        # grid_sample counts from -1 to 1, from face to face, the last axis first
        scale = 2 / torch.tensor(self.shape, dtype=torch.float64)
        self.places = ((places + 0.5) * scale - 1).flip(-1).float()[None]  # (1, X', Y', Z', 3)
        steps = torch.zeros(1, 3) if steps is None else steps
        self.steps = (steps.double() @ matrix[:3, :3].T * scale).flip(-1).float()
        self.weights = torch.full((len(steps),), 1 / len(steps)) if weights is None else weights.float()

    def __call__(self, x: Tensor) -> Tensor:
        volumes = x.reshape(1, -1, *self.shape)  # (1, N C, X, Y, Z)
        total: Tensor | None = None
        for step, weight in zip(self.steps, self.weights):
            places = (self.places + step).to(x)
            part = weight.to(x) * grid_sample(volumes, places, mode="bilinear", padding_mode="zeros", align_corners=False)
            total = part if total is None else total + part
        assert total is not None
        return total.reshape(*x.shape[:-3], *self.lattice)

    def transpose(self, y: Tensor) -> Tensor:
        """A' y, the gradient of <A x, y>; itself without a gradient."""
        with torch.enable_grad():
            x = torch.zeros(*y.shape[:-3], *self.shape, dtype=y.dtype, device=y.device, requires_grad=True)
            return torch.autograd.grad(self(x), x, y.detach())[0]


def mask(known: Tensor) -> Scaled:
    """Keeps what is known and sets the rest to 0; known (X, Y, Z), true or 1 where it is.

    Raises:
        InputError: nothing is known.
    """
    if not known.any():
        raise InputError("the mask keeps no voxel, so there is nothing to restore from; swap what is known and unknown?")
    return Scaled((known > 0.5).float())


def missing(shape: Sequence[int], axis: int, slices: Sequence[int]) -> Scaled:
    """A mask without some slices.

    Raises:
        InputError: no such axis or slice.
    """
    if axis not in (0, 1, 2):
        raise InputError(f"axis is {axis!r}; use 0, 1 or 2 for X, Y, Z")
    if wrong := [n for n in slices if not 0 <= n < shape[axis]]:
        raise InputError(f"slices {wrong} are missing, and axis {axis} has slices 0 to {shape[axis] - 1}")
    known = torch.ones(*shape)
    known.index_fill_(axis, torch.tensor(list(slices), dtype=torch.long), 0)
    return mask(known)


def blur(axis: int, count: int, fwhm: float) -> Along:
    """A Gaussian along an axis of `count` voxels, with its full width at half maximum in voxels; the border is repeated."""
    if not fwhm > 0:
        raise InputError(f"a blur of {fwhm:g} voxels is none; give more than 0")
    # Means of the Gaussian over each voxel; outside of the volume its outermost voxel goes on
    return Along(axis, _profile(torch.arange(count, dtype=torch.float64), count, fwhm, "gaussian"))


def slices(
    axis: int,
    count: int,
    thickness: float,
    distance: float | None = None,
    profile: str = "gaussian",
    first: float | None = None,
) -> Along:
    """Thick slices along an axis, and what is between them is lost: the slice profile and the downsampling at once.

    Args:
        axis: across the slices.
        count: voxels of the volume along it.
        thickness: of a slice in voxels, above 0: full width at half maximum of its profile.
        distance: of the slices' middles in voxels; None for the thickness. Larger: a gap.
        profile: "gaussian", or "box".
        first: the first slice's middle, in voxels; None for slices that lie in the middle of the volume.

    Raises:
        InputError: a thickness or distance that is not above 0, or an unknown profile.
    """
    distance = thickness if distance is None else distance
    if not (thickness > 0 and distance > 0):
        raise InputError(f"slices {thickness:g} voxels thick, {distance:g} apart; both must be above 0")
    total = max(int(count / distance + 1e-6), 1)
    begin = (count - 1 - (total - 1) * distance) / 2 if first is None else first
    middles = begin + distance * torch.arange(total, dtype=torch.float64)
    return Along(axis, _profile(middles, count, thickness, profile))


def _profile(middles: Tensor, count: int, width: float, kind: str) -> Tensor:
    """Shares (n', count) of the voxels in samples at `middles`, as wide as `width`; rows sum to 1."""
    choose("slice profile", kind, PROFILES)
    reach = math.ceil(3 * width) + 1
    faces = torch.arange(-reach, count + reach + 1, dtype=torch.float64) - 0.5
    distance = faces - middles[:, None]
    below = torch.special.ndtr(distance * FWHM / width) if kind == "gaussian" else (distance / width + 0.5).clamp(0, 1)
    share = below.diff(dim=1)
    inside = share[:, reach : reach + count].clone()
    inside[:, 0] += share[:, :reach].sum(dim=1)
    inside[:, -1] += share[:, reach + count :].sum(dim=1)
    return (inside / inside.sum(dim=1, keepdim=True)).float()


def between(axis: int, middles: Tensor, count: int) -> Along:
    """Linear interpolation between samples at increasing `middles` (n',), in voxels, to `count` voxels: a plain way back."""
    places = torch.arange(count, dtype=middles.dtype).clamp(middles[0], middles[-1])
    upper = torch.searchsorted(middles, places).clamp(1, max(len(middles) - 1, 1))
    matrix = torch.zeros(count, len(middles))
    if len(middles) == 1:
        return Along(axis, matrix + 1)
    share = ((places - middles[upper - 1]) / (middles[upper] - middles[upper - 1])).float()
    rows = torch.arange(count)
    matrix[rows, upper - 1], matrix[rows, upper] = 1 - share, share
    return Along(axis, matrix)


def cubic_between(axis: int, middles: Tensor, count: int) -> Along:
    """The same by cubic convolution (Keys 1981, a = -1/2), for evenly spaced `middles`; the first and last are repeated."""
    last = len(middles) - 1
    if last == 0:
        return between(axis, middles, count)
    places = torch.arange(count, dtype=middles.dtype).clamp(middles[0], middles[-1])
    at = (places - middles[0]) / (middles[1] - middles[0])  # in samples
    base, matrix, rows = at.floor().long(), torch.zeros(count, len(middles)), torch.arange(count)
    for near in range(-1, 3):
        d = (at - (base + near)).abs()
        inner, outer = (1.5 * d - 2.5) * d**2 + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
        weight = torch.where(d <= 1, inner, torch.where(d < 2, outer, 0)).float()
        matrix.index_put_((rows, (base + near).clamp(0, last)), weight, accumulate=True)
    return Along(axis, matrix)


def bias_field(shape: Sequence[int], weights: Tensor) -> Scaled:
    """A smooth field of factors, exp(sum w cos cos cos), with the lowest cosines of each axis.

    Args:
        shape: (X, Y, Z).
        weights: w (I, J, K) of the products of cosines 0 .. I-1, 0 .. J-1, 0 .. K-1; the natural logarithm of the factors.
    """
    field = weights
    for axis, n in enumerate(shape):
        waves = torch.arange(weights.shape[axis])
        cosines = torch.cos(math.pi * (torch.arange(n)[:, None] + 0.5) * waves / n)  # (n, waves)
        field = Along(axis, cosines)(field)
    return Scaled(field.exp())


@dataclass(frozen=True)
class Measured:
    """What was measured, y = A x + s n with n ~ N(0, 1); an `Operator` of `ldm3d.diffusion.measurement`.

    Attributes:
        linear: A.
        noise_std: s, above 0: one number, or a map that broadcasts against y.
    """

    linear: Linear
    noise_std: float | Tensor

    def __post_init__(self) -> None:
        least = float(torch.as_tensor(self.noise_std).min())
        if not least > 0:
            raise InputError(f"noise of deviation {least:g}; it must be above 0, as no scan is exact")

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def transpose(self, y: Tensor) -> Tensor:
        return self.linear.transpose(y)

    def draw(self, x: Tensor, random: torch.Generator | None = None) -> Tensor:
        """A measurement of x, with noise from a CPU generator."""
        y = self(x)
        return y + self.noise_std * torch.randn(y.shape, generator=random).to(y)
