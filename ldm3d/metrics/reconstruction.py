"""Quality of reconstructed volumes; each figure is a number per volume."""

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 2  # voxels around the object that belong to the foreground
AIR_LEVEL, EMPTY_SHARE = 0.1, 0.1  # highest intensity of noise in air; share of voxels at 0 if air has no noise


def foreground(volume: Tensor) -> Tensor:
    """Where the intensity is above 0, and `MARGIN` voxels around that, so that errors just outside of the object count.

    Air is reconstructed easily, so that figures over the whole grid improve with its size. Around a stripped brain air is
    exactly 0. If hardly any voxel is 0, air holds noise, and the foreground is above a tenth of the range, as in preparation.

    Args:
        volume: (N, C, X, Y, Z) in [0, 1].

    Returns:
        The same shape, bool. An empty volume is foreground everywhere.
    """
    noisy = (volume == 0).flatten(1).float().mean(dim=1) < EMPTY_SHARE
    level = torch.where(noisy, AIR_LEVEL, 0.0).view(-1, 1, 1, 1, 1)
    near = F.max_pool3d((volume > level).float(), 2 * MARGIN + 1, stride=1, padding=MARGIN) > 0
    return near | ~near.flatten(1).any(dim=1).view(-1, 1, 1, 1, 1)


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
        (N,), 1 for equal volumes. Windows lie within the volume, so centres nearer to a face than half a window do not count.
    """
    from monai.metrics.regression import compute_ssim_and_cs  # the import takes seconds, and training does not need it

    side = min(11, *volume.shape[2:])
    side -= (side + 1) % 2
    similarity, _ = compute_ssim_and_cs(volume.float(), reference.float(), 3, [side] * 3, [1.5] * 3)
    inside = slice(side // 2, -(side // 2) or None)
    return _mean(similarity, None if where is None else where[..., inside, inside, inside])


def _mean(values: Tensor, where: Tensor | None) -> Tensor:
    """Mean of each sample over `where`: (N, C, X, Y, Z) -> (N,); NaN if that is empty."""
    if where is None:
        return values.flatten(1).mean(dim=1)
    return (values * where).flatten(1).sum(dim=1) / where.flatten(1).sum(dim=1)
