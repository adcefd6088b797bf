"""Similarity of a volume to one training subject, compared with the others: exact search in three spaces, one score.

A distance alone is not informative: a blurred volume is near to all subjects. So the distance to the nearest training subject
is divided by the mean distance to the next ones (after Carlini et al. 2023): `ratio` is 0 for a copy, and near 1 if no subject
stands out. Its logarithm is standardised by those of the training subjects, each left out in turn. The lowest of the three
spaces is the `score`, in deviations of the training subjects. All scans of a subject count as that subject.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ldm3d.errors import InputError

SPACES = ("latent", "image", "embedding")
NEIGHBOURS = 20  # subjects after the nearest, to compare it with
MIN_SUBJECTS = 4
MIN_RATIO = 1e-3  # smaller ones are rounding errors
MIN_SCALE = 0.02  # of logarithms of ratios; those of a few training subjects may agree by chance
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Nearest:
    """The training volume that a volume is nearest to, in one space.

    Attributes:
        row: index of the training volume; the nearest view counts.
        ratio: distance to its subject, in units of the mean distance to the next subjects.
        distance: of the unchanged volume to the nearest training volume, in the units of the space.
        row_of_distance: that training volume.
    """

    row: int
    ratio: float
    distance: float
    row_of_distance: int


@dataclass(frozen=True)
class Similarity:
    """Similarity of a volume to the training subject that it is most similar to.

    Attributes:
        score: the lowest over spaces, in deviations of the training subjects; the lower, the more similar.
        space: of that score.
        nearest: by space.
    """

    score: float
    space: str
    nearest: dict[str, Nearest]

    @property
    def row(self) -> int:
        """The training volume, in the space of the score."""
        return self.nearest[self.space].row


class Reference:
    """Training volumes in every space.

    Args:
        features: by space, (N, D).
        subjects: number of the subject of each, (N,), from 0.
        usual: by space, (centre, scale) of the logarithm of the ratio; None computes it from these volumes.

    Raises:
        InputError: too few subjects.
    """

    def __init__(self, features: Mapping[str, Tensor], subjects: Tensor, usual: Mapping[str, Sequence[float]] | None = None):
        self.features = {space: features[space].double() for space in SPACES}
        self.subjects, self.count = subjects, int(subjects.max()) + 1
        if self.count < MIN_SUBJECTS:
            raise InputError(
                f"{self.count} training subjects are too few to tell whether one of them stands out; the audit needs "
                f"{MIN_SUBJECTS} or more"
            )
        self.neighbours = min(NEIGHBOURS, self.count - 2)  # without a training subject itself and its nearest
        self.usual = {space: tuple(usual[space]) for space in SPACES} if usual else self._usual()

    def similarity(self, views: Mapping[str, Tensor]) -> Similarity:
        """Of a volume, given its views by space, (V, D), the unchanged volume first."""
        nearest = {space: self._nearest(space, views[space].double()) for space in SPACES}
        scores = {}
        for space, (centre, scale) in self.usual.items():
            scores[space] = (math.log(nearest[space].ratio) - centre) / scale
        lowest = min(scores, key=scores.__getitem__)
        return Similarity(scores[lowest], lowest, nearest)

    def _nearest(self, space: str, views: Tensor) -> Nearest:
        distances = torch.cdist(views, self.features[space])  # (V, N)
        closest = distances.amin(dim=0)
        ratio = self._ratio(self._by_subject(closest[None]))
        unchanged, row = distances[0].min(dim=0)
        return Nearest(int(closest.argmin()), float(ratio), float(unchanged), int(row))

    def is_authentic(self, similarity: Similarity, space: str) -> bool:
        """Whether the training volume nearest to a volume has a nearer neighbour among other subjects (Alaa et al. 2022)."""
        nearest = similarity.nearest[space]
        return bool(nearest.distance > self.own[space][0][nearest.row_of_distance])

    def _by_subject(self, distances: Tensor) -> Tensor:
        """Distances to volumes (n, N) -> to the nearest scan of each subject (n, subjects)."""
        where = self.subjects.expand_as(distances)
        empty = distances.new_full((len(distances), self.count), torch.inf)
        return empty.scatter_reduce(1, where, distances, "amin")

    def _ratio(self, distances: Tensor) -> Tensor:
        """Distances to subjects (n, subjects) -> (n,)."""
        nearest = distances.topk(self.neighbours + 1, dim=1, largest=False, sorted=True).values
        return (nearest[:, 0] / nearest[:, 1:].mean(dim=1).clamp_min(1e-12)).clamp_min(MIN_RATIO)

    @cached_property
    def own(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By space, of each training volume: distance to the nearest other subject's, and ratio; (N,) each."""
        found = {}
        for space, features in self.features.items():
            parts = []
            for rows in torch.arange(len(features)).split(BLOCK_ROWS):
                distances = self._by_subject(torch.cdist(features[rows], features))
                distances[torch.arange(len(rows)), self.subjects[rows]] = torch.inf
                parts.append((distances.amin(dim=1), self._ratio(distances)))
            found[space] = tuple(map(torch.cat, zip(*parts)))
        return found

    def _usual(self) -> dict[str, tuple[float, float]]:
        """Median and scaled median absolute deviation, which are robust to twins among the training subjects."""
        found = {}
        for space, (_, ratio) in self.own.items():
            logarithm = ratio.log()
            centre = logarithm.median()
            found[space] = (float(centre), max(1.4826 * float((logarithm - centre).abs().median()), MIN_SCALE))
        return found
