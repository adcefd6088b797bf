"""Brains that have lost their anatomy in ways that an eye sees at once, for judges to be tested on.

Each takes a volume (X, Y, Z) in [0, 1], which is 0 outside of the brain, and random numbers.
"""

import numpy as np
from scipy.ndimage import binary_erosion, gaussian_filter

BLOCK = 4  # voxels


def shuffled(volume, random):
    """Blocks of the inside in another order."""
    corners = np.argwhere(np.ones([n // BLOCK for n in volume.shape])) * BLOCK
    blocks = [tuple(slice(start, start + BLOCK) for start in corner) for corner in corners]
    inside = [block for block in blocks if (volume[block] > 0).mean() > 0.9]
    changed = volume.copy()
    for k, block in zip(random.permutation(len(inside)), inside):
        changed[block] = volume[inside[k]]
    return changed


def _filled(volume, values):
    """The inside replaced by other values, of the same mean and deviation."""
    inside = binary_erosion(volume > 0)
    new, old = values[inside], volume[inside]
    changed = volume.copy()
    changed[inside] = ((new - new.mean()) / new.std() * old.std() + old.mean()).clip(0, 1)
    return changed


def scrambled(volume, random):
    """The inside with its own spectrum and random phases."""
    inside = binary_erosion(volume > 0)
    spectrum = np.abs(np.fft.fftn(np.where(inside, volume - volume[inside].mean(), 0)))
    phases = np.fft.fftn(random.standard_normal(volume.shape))
    return _filled(volume, np.fft.ifftn(spectrum * phases / np.abs(phases)).real)


def grain(volume, random):
    """White noise inside."""
    return _filled(volume, random.standard_normal(volume.shape))


CHANGES = {
    "as they are": lambda volume, _: volume,
    "blurred": lambda volume, _: gaussian_filter(volume, 0.5),
    **{change.__name__: change for change in (shuffled, scrambled, grain)},
}
