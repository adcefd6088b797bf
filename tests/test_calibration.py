"""z and p of residuals: right on healthy people whatever their residuals are like, and a lesion is found."""

import importlib.util
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ldm3d.applications.calibration import LEAST_PEOPLE, Calibration
from ldm3d.errors import InputError

SHAPE = (16, 18, 16)
PLACE = 0.01 + 0.05 * np.random.default_rng(0).random(SHAPE)  # the usual size differs by place
BRAIN = np.zeros(SHAPE)
BRAIN[2:-2, 2:-2, 2:-2] = 0.5


def residuals(count, seed):
    """Heavy-tailed, smooth, of another size and mean at each place."""
    noise = np.random.default_rng(seed).standard_t(4, (count, *SHAPE))
    smooth = np.stack([ndimage.gaussian_filter(each, 0.7) for each in noise])
    return smooth * PLACE * 3 + 0.3 * PLACE


@pytest.fixture(scope="module")
def calibration():
    return Calibration.fit(residuals(24, 1), np.repeat(BRAIN[None], 24, 0), {"model": "a"})


def test_p_values_are_right_on_healthy_people(calibration):
    new = residuals(40, 2)
    p = np.stack([calibration.p_values(calibration.score(each)) for each in new])[:, BRAIN > 0]
    for level, within in ((0.5, 0.02), (0.05, 0.007), (0.01, 0.003)):
        assert abs((p <= level).mean() - level) < within
    assert (p > 0).all()


def test_corrected_clusters_are_right_on_healthy_people(calibration):
    """At most about 5% of healthy people have any cluster with p <= 0.05."""
    found = [any(row["p"] <= 0.05 for row in calibration.clusters(calibration.score(each))[1]) for each in residuals(60, 3)]
    assert np.mean(found) <= 0.12


def test_a_lesion_is_found(calibration):
    lesioned = residuals(1, 4)[0]
    lesioned[6:10, 6:10, 6:10] -= 0.5
    score = calibration.score(lesioned)
    numbered, rows = calibration.clusters(score)
    assert rows[0]["p"] == pytest.approx(1 / 25, abs=1e-4) and rows[0]["peak_z"] < -5
    np.testing.assert_allclose(rows[0]["centre"], [7.5, 7.5, 7.5], atol=0.5)
    assert (numbered[7:9, 7:9, 7:9] == 1).all()
    assert calibration.p_values(score)[8, 8, 8] == pytest.approx(calibration.chances[0], rel=1e-3)
    assert (score[0] == 0).all() and (calibration.p_values(score)[0] == 1).all()  # outside of the brain


def test_files(calibration, tmp_path):
    calibration.save(tmp_path / "c.npz")
    again = Calibration.load(tmp_path / "c.npz", {"model": "a"})
    np.testing.assert_array_equal(again.sizes, calibration.sizes)
    assert again.identity == calibration.identity and again.people == 24
    with pytest.raises(InputError, match="another procedure"):
        Calibration.load(tmp_path / "c.npz", {"model": "b"})
    (tmp_path / "d.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no calibration"):
        Calibration.load(tmp_path / "d.npz", {})
    with pytest.raises(InputError, match="too few"):
        Calibration.fit(residuals(LEAST_PEOPLE - 1, 1), np.ones((LEAST_PEOPLE - 1, *SHAPE)), {})


def test_each_is_compared_with_the_others_alone():
    """What is usual is counted without the person who is judged: as if each had been left out and all fitted anew."""
    people = residuals(10, 5)
    found = Calibration.fit(people, np.repeat(BRAIN[None], 10, 0), {})
    smoothed = np.stack([ndimage.gaussian_filter(each, 1.5 / 2.3548, mode="nearest") for each in people])
    scores = []
    for person in range(10):
        others = np.delete(smoothed, person, axis=0)
        variance = ndimage.gaussian_filter(others.var(axis=0, ddof=1), 4 / 2.3548, mode="nearest")
        away = smoothed[person] - others.mean(axis=0)
        scores.append(np.abs(away / np.sqrt((variance + 0.005**2) * (1 + 1 / 9)))[BRAIN > 0])
    scores = np.concatenate(scores)
    assert found.sizes[-1] == pytest.approx(scores.min(), abs=1e-4)
    for p in (0.5, 0.05, 0.01):
        assert np.interp(np.log(p), np.log(found.chances), found.sizes) == pytest.approx(np.quantile(scores, 1 - p), rel=0.02)


def test_memory_grows_little_beyond_the_residuals():
    """40 people at 1 mm are 0.9 GB of residuals: as much again is fine, ten times as much is not."""
    people = residuals(40, 6).astype(np.float32)
    volumes = np.repeat(BRAIN[None], 40, 0).astype(np.float32)
    tracemalloc.start()
    Calibration.fit(people, volumes, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * people.nbytes


def test_the_cut_of_one_false_cluster_is_sought_from_above(calibration):
    """Where every voxel is unusual, all of them are a single cluster: that is no reason to call every lesion found."""
    file = Path(__file__).parents[1] / "benchmarks/anomaly_judged.py"
    judged = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("anomaly_judged", file))
    spec.loader.exec_module(judged)
    people = [each + 3 * (BRAIN > 0) for each in residuals(4, 7)]
    lowest = min(np.abs(calibration.score(each))[BRAIN > 0].min() for each in people)
    assert lowest > 2
    cut = judged.one_false_cluster(calibration, people)
    counts = [ndimage.label(np.abs(calibration.score(each)) > cut)[1] for each in people]
    assert cut > lowest and np.mean(counts) <= 1
