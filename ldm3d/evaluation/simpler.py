"""Simpler answers than a diffusion model's: what a volume is guessed to be from the images of a subject, voxel by voxel.

They are fitted to training scans, without a network. A model that does not come nearer to the truth than they do is not worth
its training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from torch import Tensor

from ldm3d.data.batches import evenly
from ldm3d.randomness import generator

SCANS, VOXELS = 32, 2000  # that are fitted to, and of each of them
RIDGE = 1e-3  # relative to the mean variance of a feature
SHIFTS = [(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)]
WIDE = (5, 9)  # voxels across the means that tell of the surroundings


@dataclass(frozen=True)
class Simpler:
    """What is known without a model.

    Attributes:
        mean: of the training's volumes, (C, X, Y, Z).
        weights: of `features_of` and a constant, (F + 1, C): ridge regression.
    """

    mean: NDArray
    weights: NDArray

    @classmethod
    def fit(
        cls,
        made: Callable[[int], NDArray],
        given: Callable[[int], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
        scans: Sequence[int],
    ) -> "Simpler":
        """Of training scans, `SCANS` of them at most, and of `VOXELS` voxels in the foreground of each.

        Where voxels are missing in what is given, it is fitted to these: they are what is asked for.

        Args:
            made: number of a scan -> what should be made of it, (C, X, Y, Z).
            given: number of a scan -> what is given of it, by name, (c, X, Y, Z), and which voxels are there of those that
                miss some, (1, X, Y, Z).
            scans: their numbers.
        """
        total, left, right, used = 0.0, 0.0, 0.0, evenly(scans, SCANS)
        for i in used:
            truth, (volumes, measured) = made(i).astype(np.float64), given(i)
            total, features, counts = total + truth, features_of(volumes), (truth > 0).any(axis=0)
            for mask in measured.values():
                counts &= mask[0].numpy() == 0
            inside = np.flatnonzero(counts)
            chosen = inside[torch.randperm(len(inside), generator=generator("voxels of a scan", i))[:VOXELS].numpy()]
            x = np.stack([*(each.reshape(-1)[chosen] for each in features), np.ones(len(chosen))], axis=1)  # (V, F + 1)
            left, right = left + x.T @ x, right + x.T @ truth.reshape(len(truth), -1)[:, chosen].T
        ridge = RIDGE * np.trace(left) / len(left) * np.eye(len(left))
        return cls((total / len(used)).astype(np.float32), np.linalg.solve(left + ridge, right))

    def regression(self, given: Mapping[str, Tensor]) -> NDArray:
        """The volume that the regression expects, (C, X, Y, Z) in [0, 1]."""
        features = features_of(given)
        volume = np.zeros(self.mean.shape) + self.weights[-1][:, None, None, None]
        for weights, feature in zip(self.weights, features):
            volume += weights[:, None, None, None] * feature
        return volume.clip(0, 1).astype(np.float32)


def non_local_means(volume: NDArray) -> NDArray:
    """A noisy volume (C, X, Y, Z) without the noise, by scikit-image's non-local means (Buades et al. 2005).

    The noise is Rician: at a signal A the mean square of the magnitude's mean is about A^2 plus the noise's variance.

    Raises:
        ImportError: scikit-image is not installed.
    """
    from skimage.restoration import denoise_nl_means, estimate_sigma

    cleaned = []
    for channel in volume.astype(np.float64):
        sigma = float(estimate_sigma(channel))
        settings = {"patch_size": 3, "patch_distance": 4, "h": 0.8 * sigma, "sigma": sigma, "fast_mode": True}
        found = denoise_nl_means(channel, **settings)
        cleaned.append(np.sqrt(np.maximum(found**2 - sigma**2, 0)))
    return np.stack(cleaned).clip(0, 1).astype(np.float32)


def features_of(given: Mapping[str, Tensor]) -> list[NDArray]:
    """What the regression sees at each voxel, (X, Y, Z) each: intensities of it and its 26 neighbours, its square and cube,
    and means of its surroundings. What is left open counts as 0."""
    features = []
    for name in sorted(given):
        for channel in np.nan_to_num(given[name].numpy().astype(np.float64)):
            padded = np.pad(channel, 1, mode="edge")
            x_, y_, z_ = channel.shape
            near = [padded[1 + x : 1 + x + x_, 1 + y : 1 + y + y_, 1 + z : 1 + z + z_] for x, y, z in SHIFTS]
            features += [*near, channel**2, channel**3, *(uniform_filter(channel, size) for size in WIDE)]
    return features
