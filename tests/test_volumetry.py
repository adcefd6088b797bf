"""Volumetry against exact labels: how well it agrees, what blur and noise do to it, and that no input makes it fail."""

import numpy as np
import pytest
from scipy import ndimage

from ldm3d.data.phantoms import make_phantom
from ldm3d.data.placing import to_grid
from ldm3d.errors import InputError
from ldm3d.geometry import Grid
from ldm3d.rulers.volumetry import apply_measure, load_measure, measure_volumes
from ldm3d.statistics.agreement import agreement

GRID = Grid.centred((40, 48, 40), (4.5, 4.5, 4.5))
VENTRICLES, BRAIN = "ventricular_volume_ml", "brain_volume_ml"


@pytest.fixture(scope="module")
def phantoms() -> tuple[list, list]:
    """Prepared images (X, Y, Z) of 40 phantoms, and their covariates."""
    volumes, covariates = [], []
    for i in range(40):
        image, _, known = make_phantom(GRID.shape, GRID.spacing_mm[0], seed=11, index=i)
        volumes.append(to_grid(image, GRID.affine, GRID, (0, 99.8))[0][0])
        covariates.append(known)
    return volumes, covariates


def measured(volumes) -> dict[str, np.ndarray]:
    rows = [measure_volumes(volume, GRID.spacing_mm) for volume in volumes]
    return {name: np.array([row[name] for row in rows]) for name in (VENTRICLES, BRAIN)}


@pytest.fixture(scope="module")
def plain(phantoms):
    return measured(phantoms[0])


def test_ventricles_agree_with_the_labels(phantoms, plain):
    _, known = phantoms
    found = agreement([k[VENTRICLES] for k in known], plain[VENTRICLES])
    assert found.n == 40 and found.r > 0.995
    assert 0.95 < found.slope < 1.05 and abs(found.bias) < 1 and found.mae < 1.2


def test_brains_agree_with_the_labels(phantoms, plain):
    _, known = phantoms
    found = agreement([k[BRAIN] for k in known], plain[BRAIN])
    assert found.n == 40 and found.r > 0.985
    assert 0.92 < found.slope < 1.05 and abs(found.bias) < 40


def test_blur_and_noise_keep_the_order_and_nearly_the_mean(phantoms, plain):
    volumes, _ = phantoms
    rng = np.random.default_rng(0)
    blurred = measured(ndimage.gaussian_filter(volume, 0.5) for volume in volumes)
    noisy = measured((volume + 0.02 * rng.standard_normal(volume.shape)).clip(0, 1) for volume in volumes)
    for changed, name, limit in (
        (blurred, VENTRICLES, 0.15),
        (blurred, BRAIN, 0.06),
        (noisy, VENTRICLES, 0.03),
        (noisy, BRAIN, 0.01),
    ):
        assert np.corrcoef(plain[name], changed[name])[0, 1] > 0.99
        assert abs(changed[name].mean() / plain[name].mean() - 1) < limit


def test_brightness_and_a_bias_field_do_not_matter(phantoms):
    volume = phantoms[0][3]
    field = 0.8 + 0.3 * np.linspace(0, 1, 40)[:, None, None] * np.ones_like(volume)
    plain, changed = (measure_volumes(v, GRID.spacing_mm) for v in (volume, 0.7 * volume * field))
    assert changed[VENTRICLES] == pytest.approx(plain[VENTRICLES], rel=0.06)
    assert changed[BRAIN] == pytest.approx(plain[BRAIN], rel=0.03)


