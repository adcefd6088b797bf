"""Toy brains: labels and covariates agree exactly, people stay themselves, and covariates hang together as in adults."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import command_line
from scipy import ndimage

from ldm3d.config.data import CovariateConfig, DataConfig
from ldm3d.data.bids import read_scans
from ldm3d.data.nifti import read_volume
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.data.phantoms import BRAIN, LABELS, LEFT_VENTRICLE, RIGHT_VENTRICLE, VENTRICLES, Change, make_phantom
from ldm3d.data.tables import read_table
from ldm3d.errors import InputError

SHAPE = (32, 38, 32)
VALIDATOR = Path(sys.executable).with_name("bids-validator-deno")


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    return pd.DataFrame([make_phantom((24, 28, 24), seed=5, index=i)[2] for i in range(120)])


def volume_ml(labels, members, spacing_mm) -> float:
    return np.isin(labels, members).sum() * spacing_mm**3 / 1000


@pytest.mark.parametrize("shape, spacing_mm", [(SHAPE, 5.7), ((40, 48, 40), 4.5), ((25, 31, 27), 7)])
def test_volumes_are_those_of_the_labels(shape, spacing_mm):
    for i in range(3):
        image, labels, covariates = make_phantom(shape, spacing_mm, seed=1, index=i)
        assert image.shape == labels.shape == (1, *shape)
        assert (image.dtype, labels.dtype) == (np.float32, np.uint8)
        assert covariates["ventricular_volume_ml"] == round(volume_ml(labels, VENTRICLES, spacing_mm), 2)
        assert covariates["brain_volume_ml"] == round(volume_ml(labels, BRAIN, spacing_mm), 1)
        assert set(np.unique(labels)) == set(LABELS)
        assert np.isfinite(image).all() and image.min() >= 0 and 700 < image.max() < 1200


def test_a_phantom_follows_from_seed_and_index():
    first, again, other, population = (make_phantom(SHAPE, seed=s, index=i) for s, i in ((2, 3), (2, 3), (2, 4), (3, 3)))
    for a, b in zip(first[:2], again[:2]):
        np.testing.assert_array_equal(a, b)
    assert first[2] == again[2]
    assert first[2]["age"] not in (other[2]["age"], population[2]["age"])
    assert (first[0] != other[0]).any() and (first[0] != population[0]).any()


@pytest.mark.parametrize("index", range(4))
def test_the_same_person_at_another_shape(index):
    coarse, fine = (make_phantom(shape, seed=4, index=index)[2] for shape in (SHAPE, (48, 58, 48)))
    assert (coarse["age"], coarse["sex"]) == (fine["age"], fine["sex"])
    for name in ("ventricular_volume_ml", "brain_volume_ml"):
        assert coarse[name] == pytest.approx(fine[name], rel=0.1)


def test_covariates_hang_together_as_in_adults(people):
    assert people["age"].between(20, 90).all()
    assert people["age"].corr(people["ventricular_volume_ml"]) > 0.5
    assert people["age"].corr(people["brain_volume_ml"]) < -0.3
    brain_ml = people.groupby("sex")["brain_volume_ml"].mean()
    assert brain_ml["M"] > brain_ml["F"] + 50
    assert people["ventricular_volume_ml"].between(5, 130).all()


def test_a_flip_is_noticed_in_every_phantom():
    for i in range(20):
        image, labels, _ = make_phantom(SHAPE, seed=6, index=i)
        left, right = (np.argwhere(labels == label) for label in (LEFT_VENTRICLE, RIGHT_VENTRICLE))
        assert len(left) > len(right) > 0
        assert left[:, 1].max() < right[:, 1].min()  # x counts to the right
        mirrored = labels[:, ::-1]
        assert (np.isin(mirrored, BRAIN) != np.isin(labels, BRAIN)).sum() > 100
        assert np.abs(image[:, ::-1] - image).mean() > 10


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 23, 19), (33, 16, 40), (64, 20, 20)])
def test_any_shape_works(shape):
    image, labels, covariates = make_phantom(shape)
    assert image.shape == labels.shape == (1, *shape)
    assert covariates["ventricular_volume_ml"] > 0 and covariates["brain_volume_ml"] > 300


@pytest.mark.parametrize("shape, spacing_mm", [((8, 8, 8), None), ((32, 32), None), (SHAPE, 0), (SHAPE, -1), (SHAPE, np.inf)])
def test_what_cannot_be_drawn_is_refused(shape, spacing_mm):
    with pytest.raises(InputError, match=r"phantom (shape|spacing)"):
        make_phantom(shape, spacing_mm)


def test_a_crop_counts_what_is_left():
    _, labels, covariates = make_phantom((16, 16, 16), 2.0)
    assert covariates["brain_volume_ml"] == round(volume_ml(labels, BRAIN, 2.0), 1) < 16**3 * 8 / 1000


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("phantoms") / "data", 4, (24, 28, 24), seed=8, workers=1)


def test_a_dataset_is_valid_bids(root):
    for folder in (root, root / "derivatives" / "labels"):
        done = subprocess.run([VALIDATOR, folder, "--json"], capture_output=True, text=True)
        issues = json.loads(done.stdout)["issues"]["issues"]
        assert not [issue for issue in issues if issue["severity"] == "error"]


def test_table_matches_the_label_maps(root):
    table = read_table(root / "participants.tsv")
    assert len(table) == 4
    for row in table.itertuples():
        name = row.participant_id
        labels, affine = read_volume(root / "derivatives/labels" / name / "anat" / f"{name}_dseg.nii.gz")
        image, image_affine = read_volume(root / name / "anat" / f"{name}_T1w.nii.gz")
        np.testing.assert_array_equal(affine, image_affine)
        np.testing.assert_allclose(affine[:3, :3], 7.714 * np.eye(3), atol=1e-3)  # 216 mm over 28 voxels
        assert image.shape == labels.shape == (1, 24, 28, 24)
        spacing_mm = float(affine[0, 0])
        assert float(row.ventricular_volume_ml) == pytest.approx(volume_ml(labels, VENTRICLES, spacing_mm), abs=0.01)
        assert float(row.brain_volume_ml) == pytest.approx(volume_ml(labels, BRAIN, spacing_mm), abs=0.1)


def test_a_folder_with_content_is_refused(root):
    before = sorted(root.rglob("*"))
    with pytest.raises(InputError, match="is not empty"):
        write_dataset(root, 1, (24, 28, 24))
    assert sorted(root.rglob("*")) == before


def test_the_number_of_workers_changes_nothing(root, tmp_path):
    write_dataset(tmp_path / "data", 4, (24, 28, 24), seed=8, workers=2)
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "data") for p in (tmp_path / "data").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "data" / file).read_bytes() == (root / file).read_bytes(), file


def test_twins_differ_in_one_covariate_alone():
    """Outside of the brain voxels differ by rounding alone; older twins have more ventricle and less brain."""
    for index in range(3):
        (image, labels, person), (older, aged, twin) = (
            make_phantom((32, 32, 32), None, 5, index, change) for change in (None, Change("age", 20))
        )
        assert abs(twin["age"] - person["age"]) == pytest.approx(20) and twin["sex"] == person["sex"]
        assert 20 <= twin["age"] <= 90
        sign = np.sign(twin["age"] - person["age"])
        assert sign * (twin["ventricular_volume_ml"] - person["ventricular_volume_ml"]) > 0
        assert sign * (twin["brain_volume_ml"] - person["brain_volume_ml"]) < 0
        outside = (labels <= 2) & (aged <= 2)
        eroded = ndimage.binary_erosion(outside[0], iterations=4)
        np.testing.assert_allclose(image[0][eroded], older[0][eroded], atol=0.01)
    again = make_phantom((32, 32, 32), None, 5, 0, Change("sex"))[2]
    assert {again["sex"], make_phantom((32, 32, 32), None, 5, 0)[2]["sex"]} == {"F", "M"}
    more = make_phantom((32, 32, 32), None, 5, 0, Change("ventricular_volume_ml", 15))[2]
    less = make_phantom((32, 32, 32), None, 5, 0)[2]
    assert more["ventricular_volume_ml"] - less["ventricular_volume_ml"] == pytest.approx(15, abs=1)
    assert {**more, "ventricular_volume_ml": 0, "brain_volume_ml": 0} == {
        **less,
        "ventricular_volume_ml": 0,
        "brain_volume_ml": 0,
    }
    for change, reason in ((("height", 3), "height"), (("age", 50), "up to 35"), (("ventricular_volume_ml", 0), "0 ml")):
        with pytest.raises(InputError, match=reason):
            Change(*change)


def test_twins_are_read_as_two_visits(tmp_path, fails):
    command_line("phantoms", tmp_path / "twins", "--subjects", 2, "--shape", 16, 16, 16, "--twins", "age=10", "--workers", 1)
    covariates = [
        CovariateConfig(name="age", kind="continuous"),
        CovariateConfig(name="sex", kind="categorical", categories=["F", "M"]),
    ]
    scans = read_scans(DataConfig(bids=tmp_path / "twins", grid={"shape": [16, 16, 16], "spacing_mm": 12}), covariates)
    assert list(scans["session"]) == ["1", "2", "1", "2"]
    ages = scans["age"].to_numpy().reshape(2, 2)
    assert np.abs(ages[:, 1] - ages[:, 0]) == pytest.approx([10, 10])
    assert (tmp_path / "twins/derivatives/labels/sub-0001/ses-2/anat/sub-0001_ses-2_dseg.nii.gz").is_file()
    assert "NAME=NUMBER" in fails("phantoms", tmp_path / "x", "--twins", "age=ten")
