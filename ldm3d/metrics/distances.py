"""Distances between two sets of features, and metrics of nearest neighbours.

Features are (N, D): one row a volume, of any extractor (see features.py). All sums are in float64. Memory is linear in N:
distances and kernels are computed in blocks of rows. Most of these figures are biased by the number of volumes, so that they
mean little by themselves; evaluation/realism_sets.py compares each with real volumes against real volumes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.errors import InputError

Features = Tensor | NDArray

ROWS = 1024  # of a block
K_BALL, K_DENSITY = 3, 5  # neighbours: Kynkäänniemi et al. 2019 take 3, Naeem et al. 2020 take 5
MAP_SIDE, MAP_FEATURES = 6, 2048  # of spatial features


def as_features(values: Features, name: str, least: int = 2) -> Tensor:
    """`values` as a float64 tensor (N, D) on the CPU.

    Raises:
        InputError: another number of axes, fewer than `least` rows, or values that are not finite.
    """
    features = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if features.ndim != 2 or not features.shape[1]:
        raise InputError(f"{name} features are {tuple(features.shape)}; give (volumes, features), one row a volume")
    if len(features) < least:
        raise InputError(f"{len(features)} {name} volumes are too few; give {least} or more")
    broken = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(
            f"{len(broken)} {name} volumes have features that are not finite, the first in row {broken[0]}; leave them out"
        )
    return features


def check_pair(real: Features, other: Features, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both sets as by `as_features`; InputError if their features differ in number."""
    real, other = as_features(real, "real", least), as_features(other, "other", least)
    if real.shape[1] != other.shape[1]:
        raise InputError(
            f"real volumes have {real.shape[1]} features and the others {other.shape[1]}; take both from one extractor"
        )
    return real, other


def frechet_distance(real: Features, other: Features) -> float:
    """Fréchet distance of the two Gaussians with the sets' means m and covariances C (Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2). No covariance is formed: with C1 = A'A and C2 = B'B the last
    trace is the sum of the singular values of AB', which is exact for fewer volumes than features, too.

    Args:
        real, other: (N, D) and (M, D).

    Returns:
        At least 0. Biased upwards, strongly where volumes are not many times as many as features.
    """
    return _frechet(*check_pair(real, other))


def _frechet(real: Tensor, other: Tensor) -> float:
    means = (real.mean(dim=0) - other.mean(dim=0)).square().sum()
    a, b = _root(real), _root(other)
    shared = torch.linalg.svdvals(a @ b.T).sum()
    return max(float(means + a.square().sum() + b.square().sum() - 2 * shared), 0.0)


def _root(features: Tensor) -> Tensor:
    """A with A'A the covariance of the rows: (min(N, D), D)."""
    centred = (features - features.mean(dim=0)) / math.sqrt(len(features) - 1)
    return centred if len(centred) <= centred.shape[1] else torch.linalg.qr(centred, mode="r").R


def frechet_infinity(real: Features, other: Features, distance: float | None = None) -> float:
    """Fréchet distance extrapolated to infinitely many volumes (after Chong and Forsyth 2020, section 3).

    Its bias falls nearly with 1/N, so a line through the distances at N and at N/2 is followed to 1/N = 0: twice the first
    less the second, which is averaged over both halves of the sets. (A longer line, through quarters too, fits worse:
    for 2 x 1,000 volumes of one distribution of 512 features it ends at 39, this one at 0, and the distance is 133.)

    Args:
        real, other: (N, D) and (M, D), 4 rows or more each.
        distance: their Fréchet distance, if it is known already.

    Returns:
        May be below 0, by sampling error. Where the halves have fewer volumes than features, part of the bias stays,
        as real against real shows.
    """
    real, other = check_pair(real, other, 4)
    halves = [_frechet(real[i::2], other[i::2]) for i in range(2)]
    return 2 * (_frechet(real, other) if distance is None else distance) - sum(halves) / 2


def kernel_distance(real: Features, other: Features) -> float:
    """Kernel distance (Bińkowski et al. 2018): unbiased squared MMD with the kernel (x'y / D + 1)^3.

    Args:
        real, other: (N, D) and (M, D); N and M may differ.

    Returns:
        0 on average for two samples of one distribution, so a single figure may be below 0.
    """
    real, other = check_pair(real, other)
    return _squared_mmd(_polynomial, real, other)


def _polynomial(x: Tensor, y: Tensor) -> Tensor:
    base = torch.addmm(x.new_ones(()), x, y.T, alpha=1 / x.shape[1])
    return base.square().mul_(base)  # a power is ten times slower


