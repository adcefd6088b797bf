"""Which scans a command is asked for, and a command that goes through them."""

import json

import nibabel
import numpy as np
import pytest
from conftest import command_line
from test_placed import AFFINES, head, scan, tiny_pipeline

from ldm3d.applications.asked import asked_scans
from ldm3d.applications.restore_files import operators_of
from ldm3d.data.nifti import write_volume
from ldm3d.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of two people, the second with two visits, and a table of the same scans beside it."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("sub-01/anat/sub-01_T1w", "sub-02/ses-a/anat/sub-02_ses-a_T1w", "sub-02/ses-b/anat/sub-02_ses-b_T1w"):
        path = folder / "raw" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(scan(AFFINES["along the axes"]), path)
    (folder / "raw/dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    (folder / "raw/participants.tsv").write_text("participant_id\tage\tgroup\nsub-01\t50\ta\nsub-02\t60\tb\n")
    (folder / "raw/sub-02/sub-02_sessions.tsv").write_text("session_id\tage\nses-a\t60\nses-b\t64\n")
    write_volume(folder / "hole.nii.gz", (head(1, (40, 46, 38)) > 0.5)[None].astype(np.float32), AFFINES["along the axes"])
    return folder


def test_the_scans_of_a_dataset_with_the_covariates_of_their_visits(data):
    found = asked_scans(tiny_pipeline(), None, None, data / "raw")
    assert [each.scan.name for each in found] == ["sub-01_T1w.nii.gz", "sub-02_ses-a_T1w.nii.gz", "sub-02_ses-b_T1w.nii.gz"]
    assert [each.covariates["age"] for each in found] == ["50", "60", "64"]
    assert all("sex" not in each.covariates for each in found)  # no table has it


def test_exactly_one_of_three(data, tmp_path):
    pipe = tiny_pipeline()
    for asked in ((None, None, None), (data / "raw/sub-01/anat/sub-01_T1w.nii.gz", None, data / "raw")):
        with pytest.raises(InputError, match="give either one scan, or --table"):
            asked_scans(pipe, *asked)
    (tmp_path / "twice.csv").write_text("path\na/sub-01_T1w.nii.gz\nb/sub-01_T1w.nii.gz\n")
    with pytest.raises(InputError, match=r"several scans of one subject and session .*\(sub-01\)"):
        asked_scans(pipe, None, tmp_path / "twice.csv", None)


def test_what_happened_is_told_by_columns(data):
    cells = {"path": "a.nii.gz", "age": "50", "hole": "hole.nii.gz", "missing": "z:3-5", "blur": "", "bias": "n/a"}
    assert operators_of(cells, data) == [f"hole={data / 'hole.nii.gz'}", "missing=z:3-5"]


def test_restore_goes_through_a_table(data, tmp_path, fails, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    scans = ("raw/sub-01/anat/sub-01_T1w.nii.gz", "raw/sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz", "none.nii.gz")
    lines = [f"{path},{age},{hole}" for path, age, hole in zip(scans, (50, 60, 70), ("hole.nii.gz", "", ""))]
    (data / "scans.csv").write_text("\n".join(["path,age,hole", *lines]) + "\n")
    asked = ["restore", tmp_path / "model", "--table", data / "scans.csv", "--samples", 1, "--levels", 1]
    asked += ["--operator", "blur=6", "--out", tmp_path / "out"]
    assert "1 of 3 scans were left out; the first: " in (message := fails(*asked)) and "none.nii.gz: no such file" in message
    sidecars = sorted((tmp_path / "out").rglob("*_desc-restored_T1w.json"))
    said = [json.loads(path.read_text())["Restoration"] for path in sidecars]
    assert [each["operator"] for each in said] == ["hole=hole.nii.gz blur=6", "blur=6"]
    assert [each["covariates"]["age"] for each in said] == [50, 60]
    before = sidecars[0].stat().st_mtime_ns
    sidecars[1].unlink()  # as if it had been killed there
    (data / "scans.csv").write_text("\n".join(["path,age,hole", *lines[:2]]) + "\n")
    command_line(*asked)
    assert "2 of 2 scans done, 1 of them were there already" in capsys.readouterr().out
    assert sidecars[1].is_file() and sidecars[0].stat().st_mtime_ns == before
    one = [data / scans[0], "--out", tmp_path / "other"]
    assert "say what happened to the scan" in fails("restore", tmp_path / "model", *one)
