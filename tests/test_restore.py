"""Restoring: what is known stays, what was asked is understood, and a sample depends on nothing but its number."""

import json
import subprocess

import nibabel
import numpy as np
import pytest
import torch
from test_phantoms import VALIDATOR
from test_placed import head, tiny_pipeline

from ldm3d.applications.decoding import Exact, LatentDecoder, LinearPath
from ldm3d.applications.degraded import degraded
from ldm3d.applications.derived import Derived
from ldm3d.applications.placed import place
from ldm3d.applications.prior import prior_of, spread_of
from ldm3d.applications.restore import interval_of, posterior_volumes, restore
from ldm3d.applications.restore_files import RESTORE, write_restored
from ldm3d.data.nifti import to_image, write_volume
from ldm3d.diffusion.operators import Identity, slices
from ldm3d.errors import InputError
from ldm3d.models.autoencoder import Autoencoder

AFFINE = np.array([[-2.0, 0, 0, 40], [0, 2, 0, -46], [0, 0, 2, -38], [0, 0, 0, 1]])  # mirrored


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def scan():
    return to_image(700 * head(9, (40, 46, 38))[None] + 20, AFFINE)


@pytest.fixture(scope="module")
def hole(tmp_path_factory):
    marked = np.zeros((1, 40, 46, 38), np.float32)
    marked[:, 12:22, 16:26, 10:20] = 1
    path = tmp_path_factory.mktemp("hole") / "hole.nii.gz"
    write_volume(path, marked, AFFINE)
    return path


def test_a_hole_is_filled_and_the_rest_stays(pipe, scan, hole):
    inside = np.asarray(nibabel.load(hole).dataobj) > 0
    data = np.where(inside, 0, np.asarray(scan.dataobj))
    restored = restore(pipe, to_image(data[None], AFFINE), f"hole={hole}", 0.01, samples=3, levels=3)
    voxels = np.asarray(restored.image().dataobj)
    np.testing.assert_array_equal(voxels[~inside], data[~inside])
    assert voxels[inside].mean() > 100  # not black any more
    deviation = np.asarray(restored.deviation_image().dataobj)
    assert (deviation[~inside] == 0).all() and deviation[inside].mean() > 1
    assert b"DERIVED" in restored.image().header["descrip"].tobytes()
    low, high = restored.interval()
    assert (low <= restored.mean).all() and (restored.mean <= high).all()


def test_a_sample_is_the_same_among_others(pipe, scan):
    placed = place(pipe, scan)
    linear, y = slices(2, 20, 2.0), slices(2, 20, 2.0)(placed.volume)
    (row,) = pipe.parse([{"age": 60}])
    several = [each[0] for each in posterior_volumes(pipe, linear, y, row, 0.02, range(3), 2)]
    (alone,) = (each[0] for each in posterior_volumes(pipe, linear, y, row, 0.02, [2], 2))
    assert torch.equal(several[2], alone)
    assert not torch.equal(several[1], alone)


def test_what_was_measured_is_explained(pipe, scan):
    """A draw, measured again, is the measurement but for its noise."""
    placed, linear = place(pipe, scan), slices(2, 20, 2.0, profile="box")
    y = linear(placed.volume)
    (row,) = pipe.parse([{}])
    ((volume, expected, _),) = posterior_volumes(pipe, linear, y, row, 0.005, [0], 3)
    for each in (volume, expected):
        assert (linear(each[None]) - y).square().mean().sqrt() < 0.015


def test_thick_slices_are_of_the_lattice_of_the_file(pipe):
    """A smooth volume on the Grid, sampled as the words say, is what a scanner of thick slices sees of the same."""
    fine = np.stack(np.meshgrid(*(np.arange(n) for n in (40, 46, 40)), indexing="ij"), -1) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    smooth = 500 + 300 * np.sin(fine[..., 0] / 15) * np.cos(fine[..., 1] / 20 + fine[..., 2] / 18)
    thick = smooth.reshape(40, 46, 5, 8).mean(3)  # slices of 16 mm
    affine = AFFINE @ np.diag([1, 1, 8, 1.0])
    affine[:3, 3] = AFFINE[:3, 3] + AFFINE[:3, 2] * 3.5
    placed = place(pipe, to_image(thick[None], affine))
    found = degraded(placed, "slices")
    assert found.measured.shape == (1, 1, 20, 23, 5)  # averaged to the Grid's 4 mm in plane
    assert found.finer == (1, 1, 4)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 24, 20)), indexing="ij"), -1)
    world = grid @ np.array(placed.info["grid_affine"])[:3, :3].T + np.array(placed.info["grid_affine"])[:3, 3]
    on_grid = 500 + 300 * np.sin(world[..., 0] / 15) * np.cos(world[..., 1] / 20 + world[..., 2] / 18)
    scaled = (on_grid - placed.info["low"]) / (placed.info["high"] - placed.info["low"])
    seen = found.linear(torch.from_numpy(scaled.clip(0, 1)).float()[None, None])
    middle = (slice(None), slice(None), slice(3, -3), slice(3, -3), slice(1, -1))
    assert (seen - found.measured)[middle].abs().mean() < 0.02 < found.measured.std() / 5
    back = found.back(placed, placed.volume)
    assert back.shape == (1, 40, 46, 20)
    # Nothing restored: the slices interpolated, on a lattice that covers the same millimetres
    np.testing.assert_allclose(found.affine @ [0, 0, 1.5, 1], affine @ [0, 0, 0, 1], atol=1e-9)


