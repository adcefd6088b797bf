"""Conformal p-values: is a score lower than the scores of held-out subjects explain (Vovk et al. 2005)?

If a volume is not a copy of a training subject, its score is exchangeable with those of held-out subjects, and

    p = (1 + number of held-out subjects with a score as low) / (1 + number of held-out subjects)

is at most a with a probability of at most a, whatever the distribution of scores. A held-out subject counts once, however
many scans it has: each of n scans counts 1 / n (as in Lee, Barber and Willett 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Rate:
    """A share with its 95% interval (Clopper and Pearson 1934): `count` of `total`."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        low, high = stats.binomtest(self.count, self.total).proportion_ci(0.95, "exact")
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {"count": self.count, "of": self.total, "share": self.value, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count} of {self.total}, {self.value:.1%} ({low:.1%} to {high:.1%})"


def p_values(scores: Sequence[float], held_out: Sequence[float], subjects: Sequence[Any]) -> list[float]:
    """p of each score, see the top of this file; `held_out` are the scores of held-out volumes, `subjects` their subjects."""
    weights, known, total = subject_weights(subjects), np.array(held_out), len(set(subjects))
    return [float((1 + weights[known <= score].sum()) / (1 + total)) for score in scores]


def subject_weights(subjects: Sequence[Any]) -> np.ndarray:
    """1 / (scans of the subject), of every scan: (N,)."""
    _, number, scans = np.unique(np.array([str(s) for s in subjects]), return_inverse=True, return_counts=True)
    return 1 / scans[number]
