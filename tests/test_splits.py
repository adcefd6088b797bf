"""Splits follow from each subject's own name, so adding subjects does not move others."""

import pandas as pd
import pytest

from ldm3d.config.data import CovariateConfig, DataConfig, SplitConfig
from ldm3d.data.bids import read_scans
from ldm3d.data.people import GROUP, SPLIT, STRATUM, people_of, split_subjects
from ldm3d.data.splits import assign_splits
from ldm3d.errors import InputError

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


def table(**columns) -> pd.DataFrame:
    """A row a scan: of one each where nothing else is said."""
    frame = pd.DataFrame(columns)
    return frame.assign(key=[f"k{i}" for i in range(len(frame))]) if "key" not in frame else frame


def data_of(**settings) -> DataConfig:
    return DataConfig(table="scans.csv", grid={"shape": (8, 8, 8), "spacing_mm": 2}, **settings)


def split(frame, kept=None, covariates=(), **settings):
    return split_subjects(frame, data_of(**settings), covariates, kept or {})


def test_groups_stay_together_whoever_is_added():
    people = [f"s{i:03d}" for i in range(300)]
    groups = [f"f{i // 3}" for i in range(300)]
    splits = split(table(subject=people, **{GROUP: groups}), group_column="family")
    assert all(len({splits[s] for s in people[i : i + 3]}) == 1 for i in range(0, 300, 3))
    assert set(splits.values()) == {"train", "validation", "test"}
    # Siblings that come first by name change nothing, with or without the splits that stand
    more = table(subject=["a0", "a1", *people], **{GROUP: ["f0", "f99", *groups]})
    for kept in ({}, splits):
        after = split(more, kept, group_column="family")
        assert {s: after[s] for s in people} == splits and after["a0"] == splits["s000"]
    alone = split(table(subject=["x", "y", "z"], **{GROUP: ["", "n/a", "f1"]}), group_column="family")
    assert len(alone) == 3  # who has no group is on their own


def test_a_group_and_a_scan_under_two_names_chain():
    frame = table(subject=["a", "b", "c", "d"], key=["k1", "k2", "k2", "k3"], **{GROUP: ["f", "f", "", ""]})
    assert people_of(frame) == {"a": "group f", "b": "group f", "c": "group f", "d": "d"}


def test_who_trained_is_not_held_out_when_found_to_belong_together():
    frame = table(subject=["a", "b"], key=["k", "k"])
    assert split(frame, {"a": "test", "b": "train"}) == {"a": "train", "b": "train"}
    assert split(frame, {"b": "validation"}) == {"a": "validation", "b": "validation"}


def test_a_column_s_splits_are_taken_and_the_rest_follow_the_rule():
    people = [f"s{i}" for i in range(60)]
    column = ["train"] * 20 + ["Test"] * 10 + ["val"] * 10 + ["n/a"] * 20
    frame = table(subject=people, **{SPLIT: column})
    splits = split(frame, split_column="fold")
    assert [splits[s] for s in people[:40]] == ["train"] * 20 + ["test"] * 10 + ["validation"] * 10
    assert {splits[s] for s in people[40:]} <= {"train", "validation", "test"}
    assert split(frame, {s: "train" for s in people}, split_column="fold")["s20"] == "test"  # the user's word counts
    with pytest.raises(InputError, match=r"column 'fold' \(data.split_column\) holds 'fold 1'; write train, validation or"):
        split(table(subject=["a"], **{SPLIT: ["fold 1"]}), split_column="fold")
    with pytest.raises(InputError, match=r"into several splits: sub-a \(sub-a train, sub-a test\)"):
        split(table(subject=["a", "a"], **{SPLIT: ["train", "test"]}), split_column="fold")
    with pytest.raises(InputError, match=r"into several splits: group f \(sub-a train, sub-b test\)"):
        split(
            table(subject=["a", "b"], **{SPLIT: ["train", "test"], GROUP: ["f", "f"]}), split_column="fold", group_column="g"
        )


AGE = CovariateConfig(name="age", kind="continuous", unit="years")
SEX = CovariateConfig(name="sex", kind="categorical", categories=("F", "M"))
RULE = SplitConfig(validation=0.1, test=0.2, stratify=("sex", "age", "site"))


def strata_table(n, sites=3):
    """Sexes, ages of six decades and sites, all crossed."""
    columns = {"sex": ["FM"[i % 2] for i in range(n)], "age": [20.0 + 10 * (i // 2 % 6) for i in range(n)]}
    columns |= {"subject": [f"s{i:04d}" for i in range(n)], f"{STRATUM}site": [f"x{i // 12 % sites}" for i in range(n)]}
    return table(**columns)


def test_strata_share_the_splits_alike_and_nobody_moves():
    frame = strata_table(720)
    splits = split(frame, None, (AGE, SEX), splits=RULE)
    by_stratum = frame.assign(split=frame["subject"].map(splits)).groupby(["sex", "age", f"{STRATUM}site"])["split"]
    held_out = by_stratum.agg(lambda found: (found == "test").sum())
    assert len(held_out) == 36 and held_out.between(3, 5).all()  # of 20 each; by the hash alone 0 to 10
    by_hash = split(frame, None, (AGE, SEX), splits=SplitConfig(validation=0.1, test=0.2))
    spread = frame.assign(split=frame["subject"].map(by_hash)).groupby(["sex", "age", f"{STRATUM}site"])["split"]
    assert not spread.agg(lambda found: (found == "test").sum()).between(3, 5).all()
    more = split(strata_table(1440), splits, (AGE, SEX), splits=RULE)
    assert {subject: more[subject] for subject in splits} == splits
    assert pd.Series(more).value_counts(normalize=True)["test"] == pytest.approx(0.2, abs=0.02)


def test_many_small_strata_have_the_shares_together():
    frame = strata_table(720, sites=60)  # one a stratum
    shares = pd.Series(split(frame, None, (AGE, SEX), splits=RULE)).value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.2, abs=0.06) and shares["validation"] == pytest.approx(0.1, abs=0.045)


def test_strata_by_other_numbers_are_refused():
    volume = CovariateConfig(name="volume_ml", kind="continuous", unit="ml")
    with pytest.raises(InputError, match="volume_ml is a number in ml; strata are by categories"):
        split(table(subject=["a"], volume_ml=[3.0]), None, (volume,), splits=SplitConfig(stratify=("volume_ml",)))


def test_split_columns_of_tables_are_read(tmp_path):
    (tmp_path / "scans.csv").write_text(
        "participant_id,path,age,fold,family,site\n01,a.nii,50,train,x,s1\n02,b.nii,60,,x,s2\n"
    )
    settings = {"split_column": "fold", "group_column": "family", "splits": {"stratify": ["site"]}}
    data = data_of(**settings).model_copy(update={"table": tmp_path / "scans.csv"})
    frame = read_scans(data, [AGE])
    assert frame[[SPLIT, GROUP, f"{STRATUM}site"]].to_numpy().tolist() == [["train", "x", "s1"], ["", "x", "s2"]]
    assert split_subjects(frame.assign(key=["1", "2"]), data, [AGE], {}) == {"01": "train", "02": "train"}
    with pytest.raises(InputError, match=r"no column 'familie' \(data.group_column\); did you mean 'family'"):
        read_scans(data.model_copy(update={"group_column": "familie"}), [AGE])


def test_defaults_leave_no_trace_in_what_is_compared():
    assert not {"split_column", "group_column", "sample"} & set(data_of().model_dump())
    assert "stratify" not in data_of().splits.model_dump()
