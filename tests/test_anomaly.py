"""A scan against its healthy counterpart: what is kept, what is drawn again, and a planted lesion."""

import json

import numpy as np
import pytest
import torch
from test_placed import head, tiny_pipeline

from ldm3d.applications.anomaly import ANOMALY, about_of, anomaly, calibrate, write_anomaly
from ldm3d.applications.calibration import LEAST_PEOPLE, Calibration
from ldm3d.applications.counterpart import agreement, counterpart
from ldm3d.applications.derived import Derived
from ldm3d.data.nifti import to_image, write_volume
from ldm3d.errors import InputError

AFFINE = np.diag([4.0, 4, 4, 1])
OPTIONS = {"strengths": (0.3,), "steps": 2, "samples": 2, "levels": 2}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def scan(seed, lesion=False):
    volume = 700 * head(seed)[None]
    if lesion:
        volume[0, 8:12, 8:12, 8:12] = 0
    return to_image(volume, AFFINE)


@pytest.fixture(scope="module")
def calibration(pipe):
    return calibrate(pipe, [(scan(seed), {"age": 50}) for seed in range(LEAST_PEOPLE)], **OPTIONS)


def test_where_they_agree_the_counterpart_is_the_scan(pipe):
    found = counterpart(pipe, scan(20), {"age": 60}, doubted=0.2, **OPTIONS)
    volume = found.placed.volume
    assert torch.equal(found.mean[0, 0][found.agreed], volume[0, 0][found.agreed])
    assert not torch.equal(found.mean, volume)
    assert found.samples.shape == (2, 1, 20, 24, 20)
    torch.testing.assert_close(found.residual, volume - found.decoded)
    again = counterpart(pipe, scan(20), {"age": 60}, doubted=0.2, **OPTIONS)
    assert torch.equal(again.samples, found.samples)
    data = np.asarray(found.image().dataobj)
    assert data.shape == (20, 24, 20) and b"DERIVED" in found.image().header["descrip"].tobytes()


def test_what_differs_most_is_doubted():
    volume = torch.zeros(1, 1, 16, 16, 16)
    volume[..., 2:-2, 2:-2, 2:-2] = 0.5
    guess = volume.clone()
    guess[..., 6:9, 6:9, 6:9] = 0.9
    agreed = agreement(volume, guess, 0.05)
    assert not agreed[6:9, 6:9, 6:9].any() and agreed[:4].all()
    brain = 12**3
    assert abs((~agreed).sum() / brain - 0.05) < 0.01
    with pytest.raises(InputError, match="black"):
        agreement(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4), 0.1)


def test_a_planted_lesion_is_found_and_written(pipe, calibration, tmp_path):
    path = tmp_path / "raw" / "sub-3_T1w.nii.gz"
    write_volume(path, np.asarray(scan(30, lesion=True).dataobj)[None], AFFINE)
    found = anomaly(pipe, path, calibration, {"age": 50}, **OPTIONS)
    # The voxel of the Grid that lies at the lesion's middle
    place = np.linalg.solve(found.counterpart.placed.info["grid_affine"], [38, 38, 38, 1])[:3].round().astype(int)
    brain = np.abs(found.score[calibration.brain])
    assert found.score[tuple(place)] < 0
    assert abs(found.score[tuple(place)]) > 2 * brain.mean()
    assert (found.score[~calibration.brain] == 0).all() and found.p.min() > 0
    files = Derived(tmp_path / "out", ANOMALY, pipe, path, {})
    assert write_anomaly(files, found, calibration) == tmp_path / "out/sub-3/anat/sub-3_desc-zscore_T1w.nii.gz"
    sidecar = json.loads(files.path("zscore", ".json").read_text())
    assert sidecar["Anomaly"]["HealthyPeople"] == LEAST_PEOPLE and sidecar["Sources"] == ["sub-3_T1w.nii.gz"]
    assert files.is_done and files.path("counterpart").is_file() and files.path("clusters").is_file()


def test_a_calibration_belongs_to_a_procedure(pipe, calibration, tmp_path):
    calibration.save(tmp_path / "healthy.npz")
    Calibration.load(tmp_path / "healthy.npz", about_of(pipe, OPTIONS))
    Calibration.load(tmp_path / "healthy.npz", about_of(pipe, {**OPTIONS, "doubted": 0.1}))  # what it is by default
    with pytest.raises(InputError, match=r"healthy\.npz is of another procedure .steps: 2, not 3"):
        Calibration.load(tmp_path / "healthy.npz", about_of(pipe, {**OPTIONS, "steps": 3}))
    # One that was never written to a file, and one that was made with other options than those by default
    with pytest.raises(InputError, match=r"the calibration is of another procedure .*samples: 2, not 4"):
        anomaly(pipe, scan(20), calibration, {"age": 50})
    with pytest.raises(InputError, match=r"doubted: 0\.1, not 0\.2"):
        anomaly(pipe, scan(20), calibration, {"age": 50}, doubted=0.2, **OPTIONS)


def test_a_calibration_that_was_stopped_goes_on(pipe, calibration, tmp_path, monkeypatch):
    people = []
    for seed in range(LEAST_PEOPLE):
        people.append((tmp_path / f"sub-{seed}_T1w.nii.gz", {"age": 50}))
        write_volume(people[-1][0], np.asarray(scan(seed).dataobj)[None], AFFINE)
    seen = []

    def counted(pipe, scan, covariates, **options):
        seen.append(scan)
        return counterpart(pipe, scan, covariates, **options)

    def stopped(_outcome):
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("ldm3d.applications.anomaly.counterpart", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, people, stopped, tmp_path / "kept", **OPTIONS)
    found = calibrate(pipe, people, None, tmp_path / "kept", **OPTIONS)
    assert seen == [path for path, _ in people]  # nobody twice
    assert found.identity == calibration.identity
    calibrate(pipe, [(people[0][0], {"age": 51}), *people[1:]], None, tmp_path / "kept", **OPTIONS)
    assert seen[LEAST_PEOPLE:] == [people[0][0]]  # who is asked for otherwise is looked at again


@pytest.mark.parametrize("wrong", [{"strengths": ()}, {"strengths": (0.01,)}, {"doubted": 1.0}, {"samples": 0}])
def test_settings_out_of_range(pipe, wrong):
    with pytest.raises(InputError, match="doubted between 0 and 1"):
        counterpart(pipe, scan(1), **{**OPTIONS, **wrong})
