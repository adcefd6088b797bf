"""Can a network tell generated from reconstructed volumes, and do generated ones vary as much?

Both are compared with reconstructions rather than with real volumes, so that the blur of the autoencoder does not count.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm3d.errors import InputError
from ldm3d.metrics.discriminability import FEWEST, classifier_auc
from ldm3d.statistics.bootstrap import Interval, relative, resamples

QUICK_VOXELS = 500_000  # of a volume: up to this size the classifier takes minutes on a CPU
BLOCK = 2**18  # voxels of all volumes that are processed at once
Z_95 = 1.96  # standard errors from the centre to the end of a 95% interval


@dataclass(frozen=True)
class Discriminability:
    """Generated beside reconstructed volumes.

    Attributes:
        people: number of them, each with a volume in either set.
        auc, auc_interval: area under the ROC curve of a classifier, cross-validated; 0.5 where it cannot tell them apart.
        variety, variety_interval: mean over voxels of the variance over people, generated over reconstructed.
    """

    people: int
    auc: float
    auc_interval: Interval
    variety: float
    variety_interval: Interval

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def is_quick(shape: Sequence[int], device: torch.device | str) -> bool:
    """Whether the classifier takes minutes, not hours, for volumes (X, Y, Z)."""
    return torch.device(device).type != "cpu" or math.prod(shape) <= QUICK_VOXELS


def tell_apart(
    reconstructed: Sequence[NDArray],
    generated: Sequence[NDArray],
    people: Sequence[Hashable],
    requested: Sequence[Hashable],
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Discriminability:
    """Train classifiers, and compare variances.

    Args:
        reconstructed, generated: volumes (C, X, Y, Z) in [0, 1].
        people, requested: who was reconstructed, and for whose covariates each one was generated. The first volume of each
            person is used, of people who have both.
        device: where classifiers are trained.
        seed: of their training.

    Raises:
        InputError: too few people.
    """
    one, other = ({person: i for i, person in reversed(list(enumerate(owners)))} for owners in (people, requested))
    both = [person for person in one if person in other]  # a person's two volumes are then in one fold
    if len(both) < FEWEST:
        raise InputError(
            f"generated and reconstructed volumes are of {len(both)} people, and a classifier needs {FEWEST}; evaluate on more"
        )
    sets = [reconstructed[one[person]] for person in both], [generated[other[person]] for person in both]
    auc = classifier_auc(*(torch.from_numpy(np.stack(each)) for each in sets), seed=seed, device=device)
    known, made = (_variances(each, resamples(range(len(both)))) for each in sets)
    variety, ends = relative(made[0], known[0], made[1:], known[1:])
    return Discriminability(len(both), auc, auc_interval(auc, len(both), len(both)), float(variety), ends)


def auc_interval(auc: float, positives: int, negatives: int) -> Interval:
    """95% interval of an area under the ROC curve (Hanley and McNeil 1982, eq. 2)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)) / (positives * negatives)
    reach = Z_95 * math.sqrt(max(variance, 0.0))
    return max(auc - reach, 0.0), min(auc + reach, 1.0)


def _variances(volumes: Sequence[NDArray], weights: NDArray) -> NDArray:
    """Sum over voxels of the variance over volumes: (1 + B,), of the volumes themselves and of each resample (B, N).

    From the inner products of volumes, in which a resample is a matter of N x N numbers.
    """
    flat, inner = [volume.reshape(-1) for volume in volumes], np.zeros((len(volumes), len(volumes)))
    for start in range(0, flat[0].size, BLOCK):
        x = np.stack([volume[start : start + BLOCK] for volume in flat]).astype(np.float32)
        x -= x.mean(axis=0)
        inner += x @ x.T
    part = np.concatenate([np.ones((1, len(volumes))), weights]) / len(volumes)  # rows sum to 1
    return part @ inner.diagonal() - ((part @ inner) * part).sum(axis=1)
