"""Splits follow from each subject's own name, so adding subjects does not move others."""

import pandas as pd
import pytest

from ldm3d.config.data import SplitConfig
from ldm3d.data.splits import assign_splits

SHARES = SplitConfig(validation=0.1, test=0.2)


def test_splits_have_their_shares_whatever_the_order():
    subjects = [f"s{i}" for i in range(2000)]
    splits = assign_splits(subjects, SHARES)
    shares = pd.Series(splits).value_counts(normalize=True)
    # Four standard deviations of a share of 2,000
    assert shares["test"] == pytest.approx(0.2, abs=0.036) and shares["validation"] == pytest.approx(0.1, abs=0.027)
    assert assign_splits(reversed(subjects + subjects[:30]), SHARES) == splits
    assert assign_splits(subjects, SplitConfig(validation=0.1, test=0.2, seed=1)) != splits


def test_known_splits():
    """sha256("0:s0") over 2^256 is 0.182; of s1 to s5 0.728, 0.856, 0.240, 0.559 and 0.301 (by sha256sum)."""
    splits = assign_splits(["s5", "s4", "s3", "s2", "s1", "s0"], SplitConfig(validation=0.3, test=0.3))
    held_out = {"s0": "test", "s3": "test", "s4": "validation", "s5": "validation"}
    assert splits == {"s1": "train", "s2": "train", **held_out}


def test_added_scans_move_no_subject():
    subjects = [f"sub{i:03d}" for i in range(330)]
    for seed in range(5):
        rule = SplitConfig(seed=seed)
        before, after = assign_splits(subjects[:300], rule), assign_splits(subjects, rule)
        assert {subject: after[subject] for subject in before} == before and len(after) == 330


def test_who_trains_is_never_held_out_later():
    """Not even with a few subjects, of whom some are lent to a split that would be empty."""
    for seed in range(40):
        rule = SplitConfig(seed=seed, validation=0.1, test=0.1)
        subjects = [f"s{i}" for i in range(12)]
        for n in range(3, 12):
            before, after = assign_splits(subjects[:n], rule), assign_splits(subjects[: n + 1], rule)
            assert not [s for s in before if before[s] == "train" != after[s]]
            assert {"train", "validation", "test"} == {*before.values()}


def test_splits_that_stand_stay():
    kept = {"a": "test", "b": "train", "c": "validation"}
    splits = assign_splits(["a", "b", "d"], SplitConfig(validation=0, test=0), kept)
    assert splits == {**kept, "d": "train"}


@pytest.mark.parametrize(
    "n, validation, test, expected",
    [
        (3, 0.1, 0.1, {"train": 1, "validation": 1, "test": 1}),
        (3, 0.9, 0.05, {"train": 1, "validation": 1, "test": 1}),
        (3, 0.05, 0.9, {"train": 1, "validation": 1, "test": 1}),
        (1, 0.5, 0.4, {"train": 1}),
        (0, 0.1, 0.1, {}),
    ],
)
def test_few_subjects_leave_no_split_empty(n, validation, test, expected):
    for seed in range(10):
        splits = assign_splits(map(str, range(n)), SplitConfig(validation=validation, test=test, seed=seed))
        assert pd.Series(splits, dtype=object).value_counts().to_dict() == expected
