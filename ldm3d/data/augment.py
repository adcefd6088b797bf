"""Training volumes that differ as scans do, and volumes painted from label maps alone, in contrasts that no scanner has.

A network that learns to segment these does not rely on the intensities of a tissue, so it reads scans of other scanners and
generated volumes too (Billot et al. 2023, SynthSeg).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

# FreeSurfer's labels of the right hemisphere and theirs of the left: both sides of a structure have one intensity
LEFT_OF = {
    **{right: right - 39 for right in (41, 42, 43, 44)},
    **{right: right - 39 for right in (46, 47)},
    **{49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18, 58: 26, 60: 28, 62: 30, 63: 31},
}
DEVIATION = 0.06  # most that the intensities of one label vary by, of the range
ROTATION_DEGREES, SCALING, SHIFT_MM = 8.0, 0.08, 6.0  # standard deviations of a random placing


def vary(volume: NDArray, random: np.random.Generator) -> NDArray:
    """A volume (C, X, Y, Z) in [0, 1] with random bias field, contrast, blur, resolution and noise, clipped to [0, 1]."""
    from monai import transforms  # the import takes seconds, and labels are read without it

    changes = transforms.Compose(
        [
            transforms.RandBiasField(prob=0.5, coeff_range=(-0.15, 0.15)),
            transforms.RandAdjustContrast(prob=0.5, gamma=(0.7, 1.4)),
            transforms.RandGaussianSmooth(prob=0.4, sigma_x=(0.3, 0.8), sigma_y=(0.3, 0.8), sigma_z=(0.3, 0.8)),
            transforms.RandSimulateLowResolution(prob=0.2, zoom_range=(0.5, 1.0)),
            transforms.RandGaussianNoise(prob=0.5, std=0.04),
        ]
    ).set_random_state(seed=int(random.integers(2**31)))
    gain = random.uniform(0.85, 1.15)
    return np.asarray(changes(volume * np.float32(gain)), np.float32).clip(0, 1)


def paint(points: NDArray, random: np.random.Generator) -> NDArray:
    """A volume painted from labels, each in a random intensity; what several labels share is a mixture, as in a scan.

    Args:
        points: labels at some points of each voxel, (points, X, Y, Z), see `ldm3d.data.labels.at_points`; 0 is black, and so
            is what is below. Both sides of FreeSurfer's structures have one intensity.

    Returns:
        (1, X, Y, Z), float32 in [0, 1].
    """
    labels = np.maximum(points, 0)
    count = int(labels.max()) + 1
    mean, deviation = random.uniform(0.05, 1, count), random.uniform(0, DEVIATION, count)
    for right, left in LEFT_OF.items():
        if right < count:
            mean[right], deviation[right] = mean[left], deviation[left]
    mean[0] = deviation[0] = 0
    noise = random.standard_normal(labels.shape, np.float32)
    painted = mean.astype(np.float32)[labels] + deviation.astype(np.float32)[labels] * noise
    volume = painted.mean(axis=0)[None]
    brightest = np.percentile(volume[volume > 0.02], 99.8) if (volume > 0.02).any() else 1.0
    return (volume / np.float32(brightest)).clip(0, 1)


def random_place(grid_affine: NDArray, shape: tuple[int, ...], random: np.random.Generator) -> NDArray:
    """The affine (4, 4) of a grid that is turned and scaled about its centre, and shifted, all a little."""
    centre = (grid_affine @ [*((np.array(shape) - 1) / 2), 1])[:3]
    turn = Rotation.from_euler("xyz", ROTATION_DEGREES * random.standard_normal(3), degrees=True).as_matrix()
    linear = turn * np.exp(SCALING * random.standard_normal(3))
    moved = np.array(grid_affine, np.float64)
    moved[:3, :3] = linear @ moved[:3, :3]
    moved[:3, 3] = linear @ (moved[:3, 3] - centre) + centre + SHIFT_MM * random.standard_normal(3)
    return moved
