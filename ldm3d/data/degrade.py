"""Volumes made worse at random, in voxels: what a model learns to undo. Each random number comes from the sample's generator.

The operators are those of `ldm3d.diffusion.operators`; what a scanner loses is brought back to the Grid by linear
interpolation, as a real scan of that kind is when it is placed there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ldm3d.config.conditions import Degradation
from ldm3d.diffusion.operators import Chain, Linear, between, bias_field, blur, cubic_between, slices
from ldm3d.errors import InputError

BIAS_WAVES = 3  # cosines of a bias field along each axis
ROUGHNESS = 0.35  # of a hole's surface, as a share of its radius


class WorseVolume(NamedTuple):
    """A volume that was made worse.

    Attributes:
        volume: (C, X, Y, Z); 0 where voxels are missing.
        known: (1, X, Y, Z), 1 where voxels are still measured and 0 where they are missing.
        linear: what happened to it but for noise and missing voxels, from the Grid to the Grid.
    """

    volume: Tensor
    known: Tensor
    linear: Linear


def degraded(
    volume: Tensor, spacing_mm: Sequence[float], degradations: Sequence[Degradation], rng: Generator, cubic: bool = False
) -> WorseVolume:
    """A volume after some degradations, one after the other.

    Args:
        volume: (C, X, Y, Z) in [0, 1].
        spacing_mm: of its voxels.
        degradations: in their order.
        rng: of all random numbers.
        cubic: bring a lower resolution back to the Grid by cubic interpolation: what a sceptic compares a model with.
    """
    known, operators = torch.ones(1, *volume.shape[1:]), list[Linear]()
    for each in degradations:
        low, high = each.strength
        strength = low + (high - low) * float(torch.rand((), generator=rng))
        if each.operator == "hole":
            known = known * _outside_hole(volume, spacing_mm, strength, rng)
        elif each.operator == "slices":
            known = known * _without_slices(volume.shape[1:], _axes(each, rng)[0], strength, rng)
        elif each.operator == "noise":
            volume = rician(volume, strength, rng)
        else:
            operators.append(_linear(each, volume.shape[1:], spacing_mm, strength, rng, cubic))
            volume = operators[-1](volume)
    return WorseVolume(volume * known, known, Chain(*operators))


def rician(volume: Tensor, deviation: float, rng: Generator) -> Tensor:
    """The magnitude of a volume with complex Gaussian noise (Gudbjartsson & Patz 1995, eq. 1)."""
    real, imaginary = (deviation * torch.randn(volume.shape, generator=rng) for _ in range(2))
    return torch.hypot(volume + real, imaginary)


def thick(
    axis: int, count: int, voxels: float, profile: str = "gaussian", first: float | None = None, cubic: bool = False
) -> tuple[Linear, Linear]:
    """(slices `voxels` thick along an axis, the same brought back to `count` voxels by linear or cubic interpolation)."""
    total = max(int(count / voxels + 1e-6), 1)
    first = (count - 1 - (total - 1) * voxels) / 2 if first is None else first
    measured = slices(axis, count, voxels, profile=profile, first=first)
    middles = first + voxels * torch.arange(total, dtype=torch.float64)
    return measured, Chain(measured, (cubic_between if cubic else between)(axis, middles, count))


def _linear(
    each: Degradation, shape: Sequence[int], spacing_mm: Sequence[float], strength: float, rng: Generator, cubic: bool
) -> Linear:
    """A random operator from the Grid to the Grid."""
    if each.operator == "bias":
        return bias_field(shape, strength * torch.randn(BIAS_WAVES, BIAS_WAVES, BIAS_WAVES, generator=rng) / BIAS_WAVES)
    operators: list[Linear] = []
    for axis in _axes(each, rng):
        voxels = strength / spacing_mm[axis]
        shift = float(torch.rand((), generator=rng)) - 0.5  # where the first slice lies; drawn in any case
        if each.operator == "blur":
            operators.append(blur(axis, shape[axis], voxels))
        elif voxels > 1:
            total = max(int(shape[axis] / voxels + 1e-6), 1)
            middle = (shape[axis] - 1 - (total - 1) * voxels) / 2
            operators.append(thick(axis, shape[axis], voxels, each.profile, middle + shift, cubic)[1])
    return Chain(*operators)


def _axes(each: Degradation, rng: Generator) -> list[int]:
    """The axes that a degradation is along."""
    if each.axes == "one":
        return [int(torch.randint(3, (), generator=rng))]
    return [0, 1, 2] if each.axes == "all" else ["xyz".index(each.axes)]


def _without_slices(shape: Sequence[int], axis: int, share: float, rng: Generator) -> Tensor:
    """(1, X, Y, Z): 0 in about this share of the slices across an axis, but never in all."""
    kept = torch.rand(shape[axis], generator=rng) >= share
    if not kept.any():
        kept[shape[axis] // 2] = True
    size = [1, 1, 1, 1]
    size[axis + 1] = shape[axis]
    return kept.float().reshape(size).expand(1, *shape)


def _outside_hole(volume: Tensor, spacing_mm: Sequence[float], across_mm: float, rng: Generator) -> Tensor:
    """(1, X, Y, Z): 0 in a hole of random shape around a random voxel of the foreground."""
    shape = volume.shape[1:]
    inside = (volume[0] > 0.1).flatten().nonzero()[:, 0]
    if not len(inside):
        raise InputError("a prepared volume has no foreground, so no hole can be cut into it; run `ldm3d prepare` and look")
    centre = int(inside[int(torch.randint(len(inside), (), generator=rng))])
    places = [centre // (shape[1] * shape[2]), centre // shape[2] % shape[1], centre % shape[2]]
    axes = [(torch.arange(n) - place) * mm for n, place, mm in zip(shape, places, spacing_mm)]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (3, X, Y, Z), mm
    distance = offsets.square().sum(0).sqrt()
    # The radius in each direction: smooth waves over the sphere
    waves = torch.randn(4, 3, generator=rng)
    directions = offsets / distance.clamp_min(1e-6)
    phases = 2 * math.pi * torch.rand(4, generator=rng)
    bumps = torch.einsum("kc,cxyz->kxyz", 1.5 * waves, directions) + phases[:, None, None, None]
    radius = across_mm / 2 * (1 + ROUGHNESS * bumps.sin().mean(0))
    hole = distance <= radius
    hole[tuple(places)] = True
    return (~hole)[None].float()
