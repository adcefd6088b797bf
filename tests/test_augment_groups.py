"""`ldm3d augment`: which groups are thin, what is asked for them, and the tables beside the volumes."""

import json

import numpy as np
import pytest
from conftest import command_line
from test_placed import tiny_pipeline

from ldm3d.applications.augment import groups_of
from ldm3d.data.tables import read_table
from ldm3d.errors import InputError

SCHEMA = tiny_pipeline().schema
# 20 to 40 and 40 to 60 years: three women and one man in the first bin, two men in the second
ROWS = [{"age": a, "sex": s} for a, s in (("20", "F"), ("25", "F"), ("39", "F"), ("30", "M"), ("40", "M"), ("60", "male"))]


def test_each_group_gets_what_it_lacks():
    groups = groups_of(SCHEMA, [*ROWS, {"age": "n/a", "sex": "F"}], ["age", "sex"], 2, bins=2)
    found = {tuple(map(str, group.parts)): (len(group.people), len(group.requests)) for group in groups}
    assert found == {("20-40", "F"): (3, 0), ("20-40", "M"): (1, 1), ("40-60", "F"): (0, 2), ("40-60", "M"): (2, 0)}
    (request,) = groups[1].requests
    assert request["sex"] == "M" and 26 <= request["age"] <= 34  # within a fifth of 20 years of the one who is there
    assert all(row["sex"] == "F" and 40 <= row["age"] <= 60 for row in groups[2].requests)


def test_requests_spread_as_people_do_and_do_not_depend_on_how_many():
    few, many = (groups_of(SCHEMA, ROWS, ["age", "sex"], n, bins=2) for n in (5, 400))
    assert few[2].requests == many[2].requests[:5] and few[0].requests == many[0].requests[:2]
    ages = np.array([row["age"] for row in many[2].requests])  # nobody is there: all ages of the bin alike
    assert ages.mean() == pytest.approx(50, abs=1) and ages.std() == pytest.approx(20 / np.sqrt(12), abs=0.5)
    near = np.array([row["age"] for row in many[0].requests])
    assert ((near <= 29) | (near >= 35)).all() and near.min() >= 20 and near.max() <= 40


def test_what_all_are_asked_for_and_messages():
    (group,) = groups_of(SCHEMA, ROWS[:1], ["age"], 2, {"sex": "M"})
    assert [dict(row) for row in group.requests] == [{"age": 20, "sex": "M"}]
    for rows, by, fixed, message in (
        (ROWS, ["weight"], {}, "unknown covariate"),
        (ROWS, [], {}, "name a covariate"),
        (ROWS, ["sex"], {"sex": "F"}, "there again"),
        ([{"sex": "F"}], ["age"], {}, "no column age"),
        ([{"age": "old", "sex": "F"}], ["age"], {}, "row 1 of the table: age: 'old'"),
        ([{"age": "n/a", "sex": "F"}], ["age"], {}, "nobody in the table"),
    ):
        with pytest.raises(InputError, match=message):
            groups_of(SCHEMA, rows, by, 5, fixed)


def test_the_command(tmp_path, capsys, fails):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    lines = [f"s{n},scans/s{n}.nii.gz,{row['age']},{row['sex']}" for n, row in enumerate(ROWS)]
    (tmp_path / "people.csv").write_text("\n".join(["participant_id,path,age,sex", *lines]) + "\n")
    asked = ["augment", tmp_path / "model", "--table", tmp_path / "people.csv", "--out", tmp_path / "out", "--steps", 1]
    command_line(*asked, "--by", "age,sex", "--per-group", 2, "--bins", 2)
    joined = read_table(tmp_path / "out/augmented.tsv")
    assert list(joined["synthetic"]) == ["0"] * 6 + ["1"] * 3
    assert joined["path"].iloc[0] == str(tmp_path / "scans/s0.nii.gz")
    made = tmp_path / "out/volumes/sub-syn0002/anat/sub-syn0002_desc-synthetic_T1w.nii.gz"
    assert joined["path"].iloc[7] == str(made) and made.is_file()
    said = json.loads(made.with_name(made.name.replace(".nii.gz", ".json")).read_text())
    assert said["covariates"] == {"age": float(joined["age"].iloc[7]), "sex": "F"}
    groups = read_table(tmp_path / "out/groups.tsv")
    assert list(groups["real"]) == ["3", "1", "0", "2"] and list(groups["synthetic"]) == ["0", "1", "2", "0"]
    page = (tmp_path / "out/report.html").read_text()
    assert 'src="volumes/mosaic.png"' in page and (tmp_path / "out/volumes/mosaic.png").is_file()
    model = json.loads((tmp_path / "out/volumes/dataset_description.json").read_text())["GeneratedBy"][0]["Description"]
    assert model.rpartition(" ")[2] in page and "SYNTHETIC DATA" in page
    before = made.stat().st_mtime_ns
    command_line(*asked, "--by", "age,sex", "--per-group", 2, "--bins", 2)
    assert made.stat().st_mtime_ns == before
    command_line(*asked, "--by", "sex", "--per-group", 1)
    assert "nothing is generated" in capsys.readouterr().out
    assert "unknown covariate" in fails(*asked, "--by", "wieght")
