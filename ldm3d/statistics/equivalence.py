"""Equivalence tests: is a metric of synthetic volumes the same as that of real volumes, within a margin?

Failing to find a difference is no evidence of equivalence: with few volumes no difference is found. So each metric has an
equivalence margin, and equivalence is claimed only if the 90% interval of the difference lies within it, which amounts to two
one-sided tests at 5% (TOST; Schuirmann 1987). Margins do not depend on the number of volumes.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Direction = Literal["low", "high", "real"]
WITHIN, BEYOND, CLOSER, FEW = "within the margin", "beyond the margin", "closer than real", "too few to tell"

Z_90 = 1.645  # standard errors from the centre to the end of a 90% interval: two one-sided tests at 5%
ENOUGH = 50  # volumes on either side, or pairs, that a claim of equivalence needs


@dataclass(frozen=True)
class Finding:
    """One metric of synthetic volumes, beside the same metric of real volumes.

    Attributes:
        name: of the metric.
        value, low, high: of synthetic volumes, with a 95% interval.
        null_low, null_high: 95% interval of the metric between two sets of real volumes of the same size.
        excess, excess_low, excess_high: synthetic minus real, with a 90% interval.
        margin: equivalence margin of the excess, at least 0.
        direction: "low" or "high" if that is better, "real" if the value of real volumes is best.
        real, synthetic: volumes on each side of one measurement; number of pairs for metrics of pairs.
    """

    name: str
    value: float
    low: float
    high: float
    null_low: float
    null_high: float
    excess: float
    excess_low: float
    excess_high: float
    margin: float
    direction: Direction
    real: int
    synthetic: int

    @property
    def verdict(self) -> str:
        """Outcome of the equivalence test.

        "closer than real": better than the real volumes' interval, or better by more than the margin, as copies are.
        "within the margin": the interval of the excess lies within the margin, and there are `ENOUGH` volumes for
        intervals to hold. "beyond the margin": the whole interval lies outside. Otherwise "too few to tell".
        """
        above, below = self.excess_low > self.margin, self.excess_high < -self.margin
        if self.direction == "low" and (below or self.value < self.null_low):
            return CLOSER
        if self.direction == "high" and (above or self.value > self.null_high):
            return CLOSER
        if above or below:
            return BEYOND
        inside = -self.margin <= self.excess_low and self.excess_high <= self.margin
        return WITHIN if inside and min(self.real, self.synthetic) >= ENOUGH else FEW

    @property
    def needed(self) -> int | None:
        """Number of volumes (or pairs), instead of `synthetic`, that would decide if the excess stayed the same.

        The width of the interval falls with the square root of their number. None if the test has decided, or if the excess
        is so near to the margin that more than a hundred times as many would be needed.
        """
        if self.verdict != FEW:
            return None
        reach, room = (self.excess_high - self.excess_low) / 2, abs(self.margin - abs(self.excess))
        if not reach <= 10 * room:
            return None
        return max(math.ceil(self.synthetic * (reach / room) ** 2), ENOUGH) if room else ENOUGH

    def to_dict(self) -> dict[str, Any]:
        """All of it and the verdict, as JSON values."""
        return asdict(self) | {"verdict": self.verdict, "needed": self.needed}