def rbf_mmd(real: Features, other: Features, bandwidth: float | None = None) -> float:
    """Unbiased squared MMD (Gretton et al. 2012, eq. 3) with the kernel exp(-|x - y|^2 / (2 bandwidth^2)).

    Args:
        real, other: (N, D) and (M, D).
        bandwidth: in units of the features; None takes the median distance between real volumes (up to 500 of them).

    Returns:
        Between -1 and 2, 0 on average for two samples of one distribution.
    """
    real, other = check_pair(real, other)
    if bandwidth is None:
        few = real[:: -(-len(real) // 500)]
        distances = _squared_distances(few, few)[tuple(torch.triu_indices(len(few), len(few), 1))]
        bandwidth = float(distances.median().sqrt()) or 1.0  # all volumes equal: any width will do
    return _squared_mmd(lambda x, y: (_squared_distances(x, y) / (-2 * bandwidth**2)).exp(), real, other)


def _squared_mmd(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    within = []
    for z in (x, y):
        total = sum((block := kernel(z[rows], z)).sum() - block[:, rows].diagonal().sum() for rows in _blocks(z))
        within.append(total / (len(z) * (len(z) - 1)))
    across = sum(kernel(x[rows], y).sum() for rows in _blocks(x)) / (len(x) * len(y))
    return float(sum(within) - 2 * across)


def _blocks(x: Tensor) -> Iterator[slice]:
    return (slice(i, min(i + ROWS, len(x))) for i in range(0, len(x), ROWS))


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, D) and (m, D) -> (n, m)."""
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return squares.addmm_(x, y.T, alpha=-2).clamp_min_(0)


@dataclass(frozen=True)
class Neighbours:
    """Metrics of nearest neighbours.

    Attributes:
        precision: share of the others inside a ball around a real volume that reaches to its 3rd neighbour (Kynkäänniemi
            et al. 2019, eq. 2): realism.
        recall: the same with the roles exchanged: variety.
        density: mean number of such balls, up to the 5th neighbour, around one of the others, divided by 5 (Naeem et al.
            2020, eq. 3); unlike precision it is robust to the large ball of an outlier. May exceed 1.
        coverage: share of the real volumes with another one inside their ball (Naeem et al. 2020, eq. 4).
        ratio: mean distance of the others to their nearest real volume, in units of the mean distance of real volumes
            to theirs. Below 1: nearer than real volumes are to each other, as copies are.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    ratio: float


def neighbours(real: Features, other: Features) -> Neighbours:
    """Precision, recall, density, coverage and distance to the nearest, by Euclidean distance of features.

    Args:
        real, other: (N, D) and (M, D), 6 rows or more each.
    """
    real, other = check_pair(real, other, K_DENSITY + 1)
    centre = real.mean(dim=0)  # squares are summed, and rounding grows with them
    real, other = real - centre, other - centre
    real_radii, other_radii = _radii(real), _radii(other)  # (N, 5), (M, 5)
    inside_other = torch.zeros(len(real), dtype=torch.bool)
    nearest_other = torch.full((len(real),), math.inf, dtype=real.dtype)
    inside = balls = nearest = 0.0
    for rows in _blocks(other):
        distances = _squared_distances(other[rows], real)  # (rows, N)
        inside += float((distances <= real_radii[:, K_BALL - 1]).any(dim=1).sum())
        balls += float((distances < real_radii[:, K_DENSITY - 1]).sum())
        nearest += float(distances.amin(dim=1).sqrt().sum())
        inside_other |= (distances <= other_radii[rows, K_BALL - 1, None]).any(dim=0)
        nearest_other = nearest_other.minimum(distances.amin(dim=0))
    usual = float(real_radii[:, 0].sqrt().mean())
    return Neighbours(
        precision=inside / len(other),
        recall=float(inside_other.double().mean()),
        density=balls / (K_DENSITY * len(other)),
        coverage=float((nearest_other < real_radii[:, K_DENSITY - 1]).double().mean()),
        ratio=nearest / len(other) / max(usual, 1e-12),
    )


def _radii(x: Tensor) -> Tensor:
    """Squared distances to the 1st to 5th neighbour, not counting the volume itself: (N, 5)."""
    found = []
    for rows in _blocks(x):
        distances = _squared_distances(x[rows], x)
        distances[:, rows].fill_diagonal_(math.inf)
        found.append(distances.topk(K_DENSITY, dim=1, largest=False).values)
    return torch.cat(found)


def spread_ratio(real: Features, other: Features) -> float:
    """Mean distance of two of the others, in units of that of two real volumes (Rao's diversity of each set, 1982, eq. 2.1).

    Args:
        real, other: (N, D) and (M, D).

    Returns:
        1 for as much variety as real volumes have; 0.9 if each feature deviates a tenth less from its mean.
    """
    means = []
    for x in check_pair(real, other):
        x = x - x.mean(dim=0)  # squares are summed, and rounding grows with them
        total = 0.0
        for rows in _blocks(x):
            distances = _squared_distances(x[rows], x)
            distances[:, rows].fill_diagonal_(0)
            total += float(distances.sqrt().sum())
        means.append(total / (len(x) * (len(x) - 1)))
    return means[1] / max(means[0], 1e-12)


def inception_score(probabilities: Features) -> float:
    """Inception score (Salimans et al. 2016): exp of the mean of KL(p(y|x) || p(y)).

    Args:
        probabilities: (N, classes), of each volume by a classifier; rows sum to 1.

    Returns:
        From 1 (all volumes alike to the classifier) to the number of classes (certain of each, and all equally frequent).

    Raises:
        InputError: rows that are not probabilities.
    """
    p = as_features(probabilities, "classified", 1)
    if (p < 0).any() or ((p.sum(dim=1) - 1).abs() > 1e-3).any():
        raise InputError(
            f"rows of probabilities must be at least 0 and sum to 1, and one sums to {float(p.sum(dim=1).max()):g} with a "
            f"smallest value of {float(p.min()):g}; apply softmax to a classifier's logits"
        )
    divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(dim=0))
    return math.exp(divergence.sum(dim=1).mean())


def spatial_features(maps: Tensor) -> Tensor:
    """Features with positions, for the spatial Fréchet distance (Nash et al. 2021, section 4.1: sFID).

    As there, the first few channels of a network's feature map, each position a feature of its own, so many that
    the number stays that of ordinary features. In 3D, maps are averaged to at most 6 positions an axis first.

    Args:
        maps: (N, C, x, y, z), or (N, C, x, y).

    Returns:
        (N, positions * channels), at most 2048 features.
    """
    sides = tuple(min(side, MAP_SIDE) for side in maps.shape[2:])
    pool: Callable[..., Tensor] = F.adaptive_avg_pool3d if len(sides) == 3 else F.adaptive_avg_pool2d
    return pool(maps[:, : max(MAP_FEATURES // math.prod(sides), 1)], sides).flatten(1)
