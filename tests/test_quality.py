"""Measures of image quality against what is done to a brain, and the order in which damaged ones come."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from ldm3d.data import quality
from ldm3d.data.phantoms import make_phantom
from ldm3d.data.quality import MEASURES, deviations, distances, look_at, read_look, write_look

SPACING = (4.5, 4.5, 4.5)
RANDOM = np.random.default_rng(0)


def brain(index: int = 0):
    """A toy brain in [0, 1] with a tenth of a per cent of noise, (1, X, Y, Z)."""
    image, _, _ = make_phantom((40, 48, 40), 4.5, 0, index)
    return np.clip(image / 1000 / np.quantile(image, 0.998) * 1000, 0, 1).astype(np.float32)


BRAIN = brain()


def measured(volume):
    return dict(zip(MEASURES, look_at(volume, SPACING)["measures"]))


def noisy(volume, sigma):
    return np.clip(volume + np.random.default_rng(0).normal(0, sigma, volume.shape), 0, 1)


def ghosted(volume, share=0.2):
    """A copy shifted by a quarter of the field of view to the front and back, as motion along the phase direction makes."""
    shift = volume.shape[2] // 4
    return np.clip((1 - share) * volume + share / 2 * (np.roll(volume, shift, 2) + np.roll(volume, -shift, 2)), 0, 1)


def blurred(volume, sigma=1.5):
    return ndimage.gaussian_filter(volume, (0, sigma, sigma, sigma))


def test_signal_to_noise_of_a_known_noise():
    """An even block of 0.6 with noise of 0.02 and of 0.04: 30 and 15."""
    for sigma, snr in ((0.02, 30), (0.04, 15)):
        volume = np.zeros((1, 40, 40, 40), np.float32)
        volume[:, 6:34, 6:34, 6:34] = RANDOM.normal(0.6, sigma, (28, 28, 28))
        assert measured(volume)["snr"] == pytest.approx(snr, rel=0.05)


def test_contrast_to_noise_and_share_of_two_known_tissues():
    volume = np.zeros((1, 40, 40, 40), np.float32)
    volume[:, 10:30, 10:30, 10:20] = 0.8
    volume[:, 10:30, 10:30, 20:30] = 0.5
    volume[volume > 0] += RANDOM.normal(0, 0.03, 8000)
    found = measured(volume)
    assert found["cnr"] == pytest.approx(0.3 / 0.03, rel=0.1)
    assert found["foreground"] == pytest.approx(8000 / 64000)


def test_entropy_focus_of_known_volumes():
    """One bright voxel 0; n even voxels of N: sqrt(n) log(sqrt(n)) of sqrt(N) log(sqrt(N)) (Atkinson et al. 1997)."""
    volume = np.zeros((1, 20, 20, 20), np.float32)
    volume[0, 3, 4, 5] = 1
    assert measured(volume)["efc"] == pytest.approx(0, abs=1e-9)
    volume[:, 5:15, 5:15, 5:15] = 1
    volume[0, 3, 4, 5] = 0
    expected = np.sqrt(1000) * np.log(np.sqrt(1000)) / (np.sqrt(8000) * np.log(np.sqrt(8000)))
    assert measured(volume)["efc"] == pytest.approx(expected)
    assert measured(np.ones_like(volume))["efc"] == pytest.approx(1)


def test_damage_moves_the_measures_as_it_should():
    plain = measured(BRAIN)
    for sigma in (0.03, 0.06):
        found = measured(noisy(BRAIN, sigma))
        assert found["snr"] < plain["snr"] and found["cnr"] < plain["cnr"]
        plain = found
    plain = measured(BRAIN)
    assert measured(ghosted(BRAIN))["efc"] > 1.02 * plain["efc"] < measured(blurred(BRAIN))["efc"]
    assert measured(ghosted(BRAIN, 0.4))["efc"] > measured(ghosted(BRAIN, 0.2))["efc"]
    half = BRAIN.copy()
    half[:, :, :24] = 0
    assert measured(half)["foreground"] < 0.7 * plain["foreground"]


def test_nothing_and_one_value_are_measured_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(look_at(np.zeros((1, 8, 9, 10)), SPACING)["measures"]).all()
        assert np.isfinite(look_at(np.ones((1, 8, 9, 10)), SPACING)["measures"]).all()
        assert look_at(np.ones((2, 1, 3, 2)), (1, 2, 3))["picture"].ndim == 2


@pytest.fixture(scope="module")
def looks():
    return [look_at(noisy(brain(i), 0.01), SPACING) for i in range(16)]


def odd(looks) -> pd.DataFrame:
    frame = pd.DataFrame([look["measures"] for look in looks], columns=MEASURES)
    frame["distance"] = distances(np.array([look["coarse"] for look in looks]))
    return deviations(frame)


@pytest.mark.parametrize(
    "damage, measure",
    [
        (lambda v: noisy(v, 0.15), "snr"),
        (lambda v: ghosted(v, 0.6), "efc"),
        (lambda v: blurred(v, 2), "snr"),
        (lambda v: v * (np.arange(48) < 24)[:, None], "distance"),
        (lambda v: v[:, :, :, ::-1], "distance"),
        (lambda v: 1 - v, "distance"),
        (lambda v: 0 * v, "snr"),
    ],
    ids=["noise", "ghosts", "blur", "half of it", "upside down", "inverted", "nothing"],
)
def test_a_damaged_volume_comes_first(looks, damage, measure):
    found = odd([*looks, look_at(damage(brain(3)), SPACING)]).abs()
    assert found.max(axis=1).argmax() == 16
    assert found[measure][16] > quality.ODD


def test_sound_volumes_are_not_far(looks):
    assert (odd(looks).abs().max(axis=1) > 2 * quality.ODD).sum() == 0


def test_deviations_of_known_numbers():
    """Near ones are not odd; what could not be measured is; most alike leave the mean deviation, 0.8, to compare with."""
    columns = {"efc": [1.0, 2, 3, 4, 100], "distance": [1.0, 2, 3, 4, np.nan], "foreground": [1.0, 1, 1, 1, 5]}
    values = pd.DataFrame({**columns, "snr": [1.0, 10, 100, 1000, 10000]})
    found = deviations(values)
    np.testing.assert_allclose(found["efc"], (values["efc"] - 3) / 1.4826)
    np.testing.assert_allclose(found["distance"], [0, 0, 0.5 / 1.4826, 1.5 / 1.4826, np.inf])
    np.testing.assert_allclose(found["foreground"], [0, 0, 0, 0, 4 / (1.2533 * 0.8)])
    np.testing.assert_allclose(found["snr"], np.arange(-2, 3) / 1.4826)


def test_distance_of_known_volumes():
    coarse = np.full((9, 2, 2, 2), 2, np.float16)
    coarse[4] = 3
    np.testing.assert_allclose(distances(coarse), np.where(np.arange(9) == 4, 0.5, 0))


def test_a_look_is_read_as_it_was_written(tmp_path):
    look = look_at(BRAIN, SPACING)
    write_look(tmp_path / "x.npz", look)
    again = read_look(tmp_path / "x.npz")
    assert again.keys() == look.keys() and all(np.array_equal(again[name], look[name]) for name in look)
    assert read_look(tmp_path / "y.npz") is None
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-50])
    assert read_look(tmp_path / "x.npz") is None


def test_a_look_of_an_older_version_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "VERSION", 0)
    write_look(tmp_path / "x.npz", look_at(BRAIN, SPACING))
    monkeypatch.undo()
    assert read_look(tmp_path / "x.npz") is None


def test_coarse_and_picture_are_small_and_of_every_grid():
    for shape in ((56, 72, 56), (160, 224, 160), (17, 16, 3)):
        look = look_at(np.full((1, *shape), 0.5, np.float32), (1, 1, 1))
        assert max(look["coarse"].shape) <= 16 and look["coarse"][0, 0, 0] == 0.5
        assert look["picture"].shape[1] <= 420
