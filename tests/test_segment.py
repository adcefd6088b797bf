"""Models that make label maps: trained like any other, and what is said of a scan by several of their samples."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import command_line, train

from ldm3d.applications.segment import Segmented, segment
from ldm3d.config.read import load_config
from ldm3d.data.coded import CodedVolumes
from ldm3d.data.preparing import read_scan_table
from ldm3d.errors import InputError
from ldm3d.metrics.labels import calibration_error, dice, energy_distance, negative_log_likelihood, with_background
from ldm3d.pipeline import Pipeline


def label_settings(conditioned, folder):
    settings = yaml.safe_load((conditioned / "config.yaml").read_text())
    settings["output"], settings["diffusion"]["makes"] = str(folder / "run"), "labels"
    settings["diffusion"]["conditions"] = settings["diffusion"]["conditions"][1:2]
    del settings["diffusion"]["init_from"]
    settings["autoencoder"].pop("adversarial", None)
    return settings


@pytest.fixture(scope="module")
def model(conditioned, tmp_path_factory):
    """A folder with a model that makes label maps, through every command; all but one subject have one."""
    folder = tmp_path_factory.mktemp("labels")
    shutil.copytree(conditioned / "run/prepared", folder / "run/prepared")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(label_settings(conditioned, folder)))
    train("autoencoder", config)
    command_line("encode", config)
    train("diffusion", config)
    return folder


def test_the_autoencoder_is_of_label_maps_and_the_scan_is_given_by_its_voxels(model):
    pipe = Pipeline.from_pretrained(model / "run/model", "cpu", torch.float32)
    assert pipe.labels == {"inside": (4, 43), "rest": (3,)} and pipe.suffix == "probseg"
    assert pipe.autoencoder.in_channels == 2 and pipe.unet.image_channels == 4**3
    assert [(each.name, each.form) for each in pipe.conditions] == [("T1w", "voxels")]
    config = load_config(model / "config.yaml")
    scans = read_scan_table(config)
    coded = CodedVolumes.of(config, scans)
    there = [key in coded for key in scans["key"]]
    assert sum(there) == len(scans) - 1
    truth = torch.from_numpy(np.stack([coded(key) for key in scans["key"][there][:3]]))
    assert truth.shape[1] == 2 and 0 < truth.mean() < 1 and truth.sum(dim=1).max() <= 1.001
    assert len(list(coded.kept[0].folder.glob("*.npy"))) == sum(there)  # brought to the Grid once
    again = pipe.reconstruct(truth)
    assert (again - truth).square().mean() < 0.3 * truth.var()
    moments = np.load(config.latents_folder / "moments.npy", mmap_mode="r")
    assert np.isfinite(moments[:, 0]).reshape(len(scans), -1).all(axis=1).tolist() == there


def test_a_scan_gets_probabilities_and_volumes_on_its_own_voxels(model):
    pipe = Pipeline.from_pretrained(model / "run/model", "cpu", torch.float32)
    path = sorted(path for path in model.parent.glob("conditioned*/data/sub-*/anat/*_T1w.nii.gz"))[2]
    done = []
    found = segment(pipe, path, samples=3, seed=1, steps=2, progress=lambda n, of: done.append((n, of)))
    scan = nib.load(path)
    assert found.probabilities.shape == (3, *scan.shape) and done[-1] == (3, 3)
    np.testing.assert_allclose(found.affine, scan.affine)
    np.testing.assert_allclose(found.probabilities.sum(axis=0), 1, atol=1e-5)
    voxel_ml = np.prod(scan.header.get_zooms()) / 1000
    np.testing.assert_allclose(
        found.volumes_ml.mean(axis=0), found.probabilities[1:].sum(axis=(1, 2, 3)) * voxel_ml, rtol=1e-3
    )
    assert not np.allclose(found.volumes_ml[0], found.volumes_ml[1])
    assert set(np.unique(found.labels)) <= {0, 4, 3}
    one, two = (segment(pipe, path, samples=1, seed=1, steps=2) for _ in range(2))
    np.testing.assert_array_equal(one.probabilities, two.probabilities)
    np.testing.assert_allclose(one.volumes_ml[0], found.volumes_ml[0], rtol=1e-5)


def test_the_command_writes_maps_and_volumes_once(model, experiment, tmp_path, capsys, fails):
    path = sorted(path for path in model.parent.glob("conditioned*/data/sub-*/anat/*_T1w.nii.gz"))[2]
    how = ["--samples", 2, "--steps", 2, "--device", "cpu"]
    command = ["segment", model / "run/model", path, "--out", tmp_path / "out", *how]
    command_line(*command)
    assert "inside" in capsys.readouterr().out
    (labels,) = tmp_path.glob("out/sub-*/anat/*_desc-labels_dseg.nii.gz")
    sidecar = json.loads(labels.with_name(labels.name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["LabelMap"] == {"inside": [4, 43], "rest": [3]} and sidecar["Samples"] == 2
    assert sidecar["VolumesMl"]["rest"]["low"] <= sidecar["VolumesMl"]["rest"]["ml"] <= sidecar["VolumesMl"]["rest"]["high"]
    assert nib.load(labels).header["descrip"].item().decode().startswith("DERIVED")
    (shares,) = tmp_path.glob("out/sub-*/anat/*_desc-probabilities_probseg.nii.gz")
    assert nib.load(shares).shape == (*nib.load(path).shape, 3)
    command_line(*command)
    assert "is there already" in capsys.readouterr().out
    table = tmp_path / "scans.csv"
    table.write_text(f"path\n{path}\n{tmp_path / 'sub-99_T1w.nii.gz'}\n")
    said = fails("segment", model / "run/model", "--table", table, "--out", tmp_path / "out", *how)
    assert "1 of 2 scans were left out" in said and "sub-99" in said
    assert "makes no label maps" in fails("segment", experiment / "run/model", path, "--device", "cpu")
    assert "no such file" in fails("segment", model / "run/model", tmp_path / "nothing.nii.gz", "--device", "cpu")


def test_generated_label_maps_are_four_dimensional_and_marked(model, tmp_path):
    path = sorted(path for path in model.parent.glob("conditioned*/data/sub-*/anat/*_T1w.nii.gz"))[3]
    out = tmp_path / "out"
    command_line("generate", model / "run/model", "--condition", f"T1w={path}", "--steps", 2, "--out", out, "--device", "cpu")
    (written,) = out.glob("sub-*/anat/*_probseg.nii.gz")
    assert nib.load(written).shape[3] == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_from": "brains-4.5mm"}, "this model's is of label maps"),
        ({"conditions": [{"name": "T2w", "kind": "image", "suffix": "T2w"}]}, "add `form: voxels`"),
        ({"makes": "nothing"}, "names no condition of kind labels"),
        ({"conditions": [{"name": "v", "kind": "image", "visit": "other", "form": "voxels"}]}, "drop `form`"),
    ],
)
def test_what_does_not_go_with_label_maps_is_refused(changes, message, conditioned, tmp_path):
    settings = label_settings(conditioned, tmp_path)
    settings["diffusion"] |= {**changes, "conditions": settings["diffusion"]["conditions"] + changes.get("conditions", [])}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "config.yaml")


def test_volumes_and_uncertainty_of_known_maps():
    """Two samples that differ by 2 ml: Student's t with one degree of freedom has 6.314 at 95%."""
    p = np.zeros((3, 2, 1, 1), np.float32)
    p[:, 0, 0, 0], p[:, 1, 0, 0] = (0, 1, 0), (1 / 3, 1 / 3, 1 / 3)
    found = Segmented({"a": (7, 8), "b": (9,)}, np.eye(4), p, np.array([[10.0, 5.0], [12.0, 5.0]]))
    assert found.labels[0, 0, 0] == 7 and found.uncertainty[:, 0, 0].tolist() == pytest.approx([0, 1], abs=1e-6)
    half = 6.3138 * np.sqrt(1.5) * np.sqrt(2)
    assert found.volumes["a"]["ml"] == 11 and found.volumes["a"]["high"] == pytest.approx(11 + half, rel=1e-4)
    assert found.volumes["b"] == {"ml": 5, "low": 5, "high": 5}


