"""Volumes that another program measured, against participants.tsv."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import command_line

from ldm3d.data.nifti import write_volume
from ldm3d.errors import InputError
from ldm3d.report.external import compare_written, parse_columns, read_participants, read_volumes

COLUMNS = {"ventricular_volume_ml": ["left lateral ventricle", "right lateral ventricle"]}


@pytest.fixture
def dataset(tmp_path):
    """40 participants; the table of the other program says 2 ml more for men."""
    rng = np.random.default_rng(0)
    people = [f"sub-syn{i + 1:04d}" for i in range(40)]
    asked = rng.uniform(10, 60, 40).round(1)
    table = {"participant_id": people, "age": rng.integers(20, 80, 40), "sex": ["F", "M"] * 20, "ventricular_volume_ml": asked}
    pd.DataFrame(table).to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    units = {"age": {"Units": "years"}, "ventricular_volume_ml": {"Units": "mL"}}
    (tmp_path / "participants.json").write_text(json.dumps(units))
    found = 1000 * (asked + np.array([0, 2] * 20) + 0.1 * rng.standard_normal(40))
    volumes = {"subject": [f"{name}_desc-synthetic_T1w.nii.gz" for name in people], "total intracranial": 1.5e6}
    volumes |= {"left lateral ventricle": 0.4 * found, "right lateral ventricle": 0.6 * found}
    pd.DataFrame(volumes).to_csv(tmp_path / "vol.csv", index=False)
    return tmp_path


def test_synthseg_table_against_what_was_asked(dataset):
    schema, rows = read_participants(dataset)
    assert [(c.name, c.kind, c.unit) for c in schema][:2] == [("age", "continuous", "years"), ("sex", "categorical", "")]
    assert rows["sub-syn0002"]["sex"] == "M"
    (found,), gaps, sections = compare_written(dataset, read_volumes(dataset / "vol.csv", COLUMNS))
    assert found.agreement.n == 40 and found.agreement.bias == pytest.approx(1, abs=0.05) and found.agreement.r > 0.99
    by_sex = {gap.figure: gap for gap in gaps if gap.grouping == "sex"}["ventricular_volume_ml: bias"]
    assert by_sex.gap == pytest.approx(2, abs=0.1) and by_sex.worst == "M" and by_sex.verdict == "gap"
    assert [section.title.split()[-1] for section in sections] == ["table", "sex", "age"]


def test_command_compares_a_table(dataset, tmp_path):
    columns = "ventricular_volume_ml=left lateral ventricle+right lateral ventricle"
    command_line("compare", dataset, "--table", dataset / "vol.csv", "--column", columns, "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["comparisons"][0]["bias"] == pytest.approx(1, abs=0.05)
    assert "by sex" in (tmp_path / "out/report.html").read_text()


def test_command_compares_label_maps(tmp_path, fails):
    people = [f"sub-{i}" for i in range(6)]
    for i, name in enumerate(people):
        labels = np.zeros((1, 8, 8, 8), np.uint8)
        labels[:, : i + 1] = 4
        write_volume(tmp_path / "labels" / f"{name}_dseg.nii.gz", labels, np.diag([5, 5, 5, 1]))
    people, truth = [*people, "sub-7"], [8.0 * (i + 1) for i in range(7)]  # 64 voxels of 0.125 ml; one has no label map
    pd.DataFrame({"participant_id": people, "ml": truth}).to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    command_line("compare", tmp_path, "--labels", tmp_path / "labels", "--volume", "ml=4,43", "--out", tmp_path / "out")
    (found,) = json.loads((tmp_path / "out/metrics.json").read_text())["comparisons"]
    assert found["n"] == 6 and found["mae"] == pytest.approx(0, abs=1e-9) and found["slope"] == pytest.approx(1)
    assert "either --table" in fails("compare", tmp_path)


def test_ages_as_published_are_numbers_and_remarks_are_no_groups(tmp_path):
    """One age of 89+ made twelve groups of twelve people's ages, and every remark was a group."""
    ages = [*map(str, range(60, 82, 2)), "89+", ">89"]
    table = {"participant_id": [f"sub-{i}" for i in range(13)], "age": ages, "sex": ["F", "M"] * 6 + ["n/a"]}
    table |= {"remark": [f"scanned on day {i}" for i in range(13)], "site": list("abcd") * 3 + ["a"]}
    pd.DataFrame(table).to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    with pytest.warns(UserWarning, match=r"group people by: remark \(13\)"):
        schema, rows = read_participants(tmp_path)
    assert {c.name: c.kind for c in schema} == {"age": "continuous", "sex": "categorical", "site": "categorical"}
    assert [rows[f"sub-{i}"]["age"] for i in (0, 11, 12)] == [60, 89, 89] and rows["sub-12"]["sex"] is None