def test_words(pipe, scan, hole):
    placed = place(pipe, scan)
    missing = degraded(placed, "missing=y:3-5,10")
    assert (~missing.known).any(axis=(0, 1, 3)).nonzero()[0].tolist() == [3, 4, 5, 10]
    both = degraded(placed, ["missing=x:0-1", f"mask={hole}"])
    assert both.known.sum() == (np.asarray(nibabel.load(hole).dataobj)[2:] > 0).sum()
    ball = degraded(placed, "ball=10,-4,6:9").known[0]  # voxels are 2 mm, and their first axis runs to the left
    centre = [(40 - 10) / 2, (-4 + 46) / 2, (6 + 38) / 2]
    distance = 2 * np.linalg.norm(np.indices(ball.shape).T - centre, axis=-1).T
    np.testing.assert_array_equal(ball, distance > 9)
    assert degraded(placed, f"mask={hole}").name == "mask=hole.nii.gz"  # no folders of this machine
    blurred = degraded(placed, "blur=8").linear(torch.ones(1, 1, 20, 24, 20))
    torch.testing.assert_close(blurred, torch.ones(1, 1, 20, 24, 20))
    assert isinstance(degraded(placed, Identity()).linear, Identity)


@pytest.mark.parametrize(
    "words, message",
    [
        ("hoel=x", "did you mean 'hole'"),
        ("hole", "needs a file"),
        ("hole=there/is/none.nii.gz", "no such file"),
        ("ball=1,2:3", "a point in mm and a radius"),
        ("ball=1,2,nan:3", "a point in mm and a radius"),
        ("ball=1,2,3:0", "a radius above 0"),
        ("ball=900,0,0:20", "no voxel of .* lies in it"),
        ("missing=w:3", "name an axis"),
        ("missing=z:3-99", "no slice or range of the 38"),
        ("slices", "no slice of it is thicker"),
        ("slices=z:-3", "above 0"),
        ("blur=much", "number above 0"),
        ("noise=0.1", "goes to --noise"),
        (slices(2, 20, 2.0), "must keep the shape"),
    ],
)
def test_words_that_mean_nothing(pipe, scan, words, message):
    with pytest.raises(InputError, match=message):
        degraded(place(pipe, scan), words)


def test_settings_out_of_range(pipe, scan):
    for wrong in ({"samples": 0}, {"levels": 0}, {"noise": 0}):
        with pytest.raises(InputError, match="at least 1"):
            restore(pipe, scan, "noise", **wrong)


def test_intervals_hold_what_they_say():
    """Student's t for few draws of a Gaussian: 90% in the long run, which 1.645 deviations are not."""
    drawn = 0.5 + 0.03 * torch.randn(5, 1, 30, 30, 30, generator=torch.Generator().manual_seed(0))
    low, high = interval_of(drawn[:4].mean(0, keepdim=True), drawn[:4], 0.9)
    held = ((low[0] <= drawn[4]) & (drawn[4] <= high[0])).float().mean()
    assert abs(held - 0.9) < 0.01
    with pytest.raises(InputError, match="two samples"):
        interval_of(drawn[:1], drawn[:1], 0.9)


