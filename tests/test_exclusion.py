"""Who is left out: by a list, by a column; and nothing that a misspelt word would leave in."""

import warnings

import pytest
from test_bids import AGE, SEX, anat, bids, table

from ldm3d.data.bids import read_columns, read_scans
from ldm3d.data.people import GROUP
from ldm3d.errors import InputError

FILES = [anat("01"), anat("002"), anat("03", "a"), anat("03", "b"), anat("10")]
HEADER = "participant_id\tage\tsex\tqc\tSite\n"
ROWS = HEADER + "01\t61\tF\t0\tOslo\n002\t62\tM\t1\tOslo\n03\t63\tF\tn/a\tTurku\n10\t64\tM\tinclude\tOslo\n"


def left(data, covariates=(AGE,)) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scans = read_scans(data, covariates)
    return [f"{row.subject}{row.session}" for row in scans.itertuples()]


@pytest.mark.parametrize(
    "exclude, expected",
    [
        (["01", "sub-10"], ["002", "03a", "03b"]),
        (["2"], ["01", "03a", "03b", "10"]),  # leading zeros lost, as in YAML's 002
        (["03"], ["01", "002", "10"]),
        (["sub-03/ses-b"], ["01", "002", "03a", "10"]),
        ([anat("03", "a"), "01"], ["002", "03b", "10"]),
        ("qc", ["01", "03a", "03b", "10"]),
    ],
)
def test_who_is_left_out_of_a_dataset(tmp_path, exclude, expected):
    data = bids(tmp_path, FILES, ROWS).model_copy(update={"exclude": exclude})
    assert sorted(left(data)) == sorted(expected)


def test_absolute_paths_and_tables(tmp_path):
    text = "participant_id,path,age,drop\n1,a/x.nii,50,\n2,a/y.nii,60,yes\n3,b/z.nii,70,No\n"
    assert left(table(tmp_path, text, exclude=[str(tmp_path / "b/z.nii")])) == ["1", "2"]
    assert left(table(tmp_path, text, exclude=["a"])) == ["3"]
    assert left(table(tmp_path, text, exclude="drop")) == ["1", "3"]


def test_one_message_counts_who_is_left_out(tmp_path):
    data = bids(tmp_path, FILES, ROWS).model_copy(update={"exclude": ["03", "10"]})
    with pytest.warns(UserWarning, match=r"data.exclude leaves out 3 of 5 scans \(.*sub-03 ses-a, sub-03 ses-b.*\)"):
        read_scans(data, [])


def test_cells_of_who_is_left_out_need_not_be_readable(tmp_path):
    data = bids(tmp_path, FILES, ROWS.replace("61\tF", "old\tX"))
    with pytest.raises(InputError, match="cells cannot be used"):
        read_scans(data, [AGE, SEX])
    assert "01" not in left(data.model_copy(update={"exclude": ["01"]}), [AGE, SEX])
    worse = bids(tmp_path, FILES, ROWS.replace("61\tF", "old\tX").replace("64", "older"))
    with pytest.raises(InputError, match=r"participants.tsv line 5 \(sub-10\)"):  # and the others keep their places
        left(worse.model_copy(update={"exclude": ["01"]}))


@pytest.mark.parametrize(
    "exclude, rows, expected",
    [
        (["01", "sub-011"], ROWS, r"data.exclude: 'sub-011': neither a subject nor the path .* did you mean '01"),
        (["anat/x.nii"], ROWS, "neither a subject nor the path of a scan in "),
        (["01", "002", "03", "10"], ROWS, "leaves out all 5 scans"),
        ("QC", ROWS, r"no column 'QC' \(data.exclude\); did you mean 'qc'"),
        ("qc", ROWS.replace("F\t0", "F\tmaybe"), r"does not say of 1 scans .*\n.*line 2 \(sub-01\), column 'qc': 'maybe'"),
        ("qc_pass", ROWS.replace("qc", "qc_pass"), "seems to say who stays"),
    ],
)
def test_what_would_leave_in_the_wrong_scans_is_refused(tmp_path, exclude, rows, expected):
    with pytest.raises(InputError, match=expected):
        left(bids(tmp_path, FILES, rows).model_copy(update={"exclude": exclude}))


def test_words_of_a_column_of_who_stays_are_clear(tmp_path):
    rows = ROWS.replace("qc", "qc_pass").replace("F\t0", "F\tfail").replace("M\t1", "M\tpass")
    assert "01" not in left(bids(tmp_path, FILES, rows).model_copy(update={"exclude": "qc_pass"}))


def test_columns_that_need_not_be_there(tmp_path):
    data = bids(tmp_path, FILES, ROWS)
    scans = read_scans(data, [])
    found = read_columns(data, scans, {"site": {"site", "site_id"}, "scanner": {"scanner"}})
    assert dict(zip(scans["subject"], found["site"])) == {"01": "Oslo", "002": "Oslo", "03": "Turku", "10": "Oslo"}
    assert "scanner" not in found
    (tmp_path / "participants.tsv").unlink()
    assert read_columns(data, scans, {"site": {"site"}}) == {}
    data = table(tmp_path, "participant_id,path,Scanner ID\n2,y.nii,B\n1,x.nii,A\n")
    assert read_columns(data, read_scans(data, []), {"site": {"scanner_id"}}) == {"site": ["A", "B"]}


def test_a_joined_table_marks_who_is_left_out_and_columns_of_splits_follow(tmp_path):
    (tmp_path / "joined.csv").write_text("participant_id,QC,age,Scanner\n01,0,61,A\n002,1,x,B\n03,0,63,C\n10,exclude,64,D\n")
    rows = "participant_id\tfamily\n01\tf1\n002\tf2\n03\tf3\n10\tf4\n"
    settings = {"covariates_tables": (str(tmp_path / "joined.csv"),), "group_column": "family", "exclude": "QC"}
    data = bids(tmp_path, FILES, rows).model_copy(update=settings)
    with pytest.warns(UserWarning, match="data.exclude leaves out 2 of 5 scans .sub-002, sub-10"):
        scans = read_scans(data, [AGE])
    assert scans["subject"].tolist() == ["01", "03", "03"] and scans["age_years"].tolist() == [61, 63, 63]
    assert scans[GROUP].tolist() == ["f1", "f3", "f3"] and not {"data.exclude", "QC"} & set(scans)
    found = read_columns(data, scans, {"site": ["site", "scanner"], "family": ["family"], "sex": ["sex"]})
    assert found == {"site": ["A", "C", "C"], "family": ["f1", "f3", "f3"]}


def test_columns_of_tables_that_are_joined_with_a_table_of_scans(tmp_path):
    (tmp_path / "joined.csv").write_text("participant_id,site,drop\n1,Oslo,0\n2,Turku,1\n3,Turku,0\n")
    text = "participant_id,path,age\n1,x.nii,50\n2,y.nii,60\n3,z.nii,70\n"
    data = table(tmp_path, text, covariates_tables=(str(tmp_path / "joined.csv"),), exclude="drop")
    assert left(data) == ["1", "3"]
    assert read_columns(data, read_scans(data, [AGE]), {"site": ["site"]}) == {"site": ["Oslo", "Turku"]}
