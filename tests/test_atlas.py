"""Atlases: cells, templates and films whose answers are known, and the folder that a stopped command goes on with."""

import json
import subprocess

import nibabel
import numpy as np
import pytest
from conftest import command_line
from PIL import Image
from test_phantoms import VALIDATOR
from test_placed import tiny_pipeline

from ldm3d.applications.atlas import cells_of, film, film_weights, template_of
from ldm3d.applications.shape import inverse, mean_shape, warped
from ldm3d.data.tables import read_table
from ldm3d.errors import InputError
from ldm3d.pipeline import Pipeline
from ldm3d.preemption import Stop


def ball(radius: float, centre=(0.0, 0.0, 0.0), n: int = 24) -> np.ndarray:
    """A ball with an edge of a voxel."""
    away = np.indices((n, n, n)) - (n - 1) / 2 - np.array(centre)[:, None, None, None]
    return (1 / (1 + np.exp(2 * (np.sqrt((away**2).sum(0)) - radius)))).astype(np.float32)


def test_the_mean_shape_of_balls_is_the_ball_of_the_mean_radius_and_as_sharp():
    balls = [ball(4, (-1.5, 0, 0), 20), ball(6, (0, 1.5, 0), 20), ball(8, (1.5, -1.5, 0), 20)]
    found = template_of(lambda: balls, 2)
    np.testing.assert_allclose(found.mean, np.mean(balls, axis=0), atol=1e-6)
    np.testing.assert_allclose(found.deviation, np.std(balls, axis=0, ddof=1), atol=1e-5)
    blurred, sharp = (np.abs(each - ball(6, n=20)).mean() for each in (found.mean, found.sharp))
    assert sharp < 0.1 * blurred
    edges = [sum(np.square(np.diff(v, axis=a)).sum() for a in range(3)) for v in (ball(6, n=20), found.sharp, found.mean)]
    assert edges[1] == pytest.approx(edges[0], rel=0.1) and edges[2] < 0.7 * edges[0]
    np.testing.assert_array_equal(mean_shape(lambda: balls, balls[0], 0), balls[0])


def test_a_displacement_and_its_inverse_undo_each_other():
    bend = np.stack([1.5 * ball(9), -ball(9), 0.5 * ball(9)])
    there = warped(ball(8), bend)
    assert np.abs(there - ball(8)).max() > 0.5
    assert np.abs(warped(there, inverse(bend)) - ball(8)).max() < 0.1


def test_a_film_passes_through_what_is_linear():
    positions = [20.0, 30.0, 40.0, 50.0]
    at = [20.0, 23.0, 35.0, 50.0]
    weights = film_weights(positions, at, 5.0)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights @ positions, at)
    places, frames = film(positions, [np.full((2, 2, 2), p / 100) for p in positions], frames=5)
    assert len(places) == 16 and places[3] == pytest.approx(26)
    np.testing.assert_allclose(frames[:, 0, 0, 0], np.array(places) / 100, atol=1e-6)