def test_jacobians(pipe):
    """The linear path's is the decoder's where its network is silent; both are transposed rightly; padding takes no part."""
    torch.manual_seed(1)
    autoencoder = Autoencoder(3, 4, [8, 8], blocks=1).eval()
    autoencoder.synthesis.weight.data.normal_()
    autoencoder.latent_std.copy_(torch.tensor([1.0, 2.0, 3.0]))

    class Padding:
        def __init__(self):
            self.autoencoder, self.dtype, self.grid = autoencoder, torch.float32, type("G", (), {"shape": (8, 12, 8)})

    decoder = LatentDecoder(Padding())
    x, v, w = torch.randn(2, 3, 4, 4, 2), torch.randn(2, 3, 4, 4, 2), torch.randn(2, 1, 8, 12, 8)
    linear, exact = decoder.jacobian(x), Exact(decoder, x)
    assert isinstance(linear, LinearPath)
    for jacobian in (linear, exact):
        torch.testing.assert_close((jacobian(v) * w).sum(), (v * jacobian.transpose(w)).sum(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(linear(v), exact(v), rtol=1e-4, atol=1e-4)


def test_a_model_without_a_gaussian_or_a_linear_path():
    """White latents, and the whole decoder's Jacobian."""
    pipe = tiny_pipeline()
    plain = Autoencoder(4, 4, [8, 8], blocks=1, linear_path=False).eval()
    for parameter in plain.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    pipe.autoencoder = plain.requires_grad_(False)
    white = spread_of(pipe, pipe.parse([{}])[0], (4, 5, 6, 5))(0.5)  # flow: as much noise as data
    v = torch.randn(1, 4, 5, 6, 5)
    torch.testing.assert_close(white.covariance(v), v / 2)
    y = torch.rand(1, 1, 20, 24, 20, generator=torch.Generator().manual_seed(0))
    ((volume, *_),) = posterior_volumes(pipe, Identity(), y, pipe.parse([{}])[0], 0.05, [0], 2)
    assert torch.isfinite(volume).all()


def test_parts_of_the_method_can_be_left_out(pipe):
    """Without a remainder a draw is what was decoded; and another prior is asked in place of the model's."""
    row, y = pipe.parse([{}])[0], torch.rand(1, 1, 20, 24, 20, generator=torch.Generator().manual_seed(0))
    asked = []
    prior = prior_of(pipe, row)._replace(denoise=lambda z, t: asked.append(t) or torch.zeros_like(z))
    (drawn,) = posterior_volumes(pipe, Identity(), y, row, 0.05, [0], 2, prior=prior, keep_remainder=False)
    torch.testing.assert_close(drawn.drawn, drawn.decoded, rtol=0, atol=0)
    torch.testing.assert_close(drawn.expected, drawn.decoded, rtol=0, atol=0)
    assert len(asked) == 2
    (whole,) = posterior_volumes(pipe, Identity(), y, row, 0.05, [0], 2)
    assert not torch.equal(whole.drawn, whole.decoded) and not torch.equal(whole.decoded, drawn.decoded)


def test_files(pipe, scan, tmp_path):
    path = tmp_path / "raw" / "sub-07_ses-2_T1w.nii.gz"
    write_volume(path, np.asarray(scan.dataobj)[None], AFFINE)
    restored = restore(pipe, path, "missing=z:10-12", samples=2, levels=2)
    file = Derived(tmp_path / "out", RESTORE, pipe, path, {"operator": "a"})
    assert not file.is_done
    mean = write_restored(file, restored)
    assert mean == tmp_path / "out/sub-07/ses-2/anat/sub-07_ses-2_desc-restored_T1w.nii.gz"
    assert nibabel.load(file.path("samples")).shape == (40, 46, 38, 2)
    np.testing.assert_allclose(nibabel.load(mean).affine, AFFINE)
    sidecar = json.loads(file.path("restored", ".json").read_text())
    assert sidecar["Sources"] == ["sub-07_ses-2_T1w.nii.gz"]
    assert sidecar["Restoration"]["operator"] == "missing=z:10-12"
    assert (tmp_path / "out/figures/sub-07_ses-2_desc-restored.png").is_file()
    checked = subprocess.run([VALIDATOR, tmp_path / "out", "--json"], capture_output=True, text=True)
    assert not [issue for issue in json.loads(checked.stdout)["issues"]["issues"] if issue["severity"] == "error"]
    assert Derived(tmp_path / "out", RESTORE, pipe, path, {"operator": "a"}).is_done
    with pytest.raises(InputError, match="asked for otherwise"):
        assert Derived(tmp_path / "out", RESTORE, pipe, path, {"operator": "b"}).is_done
    with pytest.raises(InputError, match="not of ldm3d restore"):
        Derived(tmp_path / "raw", RESTORE, pipe, path, {})
