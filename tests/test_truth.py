"""Volumes of a model that takes images, beside each person's own truth, and beside simpler answers."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import command_line
from scipy.ndimage import uniform_filter

from ldm3d.config.read import load_config
from ldm3d.data.conditions import ScanImages
from ldm3d.data.preparing import load_prepared, read_scan_table
from ldm3d.evaluation.simpler import Simpler, non_local_means
from ldm3d.evaluation.truth import (
    ANSWERS,
    AVERAGE,
    CUBIC,
    MEAN,
    NON_LOCAL,
    ONE_STEP,
    OWN,
    REGRESSION,
    SAMPLE,
    TRAINED,
    in_greys,
    spread,
)
from ldm3d.experiment import scans_by_use


def images(i: int):
    rng = np.random.default_rng(i)
    return rng.random((1, 12, 14, 12)).astype(np.float32)


def test_a_regression_finds_a_map_of_intensities_and_a_blur():
    """The truth is a polynomial of the voxel, or a mean over neighbours: both are within what it can say."""
    given = lambda i: ({"a": torch.from_numpy(images(i))}, {})  # noqa: E731
    for made in (
        lambda x: 0.2 + 0.5 * x - 0.3 * x**2,
        lambda x: uniform_filter(x, (0, 3, 3, 3), mode="nearest"),
    ):
        fitted = Simpler.fit(lambda i, made=made: made(images(i)), given, range(4))
        error = np.abs(fitted.regression(given(9)[0]) - made(images(9)))
        assert error.max() < 0.02
        assert np.abs(fitted.mean - np.mean([made(images(i)) for i in range(4)], axis=0)).max() < 1e-6


def test_a_regression_answers_for_what_is_missing():
    """Elsewhere the holed image is the answer; in the hole the other contrast has to be looked at."""

    def given(i):
        known = torch.ones(1, 12, 14, 12)
        known[:, i : i + 5, 4:9, 4:9] = 0
        truth = torch.from_numpy(images(i))
        return {"holed": truth * known, "other": 1 - truth}, {"holed": known}

    fitted, hole = Simpler.fit(images, given, range(6)), given(2)[1]["holed"].numpy() == 0
    assert np.abs(fitted.regression(given(2)[0]) - images(2))[hole].mean() < 0.02


def test_what_is_left_open_counts_as_nothing():
    fitted = Simpler.fit(images, lambda i: ({"a": torch.full((1, 12, 14, 12), torch.nan)}, {}), range(4))
    assert np.isfinite(fitted.regression({"a": torch.zeros(1, 12, 14, 12)})).all()


def test_non_local_means_take_rician_noise_away():
    pytest.importorskip("skimage")
    rng = np.random.default_rng(0)
    truth = np.zeros((1, 24, 24, 24))
    truth[0, 4:20, 4:20, 4:20], truth[0, 8:16, 8:16, 8:16] = 0.5, 0.8
    real, imaginary = 0.08 * rng.standard_normal((2, *truth.shape))
    noisy = np.hypot(truth + real, imaginary).clip(0, 1)
    cleaned = non_local_means(noisy)
    errors = [np.sqrt(((each - truth)[truth > 0] ** 2).mean()) for each in (noisy, cleaned)]  # as in an evaluation
    assert cleaned.shape == truth.shape and errors[1] < 0.5 * errors[0]


def test_samples_of_the_truths_own_distribution_hold_it_as_often_as_they_say():
    rng, where = np.random.default_rng(0), np.ones((1, 20, 20, 20), bool)
    centre = rng.normal(0.5, 0.1, where.shape)
    samples, truth = centre + 0.05 * rng.standard_normal((8, *where.shape)), centre + 0.05 * rng.standard_normal(where.shape)
    crps, deviation, inside = spread(samples, truth, where)
    assert inside == pytest.approx(0.9, abs=0.01) and deviation == pytest.approx(0.05, rel=0.05)
    assert crps == pytest.approx(0.05 / np.sqrt(np.pi), rel=0.03)  # Gneiting & Raftery 2007, eq. 5, averaged over the truth
    assert spread(centre + 0.4 * (samples - centre), truth, where)[2] < 0.7  # too sure
    same = np.repeat(samples[:1], 8, axis=0)
    crps, deviation, inside = spread(same, truth, where)
    assert crps == pytest.approx(np.abs(samples[0] - truth).mean()) and deviation == 0 and np.isnan(inside)


def test_scans_that_lack_an_image_are_left_out(conditioned):
    config = load_config(conditioned / "config.yaml")
    table = read_scan_table(config)
    scans = ScanImages(config, table)
    lacks = list(table["subject"]).index(min(table["subject"]))  # neither T2w nor labels
    assert set(range(len(table))) - set(scans.complete) == {lacks}
    i = scans.complete[0]
    volumes, measured = scans.given(i)
    scan = load_prepared(config, table["key"][i])
    assert list(volumes) == ["T2w", "labels", "holed"] and list(measured) == ["holed"]
    assert np.array_equal(scans.made(i), scan) and np.corrcoef(volumes["T2w"].ravel(), scan.ravel())[0, 1] < -0.9
    there = measured["holed"].numpy() == 1
    assert np.array_equal(volumes["holed"].numpy()[there], scan[there]) and not volumes["holed"].numpy()[~there].any()
    again = ScanImages(config, table.iloc[[i]].reset_index(drop=True)).given(0)[1]["holed"]
    assert torch.equal(again, measured["holed"])  # it follows from the scan, not from the table
    made = load_config(conditioned / "config.yaml", ["diffusion.makes=T2w"])
    of_scan = ScanImages(made, table)
    assert np.array_equal(of_scan.made(i), volumes["T2w"].numpy()) and np.array_equal(of_scan.given(i)[0]["T1w"].numpy(), scan)


def test_evaluate_gives_held_out_people_their_images(conditioned, train_here, tmp_path, capsys):
    """The figures, the lights and the page; a scan without its images is in none of them."""
    shutil.copytree(conditioned / "run", tmp_path / "run")
    train_here("diffusion", conditioned / "config.yaml", "training.steps=2", f"output={tmp_path / 'run'}")
    asked = ["--data", conditioned / "data", "--out", tmp_path / "out", "--num", 5, "--steps", 1, "--no-predict"]
    asked += ["--regression", tmp_path / "run/model"]
    command_line("evaluate", tmp_path / "run/model", *asked)
    said = capsys.readouterr().out
    assert "generate 8 volumes from the images of each of 5 held-out scans" in said and "regression on voxels" in said
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    found = metrics["truth"]
    assert found["scans"] == 5 and set(found["answers"]) == set(ANSWERS) - {OWN, CUBIC, NON_LOCAL}  # a hole is no whole image
    psnr = {name: answer["psnr_db"]["mean"] for name, answer in found["answers"].items()}
    assert psnr[TRAINED] == psnr[ONE_STEP]  # it is the same model
    assert psnr[REGRESSION] > psnr[AVERAGE] and psnr[MEAN] > psnr[SAMPLE]
    names = {goal["name"] for goal in metrics["goals"]}
    assert f"Mean of the samples: PSNR minus that of {REGRESSION}" in names
    page = (tmp_path / "out/report.html").read_text()
    assert "Beside each person" in page and (tmp_path / "out/truth.png").is_file()


def test_a_scan_of_another_dataset_takes_no_image_of_the_training(conditioned, train_here, tmp_path, fails):
    """Label maps are found in the data that are given, although the training's have the same names of subjects."""
    shutil.copytree(conditioned / "run", tmp_path / "run")
    train_here("diffusion", conditioned / "config.yaml", "training.steps=2", f"output={tmp_path / 'run'}")
    # Without the phantoms' own label maps, which would be taken rightly
    shutil.copytree(conditioned / "data", tmp_path / "others", ignore=shutil.ignore_patterns("derivatives"))
    for path in tmp_path.glob("others/sub-*/anat/*_T1w.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.flip(image.get_fdata(dtype=np.float32), 1).copy(), image.affine), path)
    asked = tmp_path / "run/model", "--data", tmp_path / "others", "--out", tmp_path / "out", "--num", 3
    assert "none of 20 scans has one" in fails("evaluate", *asked)
    shutil.copytree(conditioned / "labels", tmp_path / "others/derivatives/labels")
    config, _, held_out = scans_by_use(tmp_path / "run/model", tmp_path / "others", tmp_path / "work")
    assert len(held_out) == 19 and len(ScanImages(config, held_out).complete) == 19


def test_groups_of_a_label_map_are_told_apart_in_pictures():
    shares = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)  # one group in each of three voxels
    assert in_greys(shares).ravel() == pytest.approx([0.25, 0.625, 1])
