"""A scan through a model's Grid and latent, and back on its own voxels."""

import os
import sys

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

from ldm3d.config.data import BrainExtractionConfig, DataConfig, RegistrationConfig
from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.data.bias import BiasField
from ldm3d.data.registration import Registered
from ldm3d.description import Preparation
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError
from ldm3d.geometry import Grid
from ldm3d.memory import KEPT
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.recomputing import decode_recomputed
from ldm3d.models.unet import UNet
from ldm3d.pipeline import Pipeline

SHAPE = (20, 24, 20)
AFFINES = {
    "along the axes": np.diag([2.0, 2, 2, 1]),
    "another order, mirrored": np.array([[0, 0, -2.0, 30], [-2, 0, 0, 40], [0, 2, 0, -20], [0, 0, 0, 1]]),
    "oblique, other voxels": np.array([[1.9, 0.3, 0, -20], [-0.3, 1.9, 0, -30], [0, 0, 2.6, -25], [0, 0, 0, 1]]),
}


def tiny_pipeline(grid: Grid | None = None, preparation: Preparation | None = None, channels: int = 1) -> Pipeline:
    """Untrained, but for the autoencoder's linear path and a U-Net that says something."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(4, 4, [8, 8], blocks=1, in_channels=channels)
    autoencoder.fit_linear_path(
        torch.from_numpy(np.stack([head(seed) for seed in range(4)]))[:, None].expand(-1, channels, -1, -1, -1)
    )
    unet = UNet(4, 4, [0, 2], [8, 8], 1, [False, False], context_dim=4)
    for parameter in unet.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape)
    age = Covariate("age", "continuous", "years", (0, 120), mean=50, std=20, seen=(20, 80))
    schema = CovariateSchema((age, Covariate("sex", "categorical", categories=("F", "M"))))
    grid = grid or Grid.centred(SHAPE, (4.0,) * 3)
    return Pipeline(autoencoder.eval(), unet.eval(), schema, grid, make_process("flow"), "v", preparation=preparation)


def head(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A lopsided blob with texture, in [0, 1]."""
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 1)
    x, y, z = (np.linspace(-1, 1, n) for n in shape)
    inside = x[:, None, None] ** 2 + (1.3 * y[None, :, None] + 0.2) ** 2 + z[None, None, :] ** 2 < 0.6
    return (inside * (0.3 + texture)).clip(0, 1).astype(np.float32)


def scan(affine: np.ndarray, shape=(40, 46, 38)) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(700 * head(9, shape) + 20, affine)


@pytest.mark.parametrize("name", AFFINES)
def test_what_changes_nothing_gives_the_scan_back(name):
    image, pipe = scan(AFFINES[name]), tiny_pipeline()
    placed = pipe.encode(image)
    assert placed.volume.shape == (1, 1, *SHAPE) and placed.volume.min() >= 0 and placed.volume.max() <= 1
    assert placed.z.shape == (1, 4, 5, 6, 5)
    returned = placed.image(pipe.decode(placed.z))
    given = image.get_fdata()
    np.testing.assert_allclose(returned.affine, image.affine, atol=1e-6)
    assert np.abs(returned.get_fdata() - given).max() <= 1e-3 * np.ptp(given)
    assert bytes(returned.header["descrip"]).startswith(b"DERIVED ldm3d")


def test_a_change_comes_back_where_it_was_made_and_as_bright():
    """Half a unit in [0, 1] around one point in the world is as much in the scan's intensities there."""
    affine = AFFINES["another order, mirrored"]
    pipe = tiny_pipeline()
    placed = pipe.encode(scan(affine))
    changed = placed.reconstruction.clone()
    changed[0, 0, 5:9, 14:18, 6:10] += 0.5
    centre = np.array(placed.info["grid_affine"]) @ [6.5, 15.5, 7.5, 1]
    i, j, k = np.round(np.linalg.solve(affine, centre)[:3]).astype(int)
    moved = placed.back(changed) - placed.scan
    assert moved[0, i, j, k] == pytest.approx(0.5 * (placed.info["high"] - placed.info["low"]), rel=1e-3)
    total = moved.sum() * abs(np.linalg.det(affine[:3, :3])) / (placed.info["high"] - placed.info["low"])
    assert total == pytest.approx(0.5 * 4**6, rel=0.02)  # 4^3 voxels of 4^3 mm