def test_cells_are_points_and_categories():
    schema = tiny_pipeline().schema
    cells = cells_of(schema, {"age": "20:40:10"}, ["sex"])
    assert [cell.label for cell in cells] == [f"age{a}sex{s}" for s in "FM" for a in (20, 30, 40)]
    assert cells[1].row == {"age": 30, "sex": "F"} and (cells[1].film, cells[1].position) == ("sexF", 30)
    assert [cell.label for cell in cells_of(schema, {"age": 40.5}, [])] == ["age40p5"]
    assert [(cell.label, cell.position) for cell in cells_of(schema, {}, [])] == [("all", None)]
    for asked, by, message in (
        ({}, ["age"], "by a range: --age FIRST:LAST:STEP"),
        ({"sex": "F"}, ["sex"], "asked for, and in --by"),
        ({"age": "20:90:0"}, [], "a step above 0"),
        ({"weight": 3}, [], "unknown covariate"),
        ({"age": 150}, [], "outside its range"),
    ):
        with pytest.raises(InputError, match=message):
            cells_of(schema, asked, by)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_the_folder(model, tmp_path, fails, capsys):
    out = tmp_path / "out"
    asked = ["atlas", model, "--age", "30:50:20", "--by", "sex", "--volumes", 2, "--rounds", 1, "--steps", 1, "--out", out]
    command_line(*asked)
    anat = out / "tpl-synthetic/cohort-age50sexM/anat"
    volumes = [
        nibabel.load(out / f"sourcedata/age50sexM/sub-syn000{n}/anat/sub-syn000{n}_desc-synthetic_T1w.nii.gz").get_fdata()
        for n in (1, 2)
    ]
    mean = nibabel.load(anat / "tpl-synthetic_cohort-age50sexM_desc-mean_T1w.nii.gz")
    np.testing.assert_allclose(mean.get_fdata(), np.mean(volumes, axis=0), atol=1e-4)
    assert mean.header["descrip"].tobytes().startswith(b"SYNTHETIC ldm3d")
    deviation = nibabel.load(anat / "tpl-synthetic_cohort-age50sexM_desc-deviation_T1w.nii.gz").get_fdata()
    np.testing.assert_allclose(deviation, np.std(volumes, axis=0, ddof=1), atol=1e-4)
    moving = nibabel.load(out / "tpl-synthetic/cohort-sexM/anat/tpl-synthetic_cohort-sexM_desc-film_T1w.nii.gz")
    assert moving.shape == (*mean.shape, 6)
    with Image.open(out / "figures/tpl-synthetic_cohort-sexM_desc-film.gif") as picture:
        assert picture.n_frames == 10
    sidecar = json.loads((anat / "tpl-synthetic_cohort-age50sexM_desc-mean_T1w.json").read_text())
    assert sidecar["synthetic"] and sidecar["Cohort"] == {"age": 50, "sex": "M"}
    assert list(read_table(out / "cohorts.tsv")["cohort"]) == [f"age{a}sex{s}" for s in "FM" for a in (30, 50)]
    assert "figures/templates.png" in (out / "report.html").read_text()
    checked = subprocess.run([VALIDATOR, out, "--json"], capture_output=True, text=True)
    found = json.loads(checked.stdout)["issues"]["issues"]
    assert not [issue for issue in found if issue["severity"] == "error"]
    before = (anat / "tpl-synthetic_cohort-age50sexM_desc-mean_T1w.nii.gz").stat().st_mtime_ns
    (out / "tpl-synthetic/cohort-age30sexF/anat/tpl-synthetic_cohort-age30sexF_desc-mean_T1w.json").unlink()  # killed there
    command_line(*asked)
    assert (out / "tpl-synthetic/cohort-age30sexF/anat/tpl-synthetic_cohort-age30sexF_desc-mean_T1w.json").is_file()
    assert (anat / "tpl-synthetic_cohort-age50sexM_desc-mean_T1w.nii.gz").stat().st_mtime_ns == before
    assert "holds another series" in fails(*asked, "--seed", 5)
    assert "is not of ldm3d atlas" in fails(*asked[:-1], model)
    assert "letters and digits" in fails(*asked, "--name", "a/b")
    assert "only a model with a Gaussian" in fails(*asked[:-1], tmp_path / "other", "--spread", 1.2)


def once(volume, spacing_mm):
    return {"brightness": 1.0}


def twice(volume, spacing_mm):
    return {"brightness": 2.0}


def test_another_measure_measures_again(model, tmp_path):
    pipe = Pipeline.from_pretrained(model, "cpu")
    pipe.sampling = pipe.sampling.replace(steps=1)
    for measure, expected in ((once, 1), (twice, 2), (once, 1)):
        assert pipe.atlas(tmp_path / "out", {"age": 30}, volumes=2, rounds=0, measure=measure)
        assert [float(cell) for cell in read_table(tmp_path / "out/cohorts.tsv")["brightness_mean"]] == [expected]


def test_a_stop_leaves_the_rest(tmp_path):
    pipe = tiny_pipeline()
    pipe.sampling = pipe.sampling.replace(steps=1)
    assert pipe.atlas(tmp_path / "out", {"age": 30}, volumes=2, rounds=0, stop=Stop("SIGTERM")) is False
    assert not (tmp_path / "out/cohorts.tsv").exists()
