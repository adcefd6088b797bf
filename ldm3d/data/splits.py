"""Who trains, who validates and who tests: every subject's own hash says it, so that nobody moves when others come."""

import hashlib
from collections.abc import Iterable, Mapping

from ldm3d.config.data import SplitConfig

TRAIN, VALIDATION, TEST = "train", "validation", "test"


def assign_splits(subjects: Iterable[str], splits: SplitConfig, kept: Mapping[str, str] | None = None) -> dict[str, str]:
    """Split every subject into "train", "validation" or "test", all of its scans together.

    A hash of seed and name, as a number in [0, 1), is compared with the shares: below `test` a subject tests, below `test` +
    `validation` it validates, else it trains. That depends on nobody else, so shares are met on average only.

    From three subjects on, a split with a share is not left empty: the lowest numbers test, the next ones validate. Then,
    too, subjects that are added may bring somebody from a held-out split to training, but nobody from training to a held-out
    split. Somebody has to train: where nobody would, those with the highest numbers do.

    Args:
        subjects: labels.
        splits: shares and seed.
        kept: splits that stand already, by subject; they stay as they are, and the rule is for the others.
    """
    kept = dict(kept or {})
    numbers = {subject: _number(subject, splits.seed) for subject in {*subjects} - kept.keys()}
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


def _number(subject: str, seed: int) -> float:
    """From 0 to 1, alike for any subject and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{subject}".encode()).digest(), "big") / 2**256
