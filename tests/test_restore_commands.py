"""`ldm3d restore`, `calibrate` and `anomaly` on files."""

import json

import nibabel
import numpy as np
import pytest
from conftest import command_line
from test_placed import AFFINES, head, tiny_pipeline

from ldm3d.applications.calibration import LEAST_PEOPLE
from ldm3d.data.nifti import write_volume

AFFINE = AFFINES["along the axes"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A table of scans."""
    folder = tmp_path_factory.mktemp("people")
    for n in range(LEAST_PEOPLE):
        write_volume(folder / f"sub-{n}_T1w.nii.gz", 700 * head(n, (40, 46, 38))[None] + 20, AFFINE)
    rows = [f"sub-{n}_T1w.nii.gz,{50 + n}" for n in range(LEAST_PEOPLE)]
    (folder / "healthy.csv").write_text("\n".join(["path,age", *rows]) + "\n")
    return folder


def test_restore(model, people, tmp_path, capsys, fails):
    scan, out = people / "sub-0_T1w.nii.gz", tmp_path / "out"
    asked = ["restore", model, scan, "--from", "age=50,sex=F", "--samples", 2, "--levels", 2, "--out", out]
    command_line(*asked, "--operator", "missing=z:10-12", "--operator", "blur=3")
    found = nibabel.load(out / "sub-0/anat/sub-0_desc-restored_T1w.nii.gz")
    assert found.shape == (40, 46, 38) and found.header["descrip"].tobytes().startswith(b"DERIVED ldm3d")
    sidecar = json.loads((out / "sub-0/anat/sub-0_desc-restored_T1w.json").read_text())
    assert sidecar["Restoration"]["operator"] == "missing=z:10-12 blur=3"
    assert sidecar["Restoration"]["covariates"] == {"age": 50, "sex": "F"}
    assert "What happened: missing=z:10-12 blur=3." in (out / "report.html").read_text()
    command_line(*asked, "--operator", "missing=z:10-12", "--operator", "blur=3")
    assert "is there already" in capsys.readouterr().out
    assert "asked for otherwise" in fails(*asked, "--operator", "blur=3")
    assert "did you mean 'slices'" in fails(*asked[:-1], tmp_path / "other", "--operator", "slicse")
    assert "no such file" in fails("restore", model, tmp_path / "none.nii.gz", "--operator", "noise")


def test_a_hole_that_was_drawn_again_is_another_hole(model, people, tmp_path, capsys, fails):
    scan, hole = people / "sub-1_T1w.nii.gz", tmp_path / "hole.nii.gz"
    marked = np.zeros((1, 40, 46, 38), np.float32)
    marked[:, 15:20, 15:20, 15:20] = 1
    write_volume(hole, marked, AFFINE)
    asked = ["restore", model, scan, "--samples", 1, "--levels", 1, "--operator", f"hole={hole}", "--out", tmp_path / "out"]
    command_line(*asked)
    command_line(*asked)
    assert "is there already" in capsys.readouterr().out
    write_volume(hole, np.roll(marked, 6, axis=1), AFFINE)
    assert "of another scan, file or model" in fails(*asked)


def test_calibrate_and_anomaly(model, people, tmp_path, capsys, fails):
    options = ["--samples", 1, "--levels", 1]
    command_line("calibrate", model, people / "healthy.csv", "--out", tmp_path / "healthy.npz", *options)
    assert f"{LEAST_PEOPLE} of {LEAST_PEOPLE} healthy people" in capsys.readouterr().out
    asked = [
        "anomaly",
        model,
        people / "sub-3_T1w.nii.gz",
        "--calibration",
        tmp_path / "healthy.npz",
        "--out",
        tmp_path / "out",
    ]
    command_line(*asked, *options, "--from", "age=53")
    score = nibabel.load(tmp_path / "out/sub-3/anat/sub-3_desc-zscore_T1w.nii.gz")
    assert score.shape == (40, 46, 38) and np.abs(score.get_fdata()).max() > 1
    sidecar = json.loads((tmp_path / "out/sub-3/anat/sub-3_desc-zscore_T1w.json").read_text())
    assert sidecar["Anomaly"]["HealthyPeople"] == LEAST_PEOPLE
    found, page = sidecar["Anomaly"]["Clusters"], (tmp_path / "out/report.html").read_text()
    assert f"{len(found)} clusters beyond" in page and "figures/sub-3_desc-zscore.png" in page
    assert "samples: 1, not 2" in fails(*asked, "--samples", 2, "--levels", 1)
