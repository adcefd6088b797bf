"""Volumes of several channels, T1w and T2w for example: through the autoencoder, latents, descriptors and a pipeline."""

import hashlib
import json

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from torture.generation import make_pipeline

from ldm3d.data.keys import scan_of, volume_key
from ldm3d.data.latents import read_latents, write_latents
from ldm3d.data.phantoms import make_phantom
from ldm3d.errors import InputError
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.pipeline import Pipeline
from ldm3d.privacy.descriptors import descriptors_of
from ldm3d.rulers.volumetry import apply_measure

SIDE = 16


def two_channels(i: int) -> np.ndarray:
    """(2, X, Y, Z): a phantom, and the same head in another contrast."""
    image = (make_phantom((SIDE,) * 3, index=i)[0] / 1000).clip(0, 1)
    return np.concatenate([image, (1 - image) * (image > 0.1)])


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    made = make_pipeline()
    torch.manual_seed(0)
    made.autoencoder = Autoencoder(2, 4, (8, 16), blocks=1, in_channels=2).eval().requires_grad_(False)
    made.autoencoder.fit_linear_path(torch.from_numpy(np.stack([two_channels(i) for i in range(4)])))
    return made


def test_both_channels_come_back(pipeline):
    volumes = torch.from_numpy(np.stack([two_channels(i) for i in range(4)]))
    again = pipeline.reconstruct(volumes)
    assert again.shape == (4, 2, SIDE, SIDE, SIDE)
    for channel in range(2):
        unexplained = (again - volumes)[:, channel].square().mean() / volumes[:, channel].var()
        assert unexplained < 0.5, "a few principal components of both"
    assert (again[:, 0] - again[:, 1]).abs().mean() > 0.05


def test_latents_are_of_all_channels(pipeline, tmp_path):
    volumes = {f"k{i}": two_channels(i) for i in range(3)}

    def encode(batch: np.ndarray) -> np.ndarray:
        return pipeline.autoencoder.encode(torch.from_numpy(batch)).numpy()

    write_latents(tmp_path, pd.DataFrame({"key": list(volumes)}), volumes.__getitem__, encode, {}, batch_size=2)
    moments, _ = read_latents(tmp_path, {})
    assert moments.shape == (3, 4, 4, 4, 4)
    np.testing.assert_allclose(moments[2], encode(volumes["k2"][None])[0], atol=1e-6)
    darker = volumes["k2"] * np.array([1, 0.5], np.float32).reshape(2, 1, 1, 1)
    assert np.abs(encode(darker[None])[0] - moments[2]).max() > 0.01


def test_descriptors_see_both_channels(pipeline):
    volume = two_channels(0)
    seen, other = (descriptors_of(pipeline, each) for each in (volume, np.stack([volume[0], volume[0]])))
    assert seen.image.shape == (54, 256) and seen.latent.shape == (2, 256) and seen.coarse.shape == (2, 2, 8, 8, 8)
    assert not torch.allclose(seen.image, other.image) and not torch.allclose(seen.latent, other.latent)
    torch.testing.assert_close(seen.coarse[:, 0], other.coarse[:, 0])
    with pytest.raises(InputError, match=r"\(1, 16, 16, 16\).* \(2, 16, 16, 16\)"):
        descriptors_of(pipeline, volume[:1])


def test_generated_volumes_have_both_and_are_written_with_both(pipeline, tmp_path):
    result = pipeline(2, age=40)
    assert [image.shape for image in result.images] == [(SIDE, SIDE, SIDE, 2)] * 2
    result.save(tmp_path / "out")
    for image, path in zip(result.images, sorted((tmp_path / "out").glob("sub-*/anat/*.nii.gz"))):
        np.testing.assert_array_equal(nibabel.load(path).dataobj, image.dataobj)


def test_a_ruler_sees_the_first_channel():
    volume = two_channels(0)
    assert apply_measure(lambda image, spacing_mm: {"equal": np.array_equal(image, volume[0])}, volume, (1, 1, 1))["equal"]


def test_keys_of_scans_are_those_of_before_volumes_had_channels():
    """A model knows the scans that it has seen by the hash of (X, Y, Z)."""
    scan = np.random.default_rng(0).random((1, 4, 5, 6), dtype=np.float32)
    before = hashlib.sha256(json.dumps((4, 5, 6)).encode() + scan.tobytes()).hexdigest()[:20]
    assert scan_of(volume_key(scan, np.eye(4), {})) == before
    two = np.concatenate([scan, scan])
    assert scan_of(volume_key(two, np.eye(4), {})) != scan_of(volume_key(two[::-1] * 2, np.eye(4), {})) != before