@pytest.mark.parametrize("place", ["participants.tsv", "sessions.tsv"])
def test_sessions_are_joined_on_subject_and_session(tmp_path, place):
    """Two visits of ten people, two years and 5 ml apart; a third has no row of its own."""
    people = [f"sub-{i:02d}" for i in range(10)]
    visits = [(name, visit) for name in people for visit in ("M00", "M24")]
    age = {(name, visit): 60 + i + 2 * (visit == "M24") for i, name in enumerate(people) for visit in ("M00", "M24")}
    ml = {key: value / 2 + 5 * (key[1] == "M24") for key, value in age.items()}
    cells = [(name, f"ses-{visit}", age[name, visit], ml[name, visit]) for name, visit in visits]
    every = pd.DataFrame(cells, columns=["participant_id", "session_id", "age", "ml"])
    if place == "participants.tsv":
        every.to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    else:
        pd.DataFrame({"participant_id": people, "age": 60, "ml": 0}).to_csv(
            tmp_path / "participants.tsv", sep="\t", index=False
        )
        for name, own in every.groupby("participant_id"):
            (tmp_path / name).mkdir()
            own.drop(columns="participant_id").to_csv(tmp_path / name / f"{name}_sessions.tsv", sep="\t", index=False)
    lines = [f"{name}_ses-{visit}_T1w.nii.gz,{1000 * ml[name, visit]}" for name, visit in visits]
    (tmp_path / "vol.csv").write_text("\n".join(["scan,v", *lines, "sub-99_ses-M00_T1w.nii.gz,7"]))
    (found,), _, (section, *_) = compare_written(tmp_path, read_volumes(tmp_path / "vol.csv", {"ml": ["v"]}))
    assert found.agreement.n == 20 and found.agreement.mae == pytest.approx(0, abs=1e-9)
    assert section.text.startswith("20 scans of 10 people")


def test_a_session_without_a_row_is_its_participant_s(tmp_path):
    table = {"participant_id": [f"sub-{i}" for i in range(4)], "ml": [1.0, 2, 3, 4]}
    pd.DataFrame(table).to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    measured = {f"sub-{i}_ses-{visit}": {"ml": i + 1.0 + visit} for i in range(4) for visit in (0, 1)}
    (found,), *_ = compare_written(tmp_path, measured)
    assert found.agreement.n == 8 and found.agreement.bias == pytest.approx(0.5)


def test_tables_that_do_not_fit(dataset):
    with pytest.raises(InputError, match="no column 'hippocampus'"):
        read_volumes(dataset / "vol.csv", {"ml": ["hippocampus"]})
    with pytest.raises(InputError, match="of ml only nothing is a column"):
        compare_written(dataset, read_volumes(dataset / "vol.csv", {"ml": ["total intracranial"]}))
    for cell, message in (("scan7", "has no subject"), ("sub-syn0001", "occurs twice")):
        table = pd.read_csv(dataset / "vol.csv")
        table.loc[3, "subject"] = cell
        table.to_csv(dataset / "bad.csv", index=False)
        with pytest.raises(InputError, match=message):
            read_volumes(dataset / "bad.csv", COLUMNS)
    with pytest.raises(InputError, match="write NAME=COLUMN"):
        parse_columns(["ml"])
    table = pd.read_csv(dataset / "participants.tsv", sep="\t")
    pd.concat([table, table[:1]]).to_csv(dataset / "participants.tsv", sep="\t", index=False)
    with pytest.raises(InputError, match="sub-syn0001 has several rows; a column session_id"):
        read_participants(dataset)
    table[["participant_id"]].to_csv(dataset / "participants.tsv", sep="\t", index=False)
    with pytest.raises(InputError, match="no covariates to compare with"):
        compare_written(dataset, read_volumes(dataset / "vol.csv", COLUMNS))
