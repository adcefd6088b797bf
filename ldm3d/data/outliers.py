"""Numbers that no measurement explains: codes such as -9999 that stand for a missing value, and slips of the unit.

Judged by the column's other numbers, so that skewed volumes, constant columns and tables of three people are left in peace.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

_SPREAD = 100  # robust standard deviations: skewed volumes come this far, so logarithms have a say, too
_SPREAD_OF_LOGARITHMS = 10
_SPREAD_OF_ANY_SIGN = 1000  # changes and ratios have heavy tails, and no logarithms to tell
_LEAST = 8  # numbers that a spread is judged by
_NEGATIVE_CODES = {-1, -3, -4, -7, -8, -9}  # of surveys and cohorts, where nothing else is negative
_LIMITS = {-32768, 32767, -(2**31), 2**31 - 1}  # of integers, which programs write for want of a number


def implausible(values: Iterable[float]) -> Counter[float]:
    """Which numbers of a column cannot be measurements like the others, and how often each stands there.

    Codes: repeated 7, 8 or 9 (99, -999, 8888) and the limits of integers, farther from all others than these are from each
    other; any negative one where all others are 0 or more, -1, -3, -4, -7, -8 and -9 among them where
    half of these are three times as large. Any number: beyond 100
    robust standard deviations (1.4826 MAD) from the median and, where all are positive, beyond 10 of their logarithms;
    beyond 1000 where they are of either sign.
    """
    counts = Counter(values)
    others = sorted(value for value in counts if not _is_code(value))
    found = {value for value in counts if _is_code(value) and _stands_apart(value, others)}
    rest = [value for value, count in counts.items() if value not in found for _ in range(count)]
    found |= set(_far(rest))
    return Counter({value: counts[value] for value in found})


def _is_code(value: float) -> bool:
    if value in _NEGATIVE_CODES or value in _LIMITS:
        return True
    digits = f"{abs(value):.0f}"
    return value == int(value) and 2 <= len(digits) <= 9 and digits[0] in "789" and len(set(digits)) == 1


def _stands_apart(code: float, others: Sequence[float]) -> bool:
    """Whether a code is none of the measurements; `others` are all different numbers that are no codes, in order."""
    if len(others) < (5 if 0 < code < 100 else 2):  # 99 may be an age
        return False
    low, high = others[0], others[-1]
    if code < 0 <= low:
        return code <= -10 or median(others) >= -3 * code  # -1 may belong to a scale of -1, 0, 1
    return abs(code) >= 10 and max(low - code, code - high) > high - low


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
