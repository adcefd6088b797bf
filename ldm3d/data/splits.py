"""The split of every subject, by a hash of its own label: adding subjects does not move others."""

import collections
import hashlib
import math
from collections.abc import Iterable, Mapping

from ldm3d.config.data import SplitConfig

TRAIN, VALIDATION, TEST = "train", "validation", "test"
MIN_TEST_SUBJECTS = 10  # with fewer, intervals are too wide and subgroups are not analysed


def assign_splits(
    subjects: Iterable[str],
    splits: SplitConfig,
    kept: Mapping[str, str] | None = None,
    strata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Split every subject into "train", "validation" or "test", all of its scans together.

    A hash of seed and label, as a number in [0, 1), is compared with the shares: below `test` it is "test", below `test` +
    `validation` it is "validation", else "train". It does not depend on other subjects, so shares are met on average only.

    With strata, the numbers of a stratum are not independent but evenly spread, so that its shares are met as nearly as its
    size allows. They begin at an offset of the stratum's own: many small strata together have the shares, too. A subject's
    number then depends on how many its stratum has already, so only `kept` makes it stay where it is.

    With three subjects or more, a split with a share is never empty: the lowest numbers are "test", the next "validation".
    Then added subjects may move one from a held-out split to training, but none from training to a held-out split. Training is
    never empty, either: it gets the highest number if it has none.

    Args:
        subjects: labels.
        splits: shares and seed.
        kept: existing splits, by subject; they stay as they are, and the rule is for the others.
        strata: of every subject of `subjects`, and of those in `kept` that count; None for none.
    """
    kept = dict(kept or {})
    numbers = {subject: _number(subject, splits.seed) for subject in {*subjects} - kept.keys()}
    if strata is not None:
        numbers = _spread(numbers, splits.seed, strata, kept)
    ranked = sorted(numbers, key=lambda subject: (numbers[subject], subject))
    there, enough = {*kept.values()}, len(ranked) + len(kept) >= 3
    test, held_out = (
        sum(number < share for number in numbers.values()) for share in (splits.test, splits.test + splits.validation)
    )
    least_test, least_validation = (
        int(share > 0 and enough and name not in there)
        for name, share in ((TEST, splits.test), (VALIDATION, splits.validation))
    )
    held_out = max(held_out, least_test + least_validation)
    if TRAIN not in there:
        held_out = max(0, min(held_out, len(ranked) - 1))
    test = min(max(test, least_test), max(held_out - least_validation, 0))
    names = [TEST] * test + [VALIDATION] * (held_out - test) + [TRAIN] * (len(ranked) - held_out)
    return kept | dict(zip(ranked, names))


def _spread(numbers: Mapping[str, float], seed: int, strata: Mapping[str, str], kept: Mapping[str, str]) -> dict[str, float]:
    """The numbers of each stratum in turn: (offset + k / golden ratio) mod 1, an additive recurrence of low discrepancy."""
    counts = collections.Counter(strata[subject] for subject in kept if subject in strata)
    spread = {}
    for subject in sorted(numbers, key=lambda subject: (numbers[subject], subject)):
        stratum = strata[subject]
        spread[subject] = (_number(f"stratum {stratum}", seed) + counts[stratum] * (math.sqrt(5) - 1) / 2) % 1
        counts[stratum] += 1
    return spread


def _number(subject: str, seed: int) -> float:
    """Uniform in [0, 1) over subjects and seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{subject}".encode()).digest(), "big") / 2**256
