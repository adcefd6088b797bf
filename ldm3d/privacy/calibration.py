"""How near is too near: the threshold of copies, calibrated on held-out people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from ldm3d.errors import InputError
from ldm3d.privacy.nearest import SPACES, Likeness
from ldm3d.statistics.conformal import subject_weights

PLAINLY = 0.5  # of the lowest ratio among held-out subjects


@dataclass(frozen=True)
class Threshold:
    """What counts as a copy.

    Attributes:
        score: below it, a volume does.
        counted: k; the threshold is the k-th lowest score of held-out subjects.
        held_out: n, subjects.
        lowest: by space, the lowest ratio of a held-out volume. A ratio of less than half of it is a copy too, a plain one:
            counting alone cannot tell one exact copy from the volumes that are below the threshold by chance.
    """

    score: float
    counted: int
    held_out: int
    lowest: Mapping[str, float]

    @property
    def false_rate(self) -> float:
        """Expected share of new people's volumes that are called copies: k / (n + 1)."""
        return self.counted / (self.held_out + 1)

    @property
    def false_interval(self) -> tuple[float, float]:
        """95% of the share itself, which follows from who was held out: Beta(k, n + 1 - k)."""
        return tuple(map(float, stats.beta.ppf((0.025, 0.975), self.counted, self.held_out + 1 - self.counted)))

    def chance(self, copies: int, volumes: int) -> float:
        """Probability of that many or more below the threshold where nothing is copied: beta-binomial."""
        return float(stats.betabinom.sf(copies - 1, volumes, self.counted, self.held_out + 1 - self.counted))

    def is_copy(self, likeness: Likeness) -> bool:
        """Whether a volume counts as a copy."""
        return likeness.score < self.score or self.is_plain(likeness)

    def is_plain(self, likeness: Likeness) -> bool:
        """Whether a volume is less than half as far from somebody as any held-out one, in any space."""
        return any(likeness.nearest[space].ratio < PLAINLY * self.lowest[space] for space in SPACES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(likenesses: Sequence[Likeness], subjects: Sequence[Any], level: float = 0.05) -> Threshold:
    """The threshold at which a share of about `level` of new people's volumes would be called copies.

    Args:
        likenesses: of every held-out volume.
        subjects: whom they show.
        level: of false alarms. With fewer than 1 / level - 1 held-out subjects it cannot be reached: then the threshold is the
            lowest score among them, and the rate that is to be expected is `Threshold.false_rate`.

    Raises:
        InputError: nobody held out, or a level that is no share.
    """
    if not likenesses or not 0 < level < 0.5:
        raise InputError(f"{len(likenesses)} held-out volumes, level {level:g}: give one or more, and a level in (0, 0.5)")
    weights = subject_weights(subjects)
    held_out = len(set(subjects))
    counted = min(max(1, int(level * (held_out + 1) + 1e-9)), held_out)
    scores = np.array([each.score for each in likenesses])
    order = scores.argsort()
    first = int((weights[order].cumsum() > counted - 1 + 1e-9).argmax())
    lowest = {space: min(each.nearest[space].ratio for each in likenesses) for space in SPACES}
    return Threshold(float(scores[order[first]]), counted, held_out, lowest)
