"""Scans of lower resolution as measurements: what a model makes of one, measured again, is that scan."""

from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from ldm3d.conditions import ImageChannels
from ldm3d.config.conditions import Degradation, DegradedCondition
from ldm3d.data.conditions import ScanImages
from ldm3d.data.degrade import degraded
from ldm3d.data.slicing import Measurement, sliced, thick_axes
from ldm3d.description import Preparation
from ldm3d.diffusion.operators import Identity, slices
from ldm3d.generation.given import Images
from ldm3d.generation.given_scans import place
from ldm3d.geometry import Grid, resample
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.randomness import generator

SHAPE, MM = (24, 28, 24), 4.0
GRID = Grid.centred(SHAPE, (MM,) * 3)
THICK = DegradedCondition(
    name="thick", kind="degraded", degradations=[Degradation(operator="resolution", strength=(7, 9), axes="z")]
)


def field(mm: float, shape, affine, waves: int, seed: int):
    """Waves within a ball of 36 mm radius in world space, in [0, 1]."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    random = np.random.default_rng(seed)
    ways, phases = random.normal(size=(waves, 3)) * 2 * np.pi / mm / np.sqrt(3), random.uniform(0, 6, waves)
    values = 0.5 + 0.1 * np.sin(places @ ways.T + phases).sum(-1)
    return (values / (1 + np.exp((np.linalg.norm(places, axis=-1) - 36) / 3))).clip(0, 1)[None].astype(np.float32)


def scan_of(angles):
    """(truth on the Grid, a scan of 12 mm slices, turned by some degrees, of the same at 1 mm, and its affine)."""
    fine = np.diag([1.0, 1, 1, 1])
    fine[:3, 3] = -60
    brain = field(16, (121,) * 3, fine, 6, 0)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag([1.5, 1.5, 12])
    shape = (64, 64, 9)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return resample(brain, fine, GRID.affine, SHAPE), resample(brain, fine, affine, shape), affine


@pytest.fixture(scope="module")
def scanned():
    return scan_of([20, -12, 8])


def error(a, b):
    return float(np.sqrt(np.mean(np.square(np.asarray(a) - np.asarray(b)))))


def test_what_is_measured_of_the_truth_is_the_scan():
    truth, scan, affine = scan_of([0, 0, 0])
    assert thick_axes(affine, MM) == {2: pytest.approx(12)}
    seen, lattice = sliced(scan, affine, GRID.affine, SHAPE, {2: 12.0}, "gaussian")
    assert seen.values.shape == (1, 24, 24, 9)  # 4 mm in plane, as the Grid
    np.testing.assert_allclose(np.linalg.norm(lattice[:3, :3], axis=0), [4, 4, 12], rtol=1e-5)
    of_truth = seen.linear(torch.from_numpy(truth))
    assert error(of_truth, seen.values) < 0.02 < 0.1 < float(seen.values.std())
    for wrong in ({}, {2: 20.0}):  # points, and thicker slices
        other = sliced(scan, affine, GRID.affine, SHAPE, wrong, "gaussian")[0].linear(torch.from_numpy(truth))
        assert error(other, seen.values) > 1.3 * error(of_truth, seen.values)


def test_an_answer_that_agrees_is_nearer_to_the_truth(scanned):
    """Whatever is wrong with it that a scanner would have seen is mended; what it would not have seen stays as it is."""
    truth, scan, affine = scanned
    seen, _ = sliced(scan, affine, GRID.affine, SHAPE, {2: 12.0}, "gaussian")
    made = (truth + 0.4 * (field(40, SHAPE, GRID.affine, 4, 7) - field(40, SHAPE, GRID.affine, 4, 8))).clip(0, 1)
    agreed = seen.agreed(made)
    measured = lambda x: float((seen.linear(torch.from_numpy(x)) - seen.values).norm() / seen.values.norm())  # noqa: E731
    assert measured(agreed) < 0.01 < 0.05 < measured(made)
    assert error(agreed, truth) < 0.6 * error(made, truth)

    # A pattern that averages out within each slice: not measured, so not changed
    exact = Measurement(slices(2, 24, 2.0, profile="box"), torch.full((1, 24, 28, 12), 0.5))
    stripes = np.full((1, *SHAPE), 0.5, np.float32) + 0.2 * (-1) ** np.arange(24, dtype=np.float32)
    np.testing.assert_allclose(exact.agreed(stripes), stripes, atol=1e-6)
    low = exact.agreed(stripes - 0.15)
    np.testing.assert_allclose(low, stripes, atol=0.01)


def test_noise_of_the_scan_is_not_taken_over():
    """The mean of x given y, for an error of 0.03; and nothing happens in air."""
    noisy = Measurement(Identity(), torch.full((1, 4, 4, 4), 0.6), noise_std=0.03)
    volume = np.full((1, 4, 4, 4), 0.5, np.float32)
    volume[0, 0] = 0
    np.testing.assert_allclose(noisy.agreed(volume)[0, 1:], 0.55, atol=1e-5)  # equal variances: half of the way
    assert not noisy.agreed(volume)[0, 0].any()
    assert Measurement(Identity(), noisy.values).agreed(volume)[0, 1] == pytest.approx(0.6, abs=0.001)


def test_a_degraded_volume_says_how_it_became_so(monkeypatch):
    volume = torch.from_numpy(field(20, SHAPE, GRID.affine, 6, 3))
    worse = degraded(volume, (MM,) * 3, THICK.degradations, generator(5))
    assert torch.equal(worse.linear(volume), worse.volume)
    noisy = [*THICK.degradations, Degradation(operator="noise", strength=(0.02, 0.02))]
    again = degraded(volume, (MM,) * 3, noisy, generator(5))
    assert 0.01 < error(again.linear(volume), again.volume) < 0.03

    images = ScanImages.__new__(ScanImages)
    images.keys = ["a"]
    images.config = SimpleNamespace(
        given_conditions=(THICK,), data=SimpleNamespace(grid=SimpleNamespace(spacing_mm=(MM,) * 3))
    )
    monkeypatch.setattr("ldm3d.data.conditions.load_prepared", lambda config, key: volume.numpy())
    coarse = images.coarse(0)["thick"]
    assert torch.equal(coarse.linear(volume), coarse.values) and torch.equal(images.given(0)[0]["thick"], coarse.values)


@pytest.mark.parametrize(
    "operators, coarsens",
    [
        (["resolution"], True),
        (["resolution", "noise", "blur"], True),
        (["noise"], False),
        (["resolution", "hole"], False),
        (["resolution", "bias"], False),
    ],
)
def test_which_conditions_say_what_was_measured(operators, coarsens):
    strengths = {"noise": (0, 0.1), "bias": (0, 0.5)}
    steps = [Degradation(operator=each, strength=strengths.get(each, (5, 9))) for each in operators]
    assert DegradedCondition(name="a", kind="degraded", degradations=steps).coarsens == coarsens


def test_what_a_model_makes_of_a_scan_agrees_with_it(scanned):
    """On the Grid, and not where the scan is as fine as the Grid."""
    truth, scan, affine = scanned
    image = nib.Nifti1Image(1000 * scan[0], affine)
    given = place((THICK,), {"thick": image}, GRID, Preparation(percentiles=(0, 100)), False)
    measurement = given.coarse["thick"]
    images = Images((THICK,), lambda number: given, {}, None)
    made = (0.9 * truth).astype(np.float32)
    finished = images.finished(0, made, lambda volume: volume)
    left = [measurement.linear(torch.from_numpy(volume)) - measurement.values for volume in (finished, made)]
    found = [float(each.norm() / measurement.values.norm()) for each in left]
    assert found[0] < 0.02 < 0.1 < found[1]  # the brightest of the scan are beyond the range of volumes
    bare = Images((THICK,), lambda number: replace(given, coarse={}), {}, None)
    np.testing.assert_array_equal(bare.finished(0, made, lambda volume: volume), made)
    whole = nib.Nifti1Image(1000 * truth[0], GRID.affine)
    assert place((THICK,), {"thick": whole}, GRID, Preparation(), False).coarse == {}
    assert isinstance(Measurement(Identity(), torch.zeros(1, *SHAPE)).agreed(made), np.ndarray)
    assert ImageChannels((THICK,), Autoencoder(2, 4, (4, 8), blocks=1)).count == 64
