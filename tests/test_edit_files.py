"""`ldm3d edit`: what it writes, that it goes on where it was, and its messages."""

import json
import subprocess

import nibabel
import numpy as np
import pytest
from conftest import command_line
from test_phantoms import VALIDATOR
from test_placed import AFFINES, scan, tiny_pipeline

from ldm3d.data.tables import read_table
from ldm3d.rulers.volumetry import measure_volumes, tissue_change


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "raw"
    for subject in ("01", "02"):
        path = folder / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(scan(AFFINES["along the axes"]), path)
    (folder / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    return folder


def test_a_trajectory_with_its_maps(model, data, tmp_path):
    path, out = data / "sub-01/anat/sub-01_T1w.nii.gz", tmp_path / "out"
    asked = ["--from", "age=50,sex=F", "--to", "age=50:70:10", "--samples", 2, "--steps", 2, "--out", out]
    command_line("edit", model, path, *asked)
    anat, given = out / "sub-01/anat", nibabel.load(path)
    kinds = ("trajectory", "difference", "spread", "tissuechange")
    images = {desc: nibabel.load(anat / f"sub-01_desc-{desc}_T1w.nii.gz") for desc in kinds}
    for image in images.values():
        assert image.shape == (*given.shape, 3)
        np.testing.assert_allclose(image.affine, given.affine, atol=1e-5)
        assert image.header["descrip"].tobytes().startswith(b"DERIVED ldm3d")
    edited = images["trajectory"].get_fdata()
    np.testing.assert_allclose(edited[..., 0], given.get_fdata(), atol=0.1)  # age 50 is what it is
    assert abs(edited[..., 2] - given.get_fdata()).max() > 0.1
    np.testing.assert_allclose(images["difference"].get_fdata(), edited - given.get_fdata()[..., None], atol=0.01)
    sidecar = json.loads((anat / "sub-01_desc-trajectory_T1w.json").read_text())
    assert sidecar["Sources"] == ["sub-01/anat/sub-01_T1w.nii.gz"] and "synthetic" in sidecar["Description"]
    assert sidecar["Edit"]["From"] == {"age": 50, "sex": "F"}
    assert [row["age"] for row in sidecar["Edit"]["To"]] == [50, 60, 70]
    table = read_table(out / "volumes.tsv")
    assert list(table["to_age"]) == ["50.0", "60.0", "70.0"] and "brain_volume_ml_change" in table
    assert sorted(p.name for p in (out / "figures").iterdir()) == ["sub-01_desc-difference.png", "sub-01_desc-edited.png"]
    assert "figures/sub-01_desc-difference.png" in (out / "report.html").read_text()


def test_a_table_goes_on_and_bad_scans_are_named(model, data, tmp_path, capsys, fails):
    rows = read_table(write(tmp_path, ["sub-01", "sub-02", "sub-03"], [50, 60, 70]))
    assert len(rows) == 3
    asked = ["edit", model, "--table", tmp_path / "raw/scans.csv", "--to", "age=+10", "--steps", 1, "--out", tmp_path / "out"]
    message = fails(*asked)
    assert "1 of 3 scans" in message and "no such file" in message
    assert "sub-02_desc-edited.png" in (tmp_path / "out/report.html").read_text()  # also where a scan was left out
    done = tmp_path / "out/sub-01/anat/sub-01_desc-edited_T1w.nii.gz"
    checked = subprocess.run([VALIDATOR, tmp_path / "out", "--json"], capture_output=True, text=True)
    found = json.loads(checked.stdout)["issues"]["issues"]
    assert not [issue["code"] for issue in found if issue["severity"] == "error"]
    before = done.stat().st_mtime_ns
    assert nibabel.load(done).ndim == 3
    assert list(read_table(tmp_path / "out/volumes.tsv")["to_age"]) == ["60.0", "70.0"]
    (tmp_path / "out/sub-02/anat/sub-02_desc-edited_T1w.json").unlink()  # as if it had been killed there
    write(tmp_path, ["sub-01", "sub-02"], [50, 60])
    command_line(*asked)
    assert done.stat().st_mtime_ns == before
    assert (tmp_path / "out/sub-02/anat/sub-02_desc-edited_T1w.json").is_file()
    assert "asked for otherwise" in fails(*asked, "--seed", 3)


def write(tmp_path, subjects, ages):
    """scans.csv beside the scans."""
    lines = [f"{s}/anat/{s}_T1w.nii.gz,{age},other" for s, age in zip(subjects, ages)]
    path = tmp_path / "raw/scans.csv"
    path.write_text("\n".join(["path,age,group", *lines]) + "\n")
    return path


def test_messages(model, data, tmp_path, fails):
    path = data / "sub-01/anat/sub-01_T1w.nii.gz"
    for options, reason in (
        ([], "give either one scan, or --table"),
        ([path], "nothing is changed"),
        ([path, "--to", "age=+10"], "relative to the scan's own age"),
        ([path, "--to", "age"], "write NAME=VALUE"),
        ([path, "--to", "weight=3"], "unknown covariate"),
        ([tmp_path / "none.nii.gz", "--to", "age=60"], "no such file"),
        ([path, "--to", "age=60", "--register", "bspline"], "bspline"),
        ([path, "--to", "age=60", "--out", data], "is not of ldm3d edit"),
    ):
        assert reason in fails("edit", model, *options, *([] if "--out" in options else ["--out", tmp_path / "out"]))


def test_tissue_change_adds_up():
    """A hole of known size that opens in a ball is as much tissue lost, and nowhere else."""
    x = np.stack(np.meshgrid(*[np.arange(40) - 19.5] * 3, indexing="ij"))
    ball = (0.9 * (np.square(x).sum(0) < 15**2)).astype(np.float32)
    after = np.where(np.square(x).sum(0) < 5**2, np.float32(0.2), ball)
    change = tissue_change(ball, after, (4.0,) * 3)
    lost = measure_volumes(ball, (4.0,) * 3)["brain_volume_ml"] * (5 / 15) ** 3
    assert -change.sum() * 0.064 == pytest.approx(lost, rel=0.05)
    assert not change[np.square(x).sum(0) > 7**2].any()
    assert not tissue_change(np.zeros_like(ball), ball, (4.0,) * 3).any()
