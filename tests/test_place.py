"""A Grid that lies in the world: a registration is kept, to a tenth of a millimetre, from the scan to generated volumes."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_settings
from scipy import ndimage
from test_preprocess import AFFINE, CONFIG, dataset, head  # noqa: F401 (a fixture)

from ldm3d.config.data import GridConfig
from ldm3d.config.sections import Config
from ldm3d.data.keys import settings_of
from ldm3d.data.nifti import write_volume
from ldm3d.data.placing import grid_of, restore, to_grid
from ldm3d.data.preparing import load_info, load_prepared, prepare, read_scan_table
from ldm3d.diffusion.objective import make_objective
from ldm3d.errors import InputError
from ldm3d.experiment import NONE, find_experiment
from ldm3d.geometry import Grid
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.pretrained import make_network
from ldm3d.pipeline import Pipeline
from ldm3d.training.diffusion import DiffusionTask

# Affines of templates: MNI152NLin2009cAsym (RAS, 1 mm) and FSL's MNI152 (stored from left to right, 2 mm)
TEMPLATES = {
    "2009c": (np.array([[1.0, 0, 0, -96], [0, 1, 0, -132], [0, 0, 1, -78], [0, 0, 0, 1]]), (193, 229, 193)),
    "fsl": (np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]]), (91, 109, 91)),
}
PLACE = (31.3, -52.6, 18.2)  # in the world, of something bright: in the right hemisphere, behind and above


def world_grid(shape=(56, 72, 56), spacing_mm=3, **keys) -> Grid:
    return grid_of(GridConfig(shape=shape, spacing_mm=spacing_mm, place="world", **keys))


def world_of(affine, shape):
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def blob(affine, shape, sigma_mm=6.0):
    """An ellipsoid as large as a brain in MNI space, with something bright at `PLACE`."""
    world = world_of(affine, shape)
    brain = (((world - (0, -18, 8)) / (70, 88, 72)) ** 2).sum(-1) < 1
    return (brain * (0.3 + np.exp(-((world - PLACE) ** 2).sum(-1) / 2 / sigma_mm**2)))[None].astype(np.float32)


def bright_place(volume, affine):
    """World coordinates of the middle of what is bright."""
    bright = np.maximum(volume[0] - 0.5 * volume.max(), 0)
    return affine[:3, :3] @ ndimage.center_of_mass(bright) + affine[:3, 3]


@pytest.mark.parametrize(
    "template, spacing_mm, shape", [("2009c", 3, (56, 72, 56)), ("fsl", 3, (56, 72, 56)), ("fsl", 1, (160, 192, 160))]
)
def test_a_prepared_volume_lies_where_its_scan_does(template, spacing_mm, shape):
    affine, source_shape = TEMPLATES[template]
    scan, grid = blob(affine, source_shape), world_grid(shape, spacing_mm)
    on_grid, info = to_grid(scan, affine, grid, (0, 100))
    np.testing.assert_array_equal(info["grid_affine"], grid.affine)
    np.testing.assert_allclose(bright_place(on_grid, grid.affine), bright_place(scan, affine), atol=0.1)
    np.testing.assert_allclose(bright_place(on_grid, grid.affine), PLACE, atol=0.1)
    back, back_affine = restore(on_grid, json.loads(json.dumps(info)))
    np.testing.assert_array_equal(back_affine, affine)
    assert back.shape == scan.shape
    np.testing.assert_allclose(bright_place(back, back_affine), PLACE, atol=0.1)


def test_centring_on_the_foreground_would_move_it():
    """Why there is another place: this brain has something at its left that others have not."""
    affine, shape = TEMPLATES["fsl"]
    scan = blob(affine, shape)
    scan[0, 78:88, 40:60, 30:50] = 0.3
    on_grid, _ = to_grid(scan, affine, Grid.centred((56, 72, 56), (3, 3, 3), (0.5, -17.5, 7.5)), (0, 100))
    assert np.abs(bright_place(on_grid, world_grid().affine) - PLACE).max() > 1
    on_grid, _ = to_grid(scan, affine, world_grid(), (0, 100))
    np.testing.assert_allclose(bright_place(on_grid, world_grid().affine), PLACE, atol=0.1)


def test_voxels_of_a_template_at_1_mm_are_copied():
    affine, _ = TEMPLATES["2009c"]
    affine = affine + np.array([[0, 0, 0, 66], [0, 0, 0, 84], [0, 0, 0, 56], [0] * 4])  # a part of it, for speed
    scan = np.random.default_rng(0).uniform(1, 2, (1, 60, 60, 60)).astype(np.float32)
    for axis in (1, 2, 3):  # faces of 0, which is then the background
        np.moveaxis(scan, axis, 0)[[0, -1]] = 0
    on_grid, info = to_grid(scan, affine, world_grid((40, 44, 40), 1), (0, 100))
    # From -19 to 20, -39 to 4 and -12 to 27 mm; the part begins at -30, -48 and -22
    inside = scan[0, 11:51, 9:53, 10:50]
    np.testing.assert_allclose(on_grid[0] * (info["high"] - info["low"]) + info["low"], inside, atol=1e-6)


@pytest.mark.parametrize("turned", [np.eye(3), [[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]])
def test_what_the_grid_cuts_off_is_told(turned):
    affine = np.eye(4)
    affine[:3, :3] = 2 * np.array(turned)
    ball = head(radii=(10, 10, 10), shape=(30, 30, 30), centre=(15, 15, 15))  # 40 mm wide
    middle = affine[:3, :3] @ [15, 15, 15]
    for shift, expected in ((0, 0), (6, 6), (-6, 6)):
        grid = Grid.centred((20, 22, 22), (2, 2, 2), middle + np.array([shift, 0, 0]), "world")
        assert to_grid(ball, affine, grid, (0, 100))[1]["cut_mm"] == pytest.approx(expected, abs=2.1)


def test_a_scan_elsewhere_fails_with_where_it_is():
    affine = AFFINE + np.array([[0, 0, 0, 300.0], [0] * 4, [0] * 4, [0] * 4])
    with pytest.raises(InputError, match=r"middle is at \(330, 34, 28\) mm .* around \(0, -18, 8\) mm; register it"):
        to_grid(head(), affine, world_grid(), (0, 100))


def test_the_default_has_the_keys_of_before():
    """What names a prepared volume, and what a run compares, as earlier versions wrote them."""
    config = GridConfig(shape=(24, 28, 24), spacing_mm=2)
    settings = json.dumps(settings_of(grid_of(config), (0.0, 99.8), 2))
    assert settings == '{"version": 2, "grid": [[24, 28, 24], [2.0, 2.0, 2.0]], "percentiles": [0.0, 99.8]}'
    assert config.model_dump() == {"shape": (24, 28, 24), "spacing_mm": (2.0, 2.0, 2.0)}
    assert grid_of(config.model_copy(update={"place": "foreground"})) == Grid.centred((24, 28, 24), (2, 2, 2))
    assert set(grid_of(config).to_dict()) == {"shape", "spacing_mm", "affine"}
    places = [settings_of(world_grid(origin_mm=at), (0, 100), 2) for at in ((0, 0, 0), (0, 0, 1))]
    assert places[0] != places[1] and len(places[0]["grid"]) == 3


def test_a_dataset_is_prepared_in_the_world(dataset):  # noqa: F811
    overrides = "data.grid.place=world", "data.grid.origin_mm=[31, 35, 29]"
    centred, config = dataset(), dataset(*overrides)
    before = prepare(centred, workers=1).table["key"]
    write_volume(config.data.bids / "sub-05/anat/sub-05_T1w.nii.gz", head(5), AFFINE + np.eye(4)[3] * [[400], [0], [0], [0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # phantoms have the size of no head
        done = prepare(config, workers=1)
    assert (done.prepared, list(done.failed["subject"])) == (5, ["05"])
    assert not set(done.table["key"]) & set(before)
    assert [key[:20] for key in done.table["key"]] == [key[:20] for key in before[:5]]  # the same scans
    key = read_scan_table(config)["key"][0]
    np.testing.assert_array_equal(load_info(config, key)["grid_affine"], grid_of(config.data.grid).affine)
    assert (load_prepared(config, key)[0] > 0).sum() == (head() > 0).sum()
    with pytest.raises(InputError, match=r"data.grid.place was world"):
        read_scan_table(centred)


def test_cut_off_scans_in_the_world_are_asked_about(dataset):  # noqa: F811
    config = dataset("data.grid.place=world", "data.grid.origin_mm=[43, 35, 29]")
    with pytest.warns(UserWarning, match=r"6 scans lose foreground .*or move data.grid.origin_mm if scans are registered"):
        prepare(config, workers=1)


def test_a_model_and_its_volumes_lie_where_its_grid_does(tmp_path):
    settings = tiny_settings(tmp_path)
    settings["data"]["grid"] |= {"place": "world", "origin_mm": [1, -18, 9]}
    config = Config.model_validate(settings)
    autoencoder = Autoencoder(2, 4, [4, 4], blocks=1)
    network = config.diffusion.network.model_dump()
    unet = make_network("UNet", in_channels=2, out_channels=2, num_categories=config.schema().num_categories, **network)
    objective = make_objective(**config.diffusion.objective(), scales=())
    parts = {"config": config, "autoencoder": autoencoder, "schema": config.schema(), "objective": objective}
    pipeline = DiffusionTask.pipeline(SimpleNamespace(**parts, scales=(), start=None, contrasts={}), unet)
    pipeline.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    assert loaded.grid == grid_of(config.data.grid) and loaded.grid.place == loaded.output_grid.place == "world"
    image = loaded(num_volumes=1, steps=1).images[0]
    assert np.linalg.solve(image.affine, [1, -18, 9, 1])[:3] == pytest.approx([11.5, 13.5, 11.5])
    known = find_experiment(tmp_path / "model", NONE)  # a scan is prepared for it in the same place
    assert grid_of(known.config.data.grid) == loaded.grid


def test_origin_without_its_place_says_what_to_do(tmp_path, fails):
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    assert "add that, or drop origin_mm" in fails("prepare", tmp_path / "config.yaml", "--set", "data.grid.origin_mm=[0,0,0]")
    assert "place" in fails("prepare", tmp_path / "config.yaml", "--set", "data.grid.place=mni")
    message = fails("prepare", tmp_path / "config.yaml", "--set", "data.grid.origin_mm=[0,.nan,0]")
    assert "data.grid.origin_mm" in message
