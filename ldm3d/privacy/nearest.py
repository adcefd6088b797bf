"""How near is a volume to one training subject, compared with the others? Exact search; one number out of three spaces.

A distance alone says little: a blurred volume is near to everybody. So the distance to the nearest training subject is divided
by the mean distance to the next ones (after Carlini et al. 2023): `ratio` is 0 for a copy and near 1 where nobody stands out.
Its logarithm is brought to the scale of the training subjects' own, each left out in turn, and the lowest of the three spaces
is the `score`: by how many usual deviations a volume is too near to somebody. All scans of a subject count as that subject.
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
LEAST_SUBJECTS = 4
SMALLEST_RATIO = 1e-3  # below it rounding is measured
SMALLEST_SCALE = 0.02  # of logarithms of ratios: where training subjects are few, theirs may agree by chance
ROWS = 1024  # of a block


@dataclass(frozen=True)
class Nearest:
    """The training volume that a volume is nearest to, in one space.

    Attributes:
        row: which training volume; the nearest view counts.
        ratio: distance to its subject, in units of the mean distance to the next subjects.
        distance: of the volume as it is to the nearest training volume, in the space's own units.
        row_of_distance: that training volume.
    """

    row: int
    ratio: float
    distance: float
    row_of_distance: int


@dataclass(frozen=True)
class Likeness:
    """How much a volume is like one training subject.

    Attributes:
        score: the lowest over spaces, in deviations of what is usual; the lower, the more like a copy.
        space: in which it is that low.
        nearest: by space.
    """

    score: float
    space: str
    nearest: dict[str, Nearest]

    @property
    def row(self) -> int:
        """The training volume, in the space where it stands out most."""
        return self.nearest[self.space].row


class Reference:
    """Training volumes in every space.

    Args:
        features: by space, (N, D).
        subjects: whose they are, (N,), numbers from 0.
        usual: by space, (centre, scale) of the logarithm of the ratio; None measures it on these volumes.

    Raises:
        InputError: too few subjects.
    """

    def __init__(self, features: Mapping[str, Tensor], subjects: Tensor, usual: Mapping[str, Sequence[float]] | None = None):
        self.features = {space: features[space].double() for space in SPACES}
        self.subjects, self.count = subjects, int(subjects.max()) + 1
        if self.count < LEAST_SUBJECTS:
            raise InputError(
                f"{self.count} training subjects are too few to say who stands out; the audit needs {LEAST_SUBJECTS} or more"
            )
        self.neighbours = min(NEIGHBOURS, self.count - 2)  # a training subject has itself and one other fewer
        self.usual = {space: tuple(usual[space]) for space in SPACES} if usual else self._usual()

    def compare(self, views: Mapping[str, Tensor]) -> Likeness:
        """Look a volume up: by space its views, (V, D), the volume as it is first."""
        nearest = {space: self._nearest(space, views[space].double()) for space in SPACES}
        scores = {}
        for space, (centre, scale) in self.usual.items():
            scores[space] = (math.log(nearest[space].ratio) - centre) / scale
        lowest = min(scores, key=scores.__getitem__)
        return Likeness(scores[lowest], lowest, nearest)

    def _nearest(self, space: str, views: Tensor) -> Nearest:
        distances = torch.cdist(views, self.features[space])  # (V, N)
        closest = distances.amin(dim=0)
        ratio = self._ratio(self._by_subject(closest[None]))
        itself, row = distances[0].min(dim=0)
        return Nearest(int(closest.argmin()), float(ratio), float(itself), int(row))

    def is_authentic(self, likeness: Likeness, space: str) -> bool:
        """Whether the training volume nearest to a volume has a nearer neighbour among other subjects (Alaa et al. 2022)."""
        nearest = likeness.nearest[space]
        return bool(nearest.distance > self.own[space][0][nearest.row_of_distance])

    def _by_subject(self, distances: Tensor) -> Tensor:
        """Distances to volumes (n, N) -> to the nearest scan of each subject (n, subjects)."""
        where = self.subjects.expand_as(distances)
        empty = distances.new_full((len(distances), self.count), torch.inf)
        return empty.scatter_reduce(1, where, distances, "amin")

    def _ratio(self, distances: Tensor) -> Tensor:
        """Distances to subjects (n, subjects) -> (n,)."""
        nearest = distances.topk(self.neighbours + 1, dim=1, largest=False, sorted=True).values
        return (nearest[:, 0] / nearest[:, 1:].mean(dim=1).clamp_min(1e-12)).clamp_min(SMALLEST_RATIO)

    @cached_property
    def own(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By space, of each training volume: distance to the nearest other subject's, and ratio; (N,) each."""
        found = {}
        for space, features in self.features.items():
            parts = []
            for rows in torch.arange(len(features)).split(ROWS):
                distances = self._by_subject(torch.cdist(features[rows], features))
                distances[torch.arange(len(rows)), self.subjects[rows]] = torch.inf
                parts.append((distances.amin(dim=1), self._ratio(distances)))
            found[space] = tuple(map(torch.cat, zip(*parts)))
        return found

    def _usual(self) -> dict[str, tuple[float, float]]:
        """Median, and deviation by the median of absolute deviations: twins among the training subjects do not move them."""
        found = {}
        for space, (_, ratio) in self.own.items():
            logarithm = ratio.log()
            centre = logarithm.median()
            found[space] = (float(centre), max(1.4826 * float((logarithm - centre).abs().median()), SMALLEST_SCALE))
        return found