def test_without_residual_it_is_the_volume_alone():
    placed = tiny_pipeline().encode(scan(AFFINES["along the axes"]))
    alone = placed.back(placed.volume, keep_residual=False)
    inside = ndimage.binary_erosion(placed.scan[0] > 200, iterations=3)
    assert np.abs(alone[0] - placed.scan[0])[inside].mean() < 60  # of 700: as fine as the Grid, no finer
    assert not np.allclose(alone, placed.scan)
    np.testing.assert_array_equal(placed.back(placed.volume, reference=placed.volume), placed.scan)


def test_a_path_and_an_image_are_the_same(tmp_path):
    image = scan(AFFINES["oblique, other voxels"])
    nibabel.save(image, tmp_path / "scan.nii.gz")
    pipe = tiny_pipeline()
    by_path, by_image = pipe.encode(tmp_path / "scan.nii.gz"), pipe.encode(image)
    torch.testing.assert_close(by_path.z, by_image.z, rtol=0, atol=1e-5)
    assert by_path.name == str(tmp_path / "scan.nii.gz")


def shifted(*_):
    matrix = np.eye(4)
    matrix[:3, 3] = 300, 0, 0
    return Registered(matrix, 0.9)


def test_registration_is_the_models_unless_asked_otherwise(monkeypatch):
    """A scan 300 mm off lies on a Grid in the world after its registration only, and comes back in its own world."""
    monkeypatch.setattr("ldm3d.data.registration.register", shifted)
    grid = Grid.centred(SHAPE, (4.0,) * 3, (300, 0, 0), "world")
    affine = AFFINES["along the axes"].copy()
    affine[:3, 3] = -40, -46, -38
    registered = Preparation(registration=RegistrationConfig())
    placed = tiny_pipeline(grid, registered).encode(scan(affine))
    assert np.abs(placed.back(placed.reconstruction) - placed.scan).max() < 0.7
    assert placed.info["registration"]["correlation"] == 0.9
    alone = placed.back(placed.volume, keep_residual=False)
    assert np.corrcoef(alone.ravel(), placed.scan.ravel())[0, 1] > 0.9
    with pytest.raises(InputError, match="lies on the grid"):
        tiny_pipeline(grid, registered).encode(scan(affine), register=False)
    with pytest.warns(UserWarning, match="does not say whether"), pytest.raises(InputError, match="lies on the grid"):
        tiny_pipeline(grid).encode(scan(affine))
    other = Preparation(registration=RegistrationConfig(to="ours.nii.gz"))
    with pytest.raises(InputError, match=r"registered \(rigid\) to ours.nii.gz"):
        tiny_pipeline(grid, other).encode(scan(affine))


def test_the_folder_remembers_how_scans_were_prepared(tmp_path):
    tool = BrainExtractionConfig(command="mri_synthstrip")
    preparation = Preparation((1.0, 99.0), RegistrationConfig(kind="affine"), tool, "n4")
    tiny_pipeline(preparation=preparation).save_pretrained(tmp_path / "model")
    assert Pipeline.from_pretrained(tmp_path / "model").preparation == preparation
    tiny_pipeline().save_pretrained(tmp_path / "model")
    assert Pipeline.from_pretrained(tmp_path / "model").preparation is None
    (tmp_path / "model/pipeline.json").write_text(
        (tmp_path / "model/pipeline.json")
        .read_text()
        .replace('"suffix"', '"preparation": {"percentiles": [0, 400]}, "suffix"')
    )
    with pytest.raises(InputError, match=r"preparation|percentiles"):
        Pipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "image, reason",
    [
        (7, "a path or a nibabel image"),
        ("nothing.nii.gz", "no such file"),
        (nibabel.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), "no image in it"),
        (nibabel.Nifti1Image(np.ones((4, 4), np.float32), np.eye(4)), "has shape"),
        (nibabel.Nifti1Image(np.ones((4, 4, 4, 3), np.float32), np.eye(4)), "has shape"),
        (nibabel.Nifti1Image(np.full((4, 4, 4), np.inf, np.float32), np.eye(4)), "infinite"),
        (nibabel.Nifti1Image(head(), np.diag([1.0, 1, 500, 1])), "no head fits"),
        (nibabel.Nifti1Image(head().astype(np.complex64), np.eye(4)), "complex"),
    ],
)
def test_bad_scans(image, reason):
    with pytest.raises(InputError, match=reason):
        tiny_pipeline().encode(image)