@pytest.mark.parametrize("spacing_mm", [3.0, 4.0])
@pytest.mark.parametrize("ventricle_mm", [(9, 26, 9), (12, 32, 11)])
def test_ellipsoids_have_their_closed_form_volumes(spacing_mm, ventricle_mm):
    """A brain of white matter alone, and one ellipsoid of fluid in either half of it: 4/3 pi a b c."""
    shape = tuple(round(extent / spacing_mm) for extent in (180, 216, 180))
    axes = np.ix_(*(np.linspace(-0.5, 0.5, 3 * n) * spacing_mm * (3 * n - 1) / 3 for n in shape))

    def covered(centre, radii):  # of each voxel, from 3 x 3 x 3 points in it
        inside = sum(((p - c) / r) ** 2 for p, c, r in zip(axes, centre, radii)) <= 1
        return inside.reshape([k for n in shape for k in (n, 3)]).mean(axis=(1, 3, 5))

    brain = covered((0, 0, 0), (64, 85, 61))
    fluid = sum(covered((side * 15, 0, 10), ventricle_mm) for side in (-1, 1))
    found = measure_volumes(0.9 * (brain - 0.75 * fluid), [spacing_mm] * 3)
    ventricular = 2 * 4 / 3 * np.pi * np.prod(ventricle_mm) / 1000
    assert found[VENTRICLES] == pytest.approx(ventricular, rel=0.06)
    assert found[BRAIN] == pytest.approx(4 / 3 * np.pi * 64 * 85 * 61 / 1000 - ventricular, rel=0.04)


def test_a_brain_without_ventricles_has_none():
    x, y, z = np.ix_(*(np.arange(n) - (n - 1) / 2 for n in GRID.shape))
    brain = ((x / 15) ** 2 + (y / 19) ** 2 + (z / 15) ** 2 < 1).astype(float)
    assert measure_volumes(brain, GRID.spacing_mm)[VENTRICLES] == 0


rng = np.random.default_rng(1)
ODD = {
    "zeros": np.zeros((16, 16, 16)),
    "constant": np.full((16, 20, 16), 0.5),
    "noise": rng.random((40, 48, 40)),
    "little noise": rng.random((16, 16, 16)),
    "negative": -rng.random((16, 16, 16)),
    "one voxel": np.pad(np.ones((1, 1, 1)), 8),
    "a single voxel": np.ones((1, 1, 1)),
    "flat": rng.random((1, 16, 16)),
    "empty": np.zeros((0, 4, 4)),
    "two axes": rng.random((16, 16)),
    "nan": np.full((16, 16, 16), np.nan),
    "infinite": np.pad(np.full((1, 1, 1), np.inf), 8),
    "half": np.concatenate([np.zeros((16, 8, 16)), np.ones((16, 8, 16))], axis=1),
    "integers": rng.integers(0, 2, (16, 16, 16)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("spacing_mm", [(4.5, 4.5, 4.5), (12, 9, 11)])
@pytest.mark.filterwarnings("error")
def test_odd_input_gives_numbers_or_nan(name, spacing_mm):
    found = measure_volumes(ODD[name], spacing_mm)
    assert set(found) == {VENTRICLES, BRAIN}
    assert all(isinstance(value, float) for value in found.values())
    values = np.array(list(found.values()))
    assert np.isnan(values).all() or (np.isfinite(values) & (values >= 0)).all()
    if name in ("zeros", "constant", "nan", "infinite", "two axes", "empty", "negative"):
        assert np.isnan(values).all()


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 21, 16), (24, 28, 24)])
def test_small_grids_are_measured(shape):
    grid = Grid.centred(shape, [max(180 / shape[0], 216 / shape[1], 180 / shape[2])] * 3)
    image, _, known = make_phantom(shape, grid.spacing_mm[0], seed=3, index=1)
    found = apply_measure(measure_volumes, to_grid(image, grid.affine, grid, (0, 99.8))[0], grid.spacing_mm)
    assert found[BRAIN] == pytest.approx(known[BRAIN], rel=0.6)
    assert 0 <= found[VENTRICLES] < 150


def test_a_measure_is_loaded_by_name():
    assert load_measure("ldm3d.rulers.volumetry:measure_volumes") is measure_volumes


@pytest.mark.parametrize("name", ["", "nowhere", "no.such.module:f", "ldm3d.rulers.volumetry:nothing", ":f", "numpy:"])
def test_a_measure_that_does_not_exist_is_named(name):
    with pytest.raises(InputError, match="cannot be imported"):
        load_measure(name)
