"""Toy brains: what the table says is what the labels hold, and everybody's left differs from their right."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from ldm3d.data.phantoms import (
    BRAIN,
    GREY,
    LABELS,
    LEFT_VENTRICLE,
    RIGHT_VENTRICLE,
    VENTRICLES,
    WHITE,
    default_spacing,
    draw_person,
    make_phantom,
    write_dataset,
)
from ldm3d.errors import InputError

VALIDATOR = Path(sys.executable).with_name("bids-validator-deno")
SMALL = (24, 28, 24)


@pytest.fixture(scope="module")
def people():
    """(images, labels, table) of 150 small phantoms."""
    images, labels, rows = zip(*(make_phantom(SMALL, None, 1, i) for i in range(150)))
    return np.stack(images), np.stack(labels), pd.DataFrame(rows)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("phantoms") / "bids", 4, SMALL, seed=6, workers=2)


def test_same_person_for_the_same_seed_and_index():
    image, labels, covariates = make_phantom(SMALL, None, 3, 7)
    again, labels_again, covariates_again = make_phantom(SMALL, None, 3, 7)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(labels, labels_again)
    assert covariates == covariates_again
    for seed, index in ((3, 8), (4, 7)):
        assert make_phantom(SMALL, None, seed, index)[2] != covariates


def test_the_person_does_not_depend_on_the_grid():
    coarse, fine = (make_phantom(shape, None, 0, 5)[2] for shape in (SMALL, (48, 56, 48)))
    assert (coarse["age"], coarse["sex"]) == (fine["age"], fine["sex"])
    voxel_ml = default_spacing(SMALL) ** 3 / 1000
    assert abs(coarse["ventricular_volume_ml"] - fine["ventricular_volume_ml"]) < voxel_ml
    assert coarse["brain_volume_ml"] == pytest.approx(fine["brain_volume_ml"], rel=0.03)


def test_volumes_are_those_of_the_labels(people):
    _, labels, table = people
    voxel_ml = default_spacing(SMALL) ** 3 / 1000
    counted = np.isin(labels, VENTRICLES).sum((1, 2, 3)) * voxel_ml
    np.testing.assert_allclose(table["ventricular_volume_ml"], counted, atol=0.0051)  # two decimals
    np.testing.assert_allclose(table["brain_volume_ml"], np.isin(labels, BRAIN).sum((1, 2, 3)) * voxel_ml, atol=0.051)


def test_counted_ventricles_are_those_drawn():
    """The shape is widened until it holds as many voxels as the person is to have: half a voxel is all it may miss."""
    for index in range(10):
        person = draw_person(np.random.default_rng([0, index, 0]))
        found = make_phantom((32, 38, 32), None, 0, index)[2]["ventricular_volume_ml"]
        assert abs(found - person.ventricles_ml) < default_spacing((32, 38, 32)) ** 3 / 1000


def test_covariates_hang_together_as_in_people():
    people = [draw_person(np.random.default_rng([2, i, 0])) for i in range(3000)]
    age = np.array([p.age_years for p in people])
    ventricles = np.array([p.ventricles_ml for p in people])
    assert 20 <= age.min() < 21 and 89 < age.max() <= 90
    assert ventricles.min() >= 8 and ventricles.max() <= 110
    assert 0.6 < np.corrcoef(age, ventricles)[0, 1] < 0.75  # age says much of the ventricles, not all
    decades = [ventricles[(age >= a) & (age < a + 10)].mean() for a in range(20, 90, 10)]
    assert np.all(np.diff(decades) > 0)
    assert decades[-1] - decades[-2] > decades[1] - decades[0]  # faster with age


def test_volumes_hang_together_as_in_people(people):
    table = people[2]
    assert np.corrcoef(table["age"], table["ventricular_volume_ml"])[0, 1] > 0.5
    assert np.corrcoef(table["age"], table["brain_volume_ml"])[0, 1] < -0.3
    brain = table.groupby("sex")["brain_volume_ml"].mean()
    assert 1.04 < brain["M"] / brain["F"] < 1.16
    assert table["brain_volume_ml"].between(850, 1550).all()


def test_everybody_would_notice_a_flip(people):
    _, labels, _ = people
    left, right = ((labels == side).sum((1, 2, 3)) for side in (LEFT_VENTRICLE, RIGHT_VENTRICLE))
    assert left.sum() > 1.1 * right.sum()
    assert np.mean(left > right) > 0.85  # of a dozen voxels each in the young: counting noise
    # Each ventricle lies on its side of X, and the right hemisphere is further forward than the left
    half = SMALL[0] // 2
    assert not (labels[:, half:] == LEFT_VENTRICLE).any()
    assert not (labels[:, :half] == RIGHT_VENTRICLE).any()
    middle = [np.nonzero(np.isin(part, BRAIN))[2].mean() for part in (labels[:, :half], labels[:, half:])]
    assert middle[1] - middle[0] > 0.2  # voxels of 7.7 mm


def test_image_is_t1_weighted(people):
    images, labels, _ = people
    levels = {label: np.median(images[labels == label]) for label in LABELS}
    assert levels[WHITE] > levels[GREY] > levels[3] > levels[0]
    assert levels[GREY] > levels[LEFT_VENTRICLE] > levels[0]
    assert 600 < levels[WHITE] < 900
    assert images.min() >= 0 and images.max() < 1200


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 23, 19), (32, 32, 32), (64, 40, 48)])
def test_any_shape_holds_the_whole_head(shape):
    for index in range(6):
        image, labels, covariates = make_phantom(shape, None, 0, index)
        assert image.shape == labels.shape == shape
        assert image.dtype == np.float32 and labels.dtype == np.uint8
        assert set(np.unique(labels)) == set(LABELS)
        assert all(not np.take(labels, end, axis).any() for axis in range(3) for end in (0, -1))
        assert covariates["ventricular_volume_ml"] > 0


def test_a_grid_inside_the_head_counts_what_is_left():
    labels, covariates = make_phantom((20, 20, 20), 3.0, 0, 0)[1:]
    assert covariates["brain_volume_ml"] <= 20**3 * 0.027
    assert covariates["ventricular_volume_ml"] == pytest.approx(np.isin(labels, VENTRICLES).sum() * 0.027, abs=0.01)
    assert np.isin(labels, BRAIN).mean() > 0.5  # ventricles do not swallow what is left of the brain


@pytest.mark.parametrize(("shape", "spacing_mm"), [((15, 32, 32), None), ((32, 32), None), ((32, 32, 32), 0.0)])
def test_what_cannot_be_drawn_is_said(shape, spacing_mm):
    with pytest.raises(InputError, match="must"):
        make_phantom(shape, spacing_mm, 0, 0)


def test_dataset_is_valid_bids(dataset):
    done = subprocess.run([VALIDATOR, dataset, "--json"], capture_output=True, text=True)
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    assert done.returncode == 0


def test_dataset_holds_what_make_phantom_makes(dataset):
    table = pd.read_csv(dataset / "participants.tsv", sep="\t")
    columns = json.loads((dataset / "participants.json").read_text())
    assert list(table) == ["participant_id", "age", "sex", "ventricular_volume_ml", "brain_volume_ml"]
    assert set(columns) >= set(table) - {"participant_id"}
    names = pd.read_csv(dataset / "derivatives/labels/dseg.tsv", sep="\t")
    assert dict(zip(names["index"], names["name"])) == LABELS
    for index, row in table.iterrows():
        image, labels, covariates = make_phantom(SMALL, None, 6, index)
        assert row["participant_id"] == f"sub-{index + 1:04d}"
        assert {key: row[key] for key in covariates} == covariates
        name = row["participant_id"]
        scan = nibabel.load(dataset / name / "anat" / f"{name}_T1w.nii.gz")
        mask = nibabel.load(dataset / "derivatives/labels" / name / "anat" / f"{name}_dseg.nii.gz")
        np.testing.assert_allclose(scan.get_fdata(), image, atol=0.51)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), labels)
        for written in (scan, mask):
            assert nibabel.aff2axcodes(written.affine) == ("R", "A", "S")
            middle = written.affine @ [*(np.array(SMALL) - 1) / 2, 1]
            np.testing.assert_allclose(middle[:3], 0, atol=1e-4)
            np.testing.assert_allclose(written.header.get_zooms(), default_spacing(SMALL), rtol=1e-6)
            assert b"SYNTHETIC" in written.header["descrip"].tobytes()


def test_dataset_does_not_mix_with_what_is_there(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match="not empty"):
        write_dataset(tmp_path, 1, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
