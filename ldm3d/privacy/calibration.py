"""The similarity threshold below which a volume counts as a copy, calibrated on held-out people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from ldm3d.errors import InputError
from ldm3d.privacy.nearest import SPACES, Similarity
from ldm3d.statistics.conformal import subject_weights

PLAIN_RATIO = 0.5  # of a plain copy, as a part of the lowest ratio of held-out subjects


@dataclass(frozen=True)
class Threshold:
    """Which volumes count as copies.

    Attributes:
        score: volumes with a lower score are copies.
        counted: k; the threshold is the k-th lowest score of held-out subjects.
        held_out: n, their number.
        lowest: by space, the lowest ratio of a held-out volume. Volumes with less than half of it are plain copies: one exact
            copy would be lost among the volumes that are below the score by chance.
    """

    score: float
    counted: int
    held_out: int
    lowest: Mapping[str, float]

    @property
    def false_rate(self) -> float:
        """Expected share of new people's volumes that count as copies: k / (n + 1)."""
        return self.counted / (self.held_out + 1)

    @property
    def false_interval(self) -> tuple[float, float]:
        """95% interval of this share, which depends on the people who were held out: Beta(k, n + 1 - k)."""
        return tuple(map(float, stats.beta.ppf((0.025, 0.975), self.counted, self.held_out + 1 - self.counted)))

    def chance(self, copies: int, volumes: int) -> float:
        """Probability of at least as many volumes below the threshold without any copy: beta-binomial."""
        return float(stats.betabinom.sf(copies - 1, volumes, self.counted, self.held_out + 1 - self.counted))

    def is_copy(self, similarity: Similarity) -> bool:
        """Whether a volume counts as a copy."""
        return similarity.score < self.score or self.is_plain(similarity)

    def is_plain(self, similarity: Similarity) -> bool:
        """Whether the ratio of a volume is less than half of that of any held-out one, in any space."""
        return any(similarity.nearest[space].ratio < PLAIN_RATIO * self.lowest[space] for space in SPACES)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(similarities: Sequence[Similarity], subjects: Sequence[Any], level: float = 0.05) -> Threshold:
    """The threshold at which a share of about `level` of new people's volumes count as copies.

    Args:
        similarities: of every held-out volume.
        subjects: of these.
        level: of false alarms. With fewer than 1 / level - 1 held-out subjects it cannot be reached: the threshold is then the
            lowest score among them, and the expected rate is `Threshold.false_rate`.

    Raises:
        InputError: no held-out volume, or a level outside of (0, 0.5).
    """
    if not similarities or not 0 < level < 0.5:
        raise InputError(f"{len(similarities)} held-out volumes, level {level:g}: give one or more, and a level in (0, 0.5)")
    weights = subject_weights(subjects)
    held_out = len(set(subjects))
    counted = min(max(1, int(level * (held_out + 1) + 1e-9)), held_out)
    scores = np.array([each.score for each in similarities])
    order = scores.argsort()
    first = int((weights[order].cumsum() > counted - 1 + 1e-9).argmax())
    lowest = {space: min(each.nearest[space].ratio for each in similarities) for space in SPACES}
    return Threshold(float(scores[order[first]]), counted, held_out, lowest)
