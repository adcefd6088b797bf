"""Files appear whole or not at all, and no name from a file leads out of its folder."""

import json
import os

import pytest
from conftest import command_line
from torture.generation import make_pipeline
from torture.hostile.names import NAMES

from ldm3d.covariates import Covariate, as_name
from ldm3d.data.labels import LabelMaps
from ldm3d.errors import InputError
from ldm3d.files import LONGEST_NAME, checked_name, replacing, write_atomic


def test_a_file_appears_whole_or_what_was_there_stays(tmp_path):
    path = tmp_path / "x.json"
    write_atomic(path, "before\n")
    with pytest.raises(KeyError), replacing(path) as unfinished:
        unfinished.write_text("half")
        assert path.read_text() == "before\n" and unfinished.parent == tmp_path and unfinished.name.endswith("-x.json")
        raise KeyError
    assert os.listdir(tmp_path) == ["x.json"] and path.read_text() == "before\n"
    with replacing(path) as unfinished, replacing(path) as other:  # two writers of one process
        assert unfinished != other
        unfinished.write_text("first\n")
        other.write_text("second\n")
    assert os.listdir(tmp_path) == ["x.json"] and path.read_text() == "first\n"


def test_text_is_written_alike_everywhere(tmp_path):
    write_atomic(tmp_path / "x", "é\n")
    assert (tmp_path / "x").read_bytes() == b"\xc3\xa9\n"


def test_names_that_stay_in_their_folder(tmp_path):
    for name in ("01", "ADNI002S0295", "Müller-3", "a b (2)", "M00", "difference-age", "9a5f", "x" * LONGEST_NAME, "a..b"):
        (tmp_path / f"{checked_name(name, 'subject')}.json").touch()
    assert {path.parent for path in tmp_path.rglob("*")} == {tmp_path}


@pytest.mark.parametrize("name", [*NAMES, "x" * (LONGEST_NAME + 1), None, 3])
def test_names_that_could_lead_elsewhere(name):
    with pytest.raises(InputError, match=r"^subject .* cannot become part of a file's name"):
        checked_name(name, "subject")
    if isinstance(name, str):
        with pytest.raises(InputError, match=r"^covariate .*: a name begins with a small letter"):
            Covariate(name, "continuous")


def test_columns_of_any_name_have_one_that_a_covariate_may_have():
    assert [as_name(name) for name in ("age", "Age at scan", "MMSE/30", "3T")] == [
        "age",
        "age_at_scan",
        "mmse_30",
        "column_3t",
    ]
    for name in NAMES:
        Covariate(as_name(name), "continuous")


def test_label_maps_of_subjects_that_are_patterns_are_not_looked_for(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "sub-x_dseg.nii.gz").touch()
    (tmp_path / "labels/sub-y_dseg.nii.gz").touch()
    maps = LabelMaps(tmp_path / "labels")
    assert maps.one("y").name == "sub-y_dseg.nii.gz"
    for subject in ("../x", "*", "x/../../sub-x"):
        with pytest.raises(InputError, match="found 0"):
            maps.one(subject)


@pytest.mark.parametrize("name", ["x/../../escaped", "../escaped", "x\n"])
def test_explain_writes_nothing_beside_its_folder(name, tmp_path, fails):
    make_pipeline().save_pretrained(tmp_path / "model")
    path = tmp_path / "model/pipeline.json"
    values = json.loads(path.read_text())
    values["covariates"][1]["name"] = name
    path.write_text(json.dumps(values))
    before = set(tmp_path.rglob("*"))
    asked = ["--from", "age=40", "--to", "age=60", "--seeds", 6, "--steps", 1, "--device", "cpu"]
    message = fails("explain", tmp_path / "model", *asked, "--out", tmp_path / "jail/explanation")
    assert "pipeline.json" in message and "covariate" in message and "a name begins with a small letter" in message
    assert set(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit):
        command_line("info", tmp_path / "model")
