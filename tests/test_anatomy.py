"""Shapes whose volume, surface and thickness are known."""

import numpy as np
import pytest

from ldm3d.metrics.anatomy import describe_classes, overlaps, surface_mm2


def ball(radius, spacing_mm, side=48, centre=(0.0, 0.0, 0.0)):
    axes = [(np.arange(side) - (side - 1) / 2) * s - c for s, c in zip(spacing_mm, centre)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return x**2 + y**2 + z**2 < radius**2


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (1, 1, 2), (3, 3, 3), (1, 1.3, 1.7)])
@pytest.mark.parametrize("voxels", [5, 10])
def test_surface_of_a_sphere(spacing_mm, voxels):
    radius = voxels * max(spacing_mm)
    found = surface_mm2(ball(radius, spacing_mm), spacing_mm)
    assert found == pytest.approx(4 * np.pi * radius**2, rel=0.05)


def test_surface_of_a_slab_in_any_orientation():
    """A sheet 3 voxels thick through the middle of a cube: its volume over half its surface is its thickness."""
    for axis in range(3):
        mask = np.zeros((60, 60, 60), bool)
        mask[tuple(slice(28, 31) if a == axis else slice(10, 50) for a in range(3))] = True
        thickness = describe_classes(mask.astype(int), ["sheet"], (1, 1, 1))["sheet_thickness_mm"]
        edges = 2 * 40 * 40 / (2 * 40 * 40 + 4 * 40 * 3)  # share of the surface that is not its rim
        assert thickness == pytest.approx(3 * edges, rel=0.12)


def test_a_body_on_the_right_is_asymmetric_and_two_alike_are_not():
    spacing_mm = (1, 1, 1)
    both = ball(6, spacing_mm, centre=(12, 0, 0)) | ball(6, spacing_mm, centre=(-12, 0, 0))
    right = 2 * ball(6, spacing_mm, centre=(12, 0, 0)) + ball(6, spacing_mm, centre=(-12, 0, 0))
    assert describe_classes(both.astype(int), ["a"], spacing_mm)["a_asymmetry"] == 0
    found = describe_classes(right.astype(int), ["left", "right"], spacing_mm)
    assert found["right_asymmetry"] == 1 and found["left_asymmetry"] == -1
    assert found["left_volume_ml"] == pytest.approx(4 / 3 * np.pi * 6**3 / 1000, rel=0.02)


def test_roughness_shows_in_surface_and_thickness_but_not_in_volume():
    """Grain at the border: half of the voxels of the outermost shell, as many removed as added."""
    smooth, random = ball(12, (1, 1, 1)), np.random.default_rng(0)
    shell = ball(13, (1, 1, 1)) & ~ball(11, (1, 1, 1))
    rough = np.where(shell, random.random(smooth.shape) < smooth[shell].mean(), smooth)
    a, b = (describe_classes(mask.astype(int), ["brain"], (1, 1, 1)) for mask in (smooth, rough))
    assert b["brain_volume_ml"] == pytest.approx(a["brain_volume_ml"], rel=0.05)
    assert b["brain_surface_mm2"] > 1.5 * a["brain_surface_mm2"]
    assert b["brain_thickness_mm"] < 0.7 * a["brain_thickness_mm"]


def test_nothing_has_no_surface():
    found = describe_classes(np.zeros((8, 8, 8), int), ["a"], (1, 1, 1))
    assert found["a_volume_ml"] == found["a_surface_mm2"] == 0 and np.isnan(found["a_thickness_mm"])


def test_overlap_is_with_the_nearest_wherever_it_lies():
    near, far = ball(10, (1, 1, 1)).astype(int), ball(5, (1, 1, 1)).astype(int)
    moved = np.roll(near, (3, -2, 1), axis=(0, 1, 2))
    assert overlaps(near, [far, moved], ["a"]) == {"a": 1.0}
    assert overlaps(near, [far], ["a"])["a"] == pytest.approx(2 * 5**3 / (5**3 + 10**3), rel=0.05)
