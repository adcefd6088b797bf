"""Numbers that no measurement explains: codes such as -9999 that stand for a missing value, and slips of the unit.

Judged by the column's other numbers, so that skewed volumes, constant columns and tables of three people are left in peace.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

_SPREAD = 100  # robust standard deviations: skewed volumes come this far, so logarithms have a say, too
_SPREAD_OF_LOGARITHMS = 10
_SPREAD_OF_ANY_SIGN = 10_000  # changes and ratios have heavy tails, and no logarithms to tell
_LEAST = 8  # numbers that a spread is judged by
_NEGATIVE_CODES = {-1, -3, -4, -7, -8, -9}  # of surveys and cohorts, where nothing else is negative
_LIMITS = {-32768, 32767, -(2**31), 2**31 - 1}  # of integers, which programs write for want of a number


def implausible(values: Iterable[float]) -> Counter[float]:
    """Which numbers of a column cannot be measurements like the others, and how often each stands there.

    Codes are repeated 7, 8 or 9 (99, -999, 8888, -99.9), the limits of integers, and -1, -3, -4, -7, -8 and -9. One is found
    where it lies farther from all other numbers than these lie from each other, or is the only kind of number below 0 (one
    above -10 only where half of the others are at least 10 and three times its size).
    Any other number is found beyond 100 robust standard deviations (1.4826 MAD) from the median if it is also beyond 10 of
    the logarithms'; where not all are positive, beyond 10,000.
    """
    counts = Counter(values)
    others = {value: count for value, count in counts.items() if not _is_code(value)}
    found = {value for value in counts if value not in others and _stands_apart(value, sorted(others), sum(others.values()))}
    found |= set(_far([value for value, count in counts.items() if value not in found for _ in range(count)]))
    return Counter({value: counts[value] for value in found})


def _is_code(value: float) -> bool:
    digits = f"{abs(value):.10g}".replace(".", "")
    repeated = len(digits) > 1 and digits[0] in "789" and len(set(digits)) == 1
    return repeated or value in _NEGATIVE_CODES or value in _LIMITS


def _stands_apart(code: float, others: Sequence[float], cells: int) -> bool:
    """Whether a code is none of the measurements: `others`, all different and in order, in so many cells."""
    if code < 0:
        if cells < 2:
            return False
        if others[0] >= 0:
            return code <= -10 or median(others) >= max(10, -3 * code)  # -1 may belong to a scale of -1, 0, 1
    if abs(code) < 10 or len(others) < (3 if abs(code) > 100 else 5):  # 99 may be an age
        return False
    return max(others[0] - code, code - others[-1]) > others[-1] - others[0]


def _far(values: Sequence[float]) -> list[float]:
    """Numbers beyond any spread."""
    middle = median(values) if values else 0.0
    spread = _robust_deviation(values, middle)
    if not spread:  # most are equal: a scale that starts at 0, say; the others have a spread of their own
        values = [value for value in values if value != middle]
        middle = median(values) if values else 0.0
        spread = _robust_deviation(values, middle)
    if len(values) < _LEAST or not spread:
        return []
    far = [value for value in set(values) if abs(value - middle) > _SPREAD * spread]
    if not far:
        return []
    if min(values) > 0:
        logarithms = [math.log(value) for value in values]
        centre = median(logarithms)
        limit = _SPREAD_OF_LOGARITHMS * _robust_deviation(logarithms, centre)
        return [value for value in far if abs(math.log(value) - centre) > limit]
    return [value for value in far if abs(value - middle) > _SPREAD_OF_ANY_SIGN * spread]


def _robust_deviation(values: Sequence[float], middle: float) -> float:
    return 1.4826 * median(abs(value - middle) for value in values) if values else 0.0
