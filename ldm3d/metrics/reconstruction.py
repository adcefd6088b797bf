"""Measures of volumes and of agreement; each is a number per volume or per list, with its source."""

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE = 2  # voxels around what a volume shows that belong to its foreground
NOISE, EMPTY = 0.1, 0.1  # intensity of noise in air; share of voxels at 0 in a volume whose air has none


def foreground(volume: Tensor) -> Tensor:
    """Where a volume shows something: above 0, and `EDGE` voxels around that, so that what spills over the edge counts.

    Air is easy, and whoever gets it right gets a better figure for every empty voxel of the grid. Around a stripped brain it
    is exactly 0. Where next to nothing is, air is noise, and what is above a tenth of the range counts, as in preparation.

    Args:
        volume: (N, C, X, Y, Z) in [0, 1].

    Returns:
        The same shape, bool. A volume that is empty is foreground throughout.
    """
    noisy = (volume == 0).flatten(1).float().mean(dim=1) < EMPTY
    level = torch.where(noisy, NOISE, 0.0).view(-1, 1, 1, 1, 1)
    shown = F.max_pool3d((volume > level).float(), 2 * EDGE + 1, stride=1, padding=EDGE) > 0
    return shown | ~shown.flatten(1).any(dim=1).view(-1, 1, 1, 1, 1)


def psnr(volume: Tensor, reference: Tensor, where: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each sample in dB, -10 log10(mean squared error), for a peak of 1.

    Args:
        volume: (N, C, X, Y, Z), clipped to [0, 1] first.
        reference: (N, C, X, Y, Z) in [0, 1].
        where: voxels that count, of the same shape, from `foreground`; None: all.

    Returns:
        (N,); at most 120, for equal volumes.
    """
    error = _mean((volume.float().clamp(0, 1) - reference.float()).square(), where)
    return -10 * torch.log10(error.clamp_min(1e-12))


def ssim(volume: Tensor, reference: Tensor, where: Tensor | None = None) -> Tensor:
    """Structural similarity of each sample (Wang et al. 2004), MONAI's, in 3D with a Gaussian window of up to 11 voxels.

    Args:
        volume, reference: (N, C, X, Y, Z) in [0, 1].
        where: centres of the windows that count, of the same shape, from `foreground`; None: all.

    Returns:
        (N,), 1 for equal volumes. Windows lie in the volume, so centres nearer to a face than half of one do not count.
    """
    from monai.metrics.regression import compute_ssim_and_cs  # takes seconds, which training need not wait for

    side = min(11, *volume.shape[2:])
    side -= (side + 1) % 2
    similarity, _ = compute_ssim_and_cs(volume.float(), reference.float(), 3, [side] * 3, [1.5] * 3)
    inside = slice(side // 2, -(side // 2) or None)
    return _mean(similarity, None if where is None else where[..., inside, inside, inside])


def _mean(values: Tensor, where: Tensor | None) -> Tensor:
    """Of each sample where it counts: (N, C, X, Y, Z) -> (N,); NaN where nothing does."""
    if where is None:
        return values.flatten(1).mean(dim=1)
    return (values * where).flatten(1).sum(dim=1) / where.flatten(1).sum(dim=1)