def test_metrics_of_label_maps_have_their_known_answers():
    truth = np.zeros((10, 10, 10), int)
    truth[:5] = 1
    half = np.zeros_like(truth)
    half[:5, :5] = 1
    assert dice(half, truth, 3)[0] == pytest.approx(2 / 3) and np.isnan(dice(half, truth, 3)[1])
    everywhere = np.ones(truth.shape, bool)
    p = np.full((2, *truth.shape), 0.5)
    p[1], p[0] = 0.8, 0.2  # sure of class 1 by 0.8, and right in half of the voxels
    assert calibration_error(p, truth, everywhere) == pytest.approx(0.3)
    expected = -0.5 * (np.log(0.8) + np.log(0.2))
    assert negative_log_likelihood(p, truth, everywhere) == pytest.approx(expected)
    assert calibration_error(np.stack([1 - truth, truth]).astype(float), truth, everywhere) == 0
    assert energy_distance([truth, truth], truth, 2) == 0
    assert energy_distance([half, half], truth, 2) == pytest.approx(2 / 3)
    assert energy_distance([half, truth], truth, 2) == pytest.approx(1 / 3 - 1 / 3)
    shares = np.stack([np.full((1, 1, 1), 0.8), np.full((1, 1, 1), 0.6)])
    assert with_background(shares)[:, 0, 0, 0].tolist() == pytest.approx([0, 0.8 / 1.4, 0.6 / 1.4])
