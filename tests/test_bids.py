"""Subject tables: what is joined, what is refused, how subjects are split; and that the validator accepts what is written."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ldm3d.config.data import CovariateConfig, DataConfig
from ldm3d.data.bids import read_scans
from ldm3d.data.derivative import derivative_files, participants_files, synthetic_path
from ldm3d.data.nifti import write_volume
from ldm3d.errors import InputError

GRID = {"shape": (8, 8, 8), "spacing_mm": 2}
AGE = CovariateConfig(name="age_years", column="age", kind="continuous", unit="years", range=(0, 110))
SEX = CovariateConfig(name="sex", kind="categorical", categories=("F", "M"))


def bids(root: Path, scans, participants: str | None = None) -> DataConfig:
    """A dataset of empty files; they are not read here."""
    for scan in scans:
        path = root / scan
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "dataset_description.json").write_text('{"Name": "test", "BIDSVersion": "1.10.0"}')
    if participants is not None:
        (root / "participants.tsv").write_text(participants)
    return DataConfig(bids=root, grid=GRID)


def anat(subject, session="", rest="T1w.nii.gz"):
    stem = f"sub-{subject}" + (f"_ses-{session}" if session else "")
    return f"sub-{subject}/" + (f"ses-{session}/" if session else "") + f"anat/{stem}_{rest}"


def table(folder: Path, text: str, name="scans.csv", encoding="utf-8", **settings) -> DataConfig:
    (folder / name).write_text(text, encoding=encoding)
    return DataConfig(table=folder / name, grid=GRID, **settings)


# BIDS


def test_scans_are_joined_with_participants(tmp_path):
    files = [anat("01"), anat("02", rest="T1w.nii"), anat("02", rest="T2w.nii.gz"), f"derivatives/strip/{anat('01')}"]
    data = bids(tmp_path, files, "participant_id\tsex\tage\nsub-02\tf\tn/a\n01\tM\t63.5\n")
    scans = read_scans(data, [AGE, SEX])
    assert list(scans.columns) == ["subject", "session", "path", "age_years", "sex"]
    assert list(scans["subject"]) == ["01", "02"] and list(scans["session"]) == ["", ""]
    assert list(scans["path"]) == [str(tmp_path / anat("01")), str(tmp_path / anat("02", rest="T1w.nii"))]
    np.testing.assert_array_equal(scans["age_years"], [63.5, np.nan])
    assert scans["age_years"].dtype == float
    assert list(scans["sex"]) == ["M", "F"]


def test_sessions_table_overrides_participants(tmp_path):
    files = [anat("01", "a"), anat("01", "b"), anat("02", "a")]
    data = bids(tmp_path, files, "participant_id\tage\tsex\nsub-01\t60\tF\nsub-02\t70\tM\n")
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\tage\nses-b\t64\nses-a\t61\n")
    scans = read_scans(data, [AGE, SEX])
    assert list(zip(scans["subject"], scans["session"])) == [("01", "a"), ("01", "b"), ("02", "a")]
    assert list(scans["age_years"]) == [61, 64, 70]
    assert list(scans["sex"]) == ["F", "F", "M"]


def test_column_may_stand_in_sessions_tables_alone(tmp_path):
    data = bids(tmp_path, [anat("01", "a"), anat("02", "a")], "participant_id\nsub-01\nsub-02\n")
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\tage\nses-a\t61\n")
    np.testing.assert_array_equal(read_scans(data, [AGE])["age_years"], [61, np.nan])


def test_a_session_without_a_row_has_no_value_of_what_the_sessions_have(tmp_path):
    data = bids(tmp_path, [anat("01", v) for v in "abc"], "participant_id\tage\tsex\nsub-01\t70\tF\n")
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\tage\nses-a\t70\nses-b\t71\n")
    with pytest.warns(UserWarning, match=r"age_years counts as missing for 1 scans, .* \(sub-01 ses-c\)"):
        scans = read_scans(data, [AGE, SEX])
    np.testing.assert_array_equal(scans["age_years"], [70, 71, np.nan])
    assert list(scans["sex"]) == ["F", "F", "F"]  # no sessions table has it


def test_a_row_a_session_in_participants(tmp_path):
    """Ages by session, with n/a where a visit has none; sex is one for all visits, wherever it is written."""
    rows = ["sub-01\tses-01\t60\tF", "sub-01\tses-02\t62\tn/a", "2\t1\t50\tM", "2\t2\tn/a\tM", "sub-03\tses-01\t40\tM"]
    files = [anat("01", "01"), anat("01", "02"), anat("02", "01"), anat("02", "02"), anat("02", "03"), anat("03")]
    data = bids(tmp_path, files, "\n".join(["participant_id\tsession_id\tage\tsex", *rows, ""]))
    with pytest.warns(UserWarning) as caught:
        scans = read_scans(data, [AGE, SEX])
    np.testing.assert_array_equal(scans["age_years"], [60, 62, 50, np.nan, np.nan, 40])
    assert list(scans["sex"]) == ["F", "F", "M", "M", "M", "M"]
    messages = [str(warning.message) for warning in caught]
    assert "1 subjects are matched with rows of the table that differ by leading zeros only (sub-02 with 2)" in messages[0]
    assert "age_years counts as missing for 1 scans" in messages[1] and "(sub-02 ses-03)" in messages[1]
    assert len(messages) == 2


def test_several_rows_of_a_subject_need_a_column_of_sessions(tmp_path):
    data = bids(tmp_path, [anat("01", "a")], "participant_id\tage\nsub-01\t50\nsub-01\t51\n")
    with pytest.raises(InputError, match="a row a session needs a column 'session_id'"):
        read_scans(data, [AGE])
    data = bids(tmp_path, [], "participant_id\tsession_id\tage\nsub-01\ta\t50\nsub-01\tses-a\t51\n")
    with pytest.raises(InputError, match="sub-01 ses-a on lines 2, 3"):
        read_scans(data, [AGE])


def test_labels_that_lost_their_zeros_are_matched_where_that_is_unique(tmp_path):
    files = [anat("001"), anat("010"), anat("07"), anat("7"), anat("0020")]
    rows = "participant_id\tage\nsub-1\t50\n10\t51\n7\t52\n20\t53\n020\t54\n"
    with pytest.warns(UserWarning) as caught:
        scans = read_scans(bids(tmp_path, files, rows), [AGE])
    assert dict(zip(scans["subject"], scans["age_years"])) == {"001": 50, "010": 51, "7": 52}
    messages = [str(warning.message) for warning in caught]
    assert "2 subjects are matched with rows" in messages[0] and "(sub-001 with 1, sub-010 with 10)" in messages[0]
    assert "for sub-0020, sub-07, several labels differ by leading zeros alone" in messages[1]


def test_no_participants_at_all(tmp_path):
    data = bids(tmp_path, [anat("01", "a"), anat("02")])
    with pytest.raises(InputError) as caught:
        read_scans(data, [AGE, SEX])
    message = str(caught.value)
    assert "has no participants.tsv, where age, sex would stand" in message and "`data.participants: PATH`" in message
    (tmp_path / "people.csv").write_text("who,age,sex\n1,50,F\n02,60,M\n")
    data = data.model_copy(update={"participants": tmp_path / "people.csv", "subject_column": "who"})
    with pytest.warns(UserWarning, match="sub-01 with 1"):
        assert list(read_scans(data, [AGE, SEX])["age_years"]) == [50, 60]


@pytest.mark.parametrize("ages, warned", [(("70", "70"), True), (("70", "71"), False), (("n/a", "n/a"), False)])
def test_one_age_at_all_visits(tmp_path, ages, warned):
    text = f"participant_id,session_id,path,age\n1,a,a.nii,{ages[0]}\n1,b,b.nii,{ages[1]}\n2,a,c.nii,50\n"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_scans(table(tmp_path, text), [AGE])
    messages = [str(warning.message) for warning in caught]
    said = "age_years is the same at all visits of 1 of 1 people with several (sub-1: 70 at 2 visits)"
    assert [said in message for message in messages] == [True] * warned


def test_no_covariates_need_no_table(tmp_path):
    assert list(read_scans(bids(tmp_path, [anat("01")]), [])["subject"]) == ["01"]


def test_scan_and_row_without_the_other_are_left_out_with_a_warning(tmp_path):
    data = bids(tmp_path, [anat("01"), anat("02")], "participant_id\tage\nsub-02\t50\nsub-03\t60\n")
    with pytest.warns(UserWarning) as caught:
        scans = read_scans(data, [AGE])
    assert list(scans["subject"]) == ["02"]
    messages = [str(warning.message) for warning in caught]
    assert "no row for 1 subjects that have scans (sub-01); their scans are left out" in messages[0]
    assert "1 subjects without a T1w scan (sub-03)" in messages[1]


@pytest.mark.parametrize(
    "participants, message",
    [
        ("", "participants.tsv is empty"),
        ("participant_id\tAge_scan\nsub-01\t50\n", "no column 'age' .*covariate age_years.*did you mean 'Age_scan'"),
        ("subject\tage\nsub-01\t50\n", "no column 'participant_id'"),
        ("participant_id\tage\nsub-01\t50\n01\t51\n", "sub-01 on lines 2, 3; keep one row"),
        ("participant_id\tage\nsub-2\t50\n", r"no row for 1 subjects .*\(sub-01\); it has rows for sub-2"),
        (
            "participant_id\tage\nsub-01\tfifty\n",
            "participants.tsv line 2 .sub-01., column 'age': 'fifty' is not a num",
        ),
        ("participant_id\tage\nsub-01\tinf\n", "'age': inf is not finite"),
        ("participant_id\tage\nsub-01\t50\t3\n", "no regular table: .*Expected 2 fields in line 2, saw 3"),
        ("participant_id\tage\tage\nsub-01\t50\t3\n", "several columns 'age'"),
    ],
)
def test_bad_participants_table(participants, message, tmp_path):
    data = bids(tmp_path, [anat("01")], participants)
    with pytest.raises(InputError, match=message):
        read_scans(data, [AGE])


def test_missing_dataset_or_scans_say_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*nowhere \(data.bids\)"):
        read_scans(DataConfig(bids=tmp_path / "nowhere", grid=GRID), [])
    with pytest.raises(InputError, match=r"looked for sub-\*/.*_T1w.nii or .nii.gz; check data.bids and data.suffix"):
        read_scans(bids(tmp_path, [anat("01", rest="T2w.nii.gz")]), [])


def test_broken_description_is_an_input_error(tmp_path):
    data = bids(tmp_path, [anat("01")])
    (tmp_path / "dataset_description.json").write_text("{")
    try:
        assert len(read_scans(data, [])) == 1
    except InputError as error:
        assert "cannot be read as a BIDS dataset" in str(error)


# Any table


def test_csv_with_byte_order_mark_sessions_and_relative_paths(tmp_path):
    text = "participant_id;session_id;path;age;sex\n007;ses-1;a/x.nii.gz;50;M\n007;ses-2;/b/y.nii;52;m\n\n008;ses-1;z.nii;;F\n"
    text = text.replace("/b/y.nii", str(tmp_path / "b/y.nii"))
    scans = read_scans(table(tmp_path, text, encoding="utf-8-sig"), [AGE, SEX])
    assert list(zip(scans["subject"], scans["session"])) == [("007", "1"), ("007", "2"), ("008", "1")]
    assert list(scans["path"]) == [str(tmp_path / "a/x.nii.gz"), str(tmp_path / "b/y.nii"), str(tmp_path / "z.nii")]
    np.testing.assert_array_equal(scans["age_years"], [50, 52, np.nan])


def test_tsv_with_root_and_named_columns(tmp_path):
    text = "ID\tfile\tage\ns1\tx.nii\t50\n"
    data = table(tmp_path, text, "t.tsv", root=tmp_path / "images", subject_column="ID", path_column="file")
    assert list(read_scans(data, [AGE])["path"]) == [str(tmp_path / "images/x.nii")]


@pytest.mark.parametrize(
    "text, settings, message",
    [
        ("participant_id,path,age\n", {}, "has a header but no rows"),
        (
            "participant_id,path,age\n1,a,5\n1,b,6\n",
            {},
            "sub-1 on lines 2, 3; .*several sessions need a column 'session_id'",
        ),
        ("participant_id,session_id,path,age\n1,x,a,5\n1,x,b,6\n", {}, "sub-1 ses-x on lines 2, 3"),
        ("participant_id,path,age\n1,a,5\n2,./a,6\n", {}, "/a on lines 2, 3; .*one file cannot be two scans"),
        ("participant_id,path,age\n1,a,5\n,b,6\n", {}, "line 3: 'participant_id' is empty"),
        ("participant_id,path,age\n1,,5\n", {}, "so there is no scan"),
        ("participant_id,file,age\n1,a,5\n", {}, r"no column 'path' \(data.path_column\)"),
        ("participant_id,path,age\n1,a,5\n", {"session_column": "visit"}, r"no column 'visit' \(data.session_column\)"),
        ("participant_id,path,age\n1,a,5\n1,2,3,4,5\n", {}, "no regular table"),
    ],
)
def test_bad_table(text, settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_scans(table(tmp_path, text, **settings), [AGE])


def test_table_that_is_no_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(InputError, match="not text in UTF-8"):
        read_scans(DataConfig(table=tmp_path / "t.csv", grid=GRID), [])
    with pytest.raises(InputError, match="no table"):
        read_scans(DataConfig(table=tmp_path / "u.csv", grid=GRID), [])


def test_all_bad_cells_are_listed_ten_at_most(tmp_path):
    rows = "".join(f"s{i},{i}.nii,{'?' if i else 50},X\n" for i in range(8))
    with pytest.raises(InputError) as caught:
        read_scans(table(tmp_path, "participant_id,path,age,sex\n" + rows), [AGE, SEX])
    message = str(caught.value)
    assert message.startswith("15 cells cannot be used:\n")
    assert "scans.csv line 3 (sub-s1), column 'age': '?' is not a number (expected years)" in message
    assert "column 'sex': 'X' is not one of F, M" in message
    assert message.count("line ") == 10 and "and 5 more" in message


def test_out_of_range_counts_as_missing_with_one_warning(tmp_path):
    data = table(tmp_path, "participant_id,path,age\n1,a,50\n2,b,999\n3,c,-1\n")
    with pytest.warns(UserWarning, match="2 cells are out of range and count as missing") as caught:
        scans = read_scans(data, [AGE])
    assert len(caught) == 1
    assert "line 3 (sub-2), column 'age': 999 is not within 0 to 110 years" in str(caught[0].message)
    np.testing.assert_array_equal(scans["age_years"], [50, np.nan, np.nan])


# Derivatives


def test_validator_accepts_a_derivative(tmp_path):
    folder = tmp_path / "generated"
    files = derivative_files("Synthetic brains", [{"Name": "ldm3d", "Version": "0.1.0"}], "None of these people exist.")
    for i in range(2):
        path = synthetic_path(folder, i)
        write_volume(path, np.random.default_rng(i).random((1, 8, 8, 8)), np.diag([2, 2, 2, 1]), "synthetic")
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text('{"SkullStripped": true}')
    participants = pd.DataFrame({"participant_id": ["sub-syn0001", "sub-syn0002"], "age": [50.5, None], "sex": ["F", None]})
    columns = {
        "age": {"Description": "Asked age", "Units": "year"},
        "sex": {"Description": "Asked sex", "Levels": {"F": "female", "M": "male"}},
    }
    for name, text in (files | participants_files(participants, columns)).items():
        (folder / name).write_text(text)
    assert synthetic_path(folder, 0) == folder / "sub-syn0001/anat/sub-syn0001_desc-synthetic_T1w.nii.gz"
    rows = "participant_id\tage\tsex\nsub-syn0001\t50.5\tF\nsub-syn0002\tn/a\tn/a\n"
    assert (folder / "participants.tsv").read_text() == rows
    description = json.loads((folder / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative" and description["GeneratedBy"][0]["Name"] == "ldm3d"

    validator = Path(sys.executable).with_name("bids-validator-deno")
    run = subprocess.run([validator, folder, "--json"], capture_output=True, text=True, timeout=120)
    issues = json.loads(run.stdout)["issues"]["issues"]
    assert not [issue for issue in issues if issue["severity"] == "error"], issues

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scans = read_scans(DataConfig(bids=folder, grid=GRID), [AGE, SEX])  # and it can be trained on
    assert list(scans["subject"]) == ["syn0001", "syn0002"]