def test_models_of_several_channels_are_refused():
    with pytest.raises(InputError, match="2 channels"):
        tiny_pipeline(channels=2).encode(scan(np.eye(4)))


def test_gradients_by_computing_again_are_the_same(monkeypatch):
    pipe = tiny_pipeline()
    z = torch.randn(1, 4, 5, 6, 5, generator=torch.Generator().manual_seed(1))
    found = []
    for decode in (pipe.autoencoder.decode, lambda z: decode_recomputed(pipe.autoencoder, z)):
        leaf = z.clone().requires_grad_()
        volume = decode(leaf)
        volume.square().sum().backward()
        found.append((volume.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert "forward" not in vars(pipe.autoencoder.decoder[1])  # as it was
    saved = []
    monkeypatch.setattr("ldm3d.memory.decode_recomputed", lambda *given: saved.append(1) or decode_recomputed(*given))
    monkeypatch.setattr("ldm3d.memory.KEPT", 0)
    pipe.decode(z.clone().requires_grad_())
    monkeypatch.setattr("ldm3d.memory.KEPT", KEPT)
    pipe.decode(z.clone().requires_grad_())
    assert saved == [1]


THRESHOLD = """#!{python}
import sys
import nibabel as nib
import numpy as np
image = nib.load(sys.argv[1])
nib.save(nib.Nifti1Image((np.asarray(image.dataobj) > 400).astype(np.uint8), image.affine), sys.argv[2])
"""


def whole_head(affine: np.ndarray) -> nibabel.Nifti1Image:
    """A brain of 500 to 1,200 in a skull of 300, both brighter to the right."""
    brain = head(9, (40, 46, 38))
    skull = ndimage.binary_dilation(brain > 0, iterations=3)
    values = np.where(brain > 0, 500 + 500 * brain, np.where(skull, 300, 20))
    return nibabel.Nifti1Image((values * np.linspace(0.9, 1.1, 40)[:, None, None]).astype(np.float32), affine)


def test_skull_and_bias_field_are_taken_away_as_in_training_and_given_back(tmp_path, monkeypatch):
    program = tmp_path / "threshold"
    program.write_text(THRESHOLD.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    field = BiasField(np.full((4, 4, 4), np.log(1.25), np.float16), np.diag([30.0, 30, 30, 1]))
    monkeypatch.setattr("ldm3d.data.bias.estimate_field", lambda *_: field)
    image, tool = whole_head(AFFINES["along the axes"]), BrainExtractionConfig(command="threshold {scan} {mask}")
    pipe = tiny_pipeline(preparation=Preparation(brain_extraction=tool, bias_correction="n4"))
    placed = pipe.encode(image)
    given, brain = np.asarray(image.dataobj), np.asarray(image.dataobj) > 400
    factor = field.on(image.affine, given.shape)[0]
    np.testing.assert_allclose(placed.seen[0], np.where(brain, given / factor, 0), rtol=1e-5)
    assert np.abs(placed.back(placed.reconstruction)[0] - given).max() <= 1e-3 * np.ptp(given)

    moved = placed.back((placed.reconstruction + 0.1).clamp(0, 2))[0] - given
    per_unit = factor * (placed.info["high"] - placed.info["low"])
    inside = ndimage.binary_erosion(brain, iterations=3)
    np.testing.assert_allclose(moved[inside], 0.1 * per_unit[inside], rtol=1e-3)
    assert not moved[~brain].any()
    alone = placed.back(placed.volume, keep_residual=False)[0]
    np.testing.assert_array_equal(alone[~brain], given[~brain])
    assert np.corrcoef(alone[inside], given[inside])[0, 1] > 0.8

    assert (placed.volume > 0).sum() < (pipe.encode(image, stripped=True).volume > 0).sum()
    program.unlink()
    with pytest.raises(InputError, match="no such program on PATH"):
        pipe.encode(image)
    pipe.encode(image, stripped=True)


def test_what_training_did_to_scans_is_known_without_its_folders():
    data = {"table": "t.csv", "grid": {"shape": [16, 16, 16], "spacing_mm": 4}, "bias_correction": "n4"}
    data |= {"brain_extraction": {"command": "/home/me/bin/strip {scan} {mask}"}, "percentiles": [0, 99]}
    preparation = Preparation.of(DataConfig.model_validate(data))
    assert preparation.to_dict() == {
        "percentiles": (0, 99),
        "brain_extraction": {"command": "strip '{scan}' '{mask}'"},
        "bias_correction": "n4",
    }
