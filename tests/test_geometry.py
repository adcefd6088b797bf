"""Geometry: every orientation lands on the same place in the world, and aligned grids lose not a bit."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from ldm3d.geometry import Grid, align_grid, resample, spacing_of

SHAPE = (14, 17, 12)
TURN = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])  # 16 degrees about z
TILT = np.array([[1.0, 0.0, 0.0], [0.0, 0.96, -0.28], [0.0, 0.28, 0.96]])

# All 48 ways to store a scan along the axes of the body
ORIENTATIONS = [
    np.diag(signs) @ np.eye(3)[:, order]
    for order in itertools.permutations(range(3))
    for signs in itertools.product((-1, 1), repeat=3)
]


def affine_of(directions, spacing_mm=(1.0, 1.0, 1.0), origin=(-7.0, 11.0, 3.0)):
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing_mm)
    affine[:3, 3] = origin
    return affine


def blob(shape, affine, world, fwhm_mm=6.0):
    """A Gaussian around a place in the world, sampled on any grid: (1, X, Y, Z)."""
    indices = np.moveaxis(np.indices(shape), 0, -1)
    squares = ((indices @ affine[:3, :3].T + affine[:3, 3] - world) ** 2).sum(-1)
    return np.exp(-squares * 4 * math.log(2) / fwhm_mm**2).astype(np.float32)[None]


def centre_of_mass(volume, affine):
    indices = np.moveaxis(np.indices(volume.shape[1:]), 0, -1)
    return affine[:3, :3] @ np.average(indices.reshape(-1, 3), axis=0, weights=volume.ravel()) + affine[:3, 3]


@pytest.mark.parametrize("oblique", [np.eye(3), TURN @ TILT], ids=["straight", "oblique"])
@pytest.mark.parametrize("directions", ORIENTATIONS)
def test_every_orientation_lands_on_the_same_world_position(directions, oblique):
    affine = affine_of(oblique @ directions, spacing_mm=(2.0, 2.0, 2.0))
    shape = (22, 24, 20)
    world = affine @ [10, 13, 9, 1]
    aligned = align_grid(shape, affine, (10.5, 12, 9.5), Grid.centred((32, 28, 30), (1.5, 1.5, 1.5)))
    volume = resample(blob(shape, affine, world[:3]), affine, aligned, (32, 28, 30))
    np.testing.assert_allclose(centre_of_mass(volume, aligned), world[:3], atol=0.02)


@pytest.mark.parametrize("directions", ORIENTATIONS)
def test_placed_grid_runs_right_anterior_superior_without_rotation(directions):
    affine = affine_of(TURN @ TILT @ directions, spacing_mm=(1.0, 1.2, 3.0))
    aligned = align_grid(SHAPE, affine, (3, 4, 5), Grid.centred((10, 12, 14), (2.0, 2.5, 1.5)))
    np.testing.assert_allclose(aligned[:3, :3] / (2.0, 2.5, 1.5), TURN @ TILT, atol=1e-12)
    np.testing.assert_allclose(aligned @ [4.5, 5.5, 6.5, 1], affine @ [3, 4, 5, 1], atol=1e-9)


@pytest.mark.parametrize("directions", ORIENTATIONS)
def test_aligned_grid_copies_voxels_there_and_back(directions):
    volume = np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)
    # float32, as a NIfTI header keeps it
    affine = affine_of(TURN @ directions, spacing_mm=(1.1, 1.1, 1.1)).astype(np.float32)
    grid = Grid.centred((20, 20, 20), (1.1, 1.1, 1.1))  # holds all of it
    aligned = align_grid(SHAPE, affine, (6.3, 8.9, 5.2), grid)
    on_grid = resample(volume, affine, aligned, grid.shape)
    assert sorted(on_grid[on_grid > 0]) == sorted(volume.ravel())
    np.testing.assert_array_equal(resample(on_grid, aligned, affine, SHAPE), volume)


def test_aligned_crop_and_pad_are_exact():
    volume = np.random.default_rng(0).random((1, *SHAPE), dtype=np.float32)
    affine = affine_of(np.eye(3))
    target = affine_of(np.eye(3), origin=(-7.0 + 3, 11.0 - 2, 3.0))  # 3 voxels cropped on the left, 2 padded behind
    expected = np.pad(volume[:, 3:], [(0, 0), (0, 1), (2, 1), (0, 0)])[:, :12, :20]
    np.testing.assert_array_equal(resample(volume, affine, target, (12, 20, 12)), expected)


def test_middle_of_the_scan_is_the_default_centre():
    affine = affine_of(TURN, spacing_mm=(1.0, 2.0, 3.0))
    aligned = align_grid(SHAPE, affine, None, Grid.centred((9, 9, 9), (1.3, 1.3, 1.3)))
    np.testing.assert_allclose(aligned @ [4, 4, 4, 1], affine @ [6.5, 8, 5.5, 1], atol=1e-9)


def test_sheared_affine_gives_perpendicular_axes():
    sheared = affine_of(np.eye(3))
    sheared[0, 1] = 0.2
    aligned = align_grid(SHAPE, sheared, None, Grid.centred((8, 8, 8), (2.0, 2.0, 2.0)))
    np.testing.assert_allclose(aligned[:3, :3].T @ aligned[:3, :3], 4 * np.eye(3), atol=1e-12)


@pytest.mark.parametrize("order, mode", [("linear", "bilinear"), ("nearest", "nearest")])
def test_agrees_with_monai(order, mode):
    volume = np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)
    source, target = (
        affine_of(np.diag([-1, 1, 1])),
        affine_of(TURN @ TILT, (0.7, 0.8, 0.9), (-20.0312, 11.01357, 2.02711)),
    )
    image = MetaTensor(torch.from_numpy(volume), affine=torch.from_numpy(source))
    expected = SpatialResample(mode, padding_mode="zeros", align_corners=False, dtype=torch.float64)(
        image, dst_affine=torch.from_numpy(target), spatial_size=(20, 20, 16)
    ).numpy()
    assert expected.any()
    np.testing.assert_allclose(resample(volume, source, target, (20, 20, 16), order), expected, atol=1e-6)


@pytest.mark.parametrize("directions", ORIENTATIONS[::7])
def test_smoothing_has_the_width_of_cardoso_along_the_right_axis(directions):
    """The response to one bright voxel, read at every whole mm by shifting the coarse grid, has the asked variance."""
    spacing, coarse = np.array((1.0, 2.0, 1.0)), np.array((4.0, 2.0, 1.0))  # coarser along the first world axis alone
    size = np.array((25, 13, 25))
    axes = np.abs(directions).argmax(0)  # world axis of each axis of the array
    affine = affine_of(directions, spacing[axes], origin=(0, 0, 0))
    volume = np.zeros(size[axes], np.float32)
    volume[tuple(size[axes] // 2)] = 1
    centre = affine[:3, :3] @ (size[axes] // 2)
    response = []
    for x_mm in range(-12, 13):
        target = affine_of(np.eye(3), coarse, origin=centre + np.array((x_mm, 0, 0)))
        response.append(resample(volume[None], affine, target, (1, 1, 1)).item())
    assert sum(response) == pytest.approx(1, abs=1e-3)  # nothing is lost across the other two axes
    variance = np.average(np.arange(-12, 13) ** 2, weights=response)
    assert variance == pytest.approx((4.0**2 - 1.0**2) / (8 * math.log(2)), rel=0.01)


def test_finer_target_is_not_smoothed():
    volume = np.zeros((1, 5, 5, 5), np.float32)
    volume[0, 2, 2, 2] = 1
    fine = resample(volume, np.eye(4), affine_of(np.eye(3) / 2, origin=(0, 0, 0)), (9, 9, 9))
    assert fine[0, 4, 4, 4] == 1 and fine[0, 5, 4, 4] == 0.5


def test_nearest_keeps_labels_and_their_type():
    labels = np.random.default_rng(0).integers(0, 40, (1, *SHAPE)).astype(np.int16)
    out = resample(labels, np.eye(4), affine_of(TURN * 2.5, origin=(0, 0, 0)), (6, 7, 5), "nearest")
    assert out.dtype == np.int16 and set(np.unique(out)) <= set(np.unique(labels)) | {0}


def test_wrong_calls_are_named():
    with pytest.raises(ValueError, match="'cubic'; use 'linear' or 'nearest'"):
        resample(np.zeros((1, *SHAPE)), np.eye(4), np.eye(4), SHAPE, "cubic")
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        resample(np.zeros((2, 3, 4)), np.eye(4), np.eye(4), SHAPE)
    with pytest.raises(ValueError, match="3 sides"):
        Grid.centred((10, 0, 10), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="spacings > 0"):
        Grid.centred((10, 10, 10), (1.0, math.nan, 1.0))


def test_grid_is_centred_and_survives_json():
    grid = Grid.centred((56, 72, 57), (3.0, 2.0, 1.5))
    np.testing.assert_allclose(grid.affine @ [27.5, 35.5, 28, 1], [0, 0, 0, 1])
    np.testing.assert_array_equal(spacing_of(grid.affine), grid.spacing_mm)
    assert grid.voxel_ml == pytest.approx(0.009)
    again = Grid.from_dict(json.loads(json.dumps(grid.to_dict())))
    assert again == grid and hash(again) == hash(grid)
    assert again != Grid.centred((56, 72, 57), (3.0, 2.0, 1.0))
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 5
