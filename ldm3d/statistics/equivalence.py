"""What can be said of a measure of synthetic volumes, beside the same measure of real ones: a verdict, and why.

"As good as real" is a claim of equivalence, and that two sets are not told apart is no evidence for it: with few volumes
nothing is told apart. So each measure has a margin, the largest difference that is still called the same, and the claim is
made only if a 90% interval of the difference lies within it, which is two one-sided tests at 5% (TOST; Schuirmann 1987).
Margins do not depend on how many volumes there are: more volumes make the claim easier, fewer never do.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Direction = Literal["low", "high", "real"]
WITHIN, BEYOND, CLOSER, FEW = "within the margin", "beyond the margin", "closer than real", "too few to tell"

LEVEL = (0.025, 0.975)  # of the intervals of figures
REACH = 1.645  # standard errors to the end of a 90% interval: two one-sided tests at 5%
ENOUGH = 50  # volumes on either side of a measurement, or pairs, below which nothing is said to be within the margin
TENTH, STEP, SPREAD = 0.1, 0.25, 0.9  # the margins, see `measure_table.Margin`


@dataclass(frozen=True)
class Finding:
    """One measure of synthetic volumes, beside the same of real ones.

    Attributes:
        name: of the measure, a key of `MEASURES`.
        value, low, high: of synthetic volumes, with a 95% interval.
        null_low, null_high: 95% of what real volumes reach in their place, as many as those.
        excess, excess_low, excess_high: of synthetic volumes less that of real ones, with a 90% interval.
        margin: the excess may be this much on either side and still be called the same, at least 0.
        direction: "low" or "high" if that is better, "real" if the best is what real volumes have.
        real, synthetic: volumes on each side of one measurement; pairs of each for measures of pairs.
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
        """What can be said of it.

        "closer than real": outside of what real volumes reach, on the better side, or better by more than the margin; look for
        copies. "within the margin": the interval of the excess lies within the margin, and there are `ENOUGH` volumes
        for intervals to hold. "beyond the margin": the whole interval lies beyond it. Else "too few to tell".
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
        """How many volumes (or pairs) in the place of `synthetic` would tell, if the excess stayed what it is.

        The interval's width falls with the root of their number. None where a verdict has been reached, and where the
        excess is so near to the margin that more than a hundred times as many would be needed.
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
