"""Similarity of two volumes. For pairs of one set: the more similar they are, the less variety the set has.

Neither volume of a pair is the reference, so both measures are symmetric. Volumes are (N, C, X, Y, Z) in [0, 1]. Windows
are Gaussian, of 11 voxels with a standard deviation of 1.5 (Wang et al. 2004) or of fewer where a volume is thinner, and
applied axis by axis, which in 3D takes a fortieth of the work of a full window.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm3d.errors import InputError
from ldm3d.models.blocks import full_precision

WINDOW, DEVIATION = 11, 1.5
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2
C1, C2 = 0.01**2, 0.03**2  # Wang et al. 2004, for a range of 1
EDGE_LEVEL, SMOOTH_LEVEL = 0.12, 0.06  # of the largest gradient: Li and Bovik 2010, section 3
MIN_VARIANCE = 1e-8  # of the gradient; below it a window is constant up to the rounding of float32


def num_scales(shape: tuple[int, ...]) -> int:
    """Scales of MS-SSIM for a volume of `shape` (X, Y, Z): halved until a side is below the window's 11 voxels; 1 to 5."""
    return max(min(int(math.log2(max(min(shape) / WINDOW, 1))) + 1, len(SCALE_WEIGHTS)), 1)


def ms_ssim(one: Tensor, other: Tensor) -> Tensor:
    """Multi-scale structural similarity (Wang et al. 2003, eq. 7) in 3D.

    Five scales need sides of 176 voxels. Smaller volumes get the first scales only, as many as `num_scales` says, with their
    weights divided by their sum; so figures of different shapes are not comparable. A brain of 160 x 224 x 160 has 4 scales.

    Args:
        one, other: (N, C, X, Y, Z) in [0, 1].

    Returns:
        (N,), 1 for equal volumes; never below 0, as a negative mean at any scale counts as 0.
    """
    _check_shapes(one, other)
    one, other = full_precision(one), full_precision(other)
    weights = SCALE_WEIGHTS[: num_scales(tuple(one.shape[2:]))]
    product = torch.ones(len(one)).to(one)
    for scale, weight in enumerate(weights):
        if scale:
            one, other = F.avg_pool3d(one, 2), F.avg_pool3d(other, 2)
        (mean_x, mean_y), variances, covariance = _moments(one, other)
        similarity = (2 * covariance + C2) / (sum(variances) + C2)  # contrast and structure
        if scale == len(weights) - 1:
            similarity = similarity * (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)  # luminance
        product = product * similarity.flatten(1).mean(dim=1).relu() ** (weight / sum(weights))
    return product


def four_g_r_ssim(one: Tensor, other: Tensor) -> Tensor:
    """4-G-R-SSIM: structure of gradients, in four kinds of region with equal weights, in 3D.

    - G (Chen et al. 2006): volumes are replaced by the magnitude of their gradient, by Sobel's operator along three axes.
    - R (Rouse and Hemami 2008): of SSIM's three factors only the last stays, the correlation r* in each window; 1 where
      both gradients are constant in it, 0 where one is.
    - 4 (Li and Bovik 2010): r* is averaged over edges of both volumes (gradient above 0.12 of the largest in
      either volume), edges of one of them, smooth places (below 0.06 in both) and textures (the rest), and then over the four
      with equal weights; a kind of region that does not occur leaves its weight to the others.

    Li and Bovik take thresholds, and what is smooth, from the reference alone; here from both volumes. Renieblas et
    al. 2017 compare this family on radiographs and MRI, in 2D.

    Args:
        one, other: (N, C, X, Y, Z) in [0, 1].

    Returns:
        (N,), from -1 to 1, 1 for equal volumes.
    """
    _check_shapes(one, other)
    x, y = _sobel_gradient(full_precision(one)), _sobel_gradient(full_precision(other))
    _, (variance_x, variance_y), covariance = _moments(x, y)
    constant_x, constant_y = variance_x < MIN_VARIANCE, variance_y < MIN_VARIANCE
    r = (covariance / (variance_x * variance_y).clamp_min(MIN_VARIANCE**2).sqrt()).clamp(-1, 1)
    r = torch.where(constant_x & constant_y, 1.0, torch.where(constant_x | constant_y, 0.0, r))

    largest = torch.maximum(x, y).amax(dim=(1, 2, 3, 4), keepdim=True)
    x, y = (_middle(gradient, r.shape[2:]) for gradient in (x, y))
    edge_x, edge_y = x > EDGE_LEVEL * largest, y > EDGE_LEVEL * largest
    smooth = (x < SMOOTH_LEVEL * largest) & (y < SMOOTH_LEVEL * largest)
    regions = torch.stack([edge_x & edge_y, edge_x ^ edge_y, smooth, ~(edge_x | edge_y | smooth)]).flatten(2)  # (4, N, V)
    sizes = regions.sum(dim=2)
    means = (regions * r.flatten(1)).sum(dim=2) / sizes.clamp_min(1)
    return means.sum(dim=0) / (sizes > 0).sum(dim=0)


def _check_shapes(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape or one.ndim != 5 or min(one.shape[2:]) < 4:
        raise InputError(
            f"volumes of {tuple(one.shape)} and {tuple(other.shape)} cannot be compared; give two of one shape "
            "(N, C, X, Y, Z) with sides of 4 voxels or more"
        )


def _moments(x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Means, variances and covariance in the window around each place where it fits."""
    mean_x, mean_y, xx, yy, xy = (_blur(v) for v in (x, y, x * x, y * y, x * y))
    return (mean_x, mean_y), (xx - mean_x**2, yy - mean_y**2), xy - mean_x * mean_y


def _blur(x: Tensor) -> Tensor:
    """Gaussian windows that fit into the volume: (N, C, X, Y, Z) -> (N, C, X - 10, Y - 10, Z - 10)."""
    side = min(WINDOW, *x.shape[2:])
    side -= (side + 1) % 2
    offsets = torch.arange(side, device=x.device, dtype=x.dtype) - side // 2
    window = (-(offsets**2) / (2 * DEVIATION**2)).exp()
    return _along_axes(x, [window / window.sum()] * 3)


def _sobel_gradient(x: Tensor) -> Tensor:
    """Magnitude of the gradient in intensity per voxel by Sobel's operator, one voxel less at each face."""
    smooth, slope = x.new_tensor([1, 2, 1]) / 4, x.new_tensor([-1, 0, 1]) / 2
    parts = (_along_axes(x, [slope if axis == along else smooth for axis in range(3)]) for along in range(3))
    return sum((part**2 for part in parts), x.new_zeros(())).sqrt()


def _along_axes(x: Tensor, kernels: list[Tensor]) -> Tensor:
    """Correlation with one kernel along each axis, where they fit.

    Sums of shifted volumes, in place: PyTorch's own convolution of one channel takes ten times as long on a CPU.
    """
    for axis, kernel in enumerate(kernels, start=2):
        length = x.shape[axis] - len(kernel) + 1
        total = torch.zeros_like(x.narrow(axis, 0, length))
        for start, weight in enumerate(kernel.tolist()):
            total.add_(x.narrow(axis, start, length), alpha=weight)
        x = total
    return x


def _middle(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The middle of a volume, in `shape`."""
    for axis, side in enumerate(shape, start=2):
        x = x.narrow(axis, (x.shape[axis] - side) // 2, side)
    return x
