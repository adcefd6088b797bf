"""What one sample of training is: small when it is handed to a process that reads ahead, and the same there."""

import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_settings

from ldm3d.config.sections import Config
from ldm3d.data.batches import evenly
from ldm3d.data.coded import CodedVolumes
from ldm3d.data.samples import LatentSamples, VolumeSamples, moved
from ldm3d.randomness import generator


def latent_samples(folder, scans=50):
    np.save(folder / "moments.npy", np.random.default_rng(0).standard_normal((scans, 6, 4, 5, 4), dtype=np.float32))
    return LatentSamples(folder, tuple(range(10, scans)), torch.rand(scans, 2, 2), (4, 6, 4))


def test_latents_travel_as_the_name_of_their_file(tmp_path):
    """Also once it is open: a memory map pickles as its whole content."""
    samples = latent_samples(tmp_path)
    first = samples(3, generator(0))
    sent = pickle.dumps(samples)
    assert (tmp_path / "moments.npy").stat().st_size > 90_000 and len(sent) < 5_000
    again = pickle.loads(sent)(3, generator(0))
    assert first.keys() == again.keys() == {"moments", "context", "posterior_noise", "noise", "drop"}
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_latent_is_its_row_s(tmp_path):
    samples = latent_samples(tmp_path)
    sample = samples(3, generator(0))
    assert len(samples) == 40
    np.testing.assert_array_equal(sample["moments"], np.load(tmp_path / "moments.npy")[13])
    assert torch.equal(sample["context"], samples.contexts[13])
    assert sample["posterior_noise"].shape == (3, 4, 5, 4) and sample["noise"].shape == (3, 4, 6, 4)
    assert sample["drop"].shape == (4,)


@pytest.mark.parametrize("axis", [(), (1,)], ids=["as earlier versions prepared them", "with an axis of channels"])
def test_volumes_travel_as_their_keys(axis, tmp_path):
    config = Config.model_validate(tiny_settings(tmp_path))
    (config.prepared_folder / "volumes").mkdir(parents=True)
    for i in range(3):
        np.save(config.prepared_folder / "volumes" / f"k{i}.npy", np.full((*axis, 24, 28, 24), i / 2, np.float16))
    samples = VolumeSamples(config, ("k2", "k1"), (3, 6, 7, 6), CodedVolumes(config))
    sent = pickle.dumps(samples)
    assert len(sent) < 10_000 and len(samples) == 2
    for each in (samples, pickle.loads(sent)):
        sample = each(1, generator(0))
        assert (sample["volume"] == 0.5).all() and sample["volume"].shape == (1, 24, 28, 24)
        assert sample["noise"].shape == (3, 6, 7, 6)


def test_volumes_are_mirrored_and_shifted():
    volume = torch.zeros(1, 24, 28, 24)
    volume[0, 4, 9, 10] = 1  # to the left of the middle
    found = set()
    for seed in range(200):
        (place,) = moved(volume, 4, generator(seed)).nonzero().tolist()
        mirrored = place[1] > 12
        found.add((mirrored, place[1] - (19 if mirrored else 4), place[2] - 9, place[3] - 10))
    assert {place[0] for place in found} == {False, True}
    for axis in (1, 2, 3):
        assert {place[axis] for place in found} == set(range(-3, 4))
    shifted = moved(torch.ones(1, 24, 28, 24), 4, generator(1))  # nothing comes back on the other side
    assert shifted.shape == (1, 24, 28, 24) and set(shifted.unique().tolist()) == {0, 1}


def test_volumes_move_only_where_the_config_says_so(tmp_path):
    volume = np.random.default_rng(0).random((1, 24, 28, 24)).astype(np.float32)
    for augment in (False, True):
        settings = tiny_settings(tmp_path)
        settings["autoencoder"]["augment"] = augment
        config = Config.model_validate(settings)
        (config.prepared_folder / "volumes").mkdir(parents=True, exist_ok=True)
        np.save(config.prepared_folder / "volumes" / "k.npy", volume)
        one, same, other = (
            VolumeSamples(config, ("k",), (3, 6, 7, 6), CodedVolumes(config))(0, generator(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(one["volume"], same["volume"]) and torch.equal(one["noise"], same["noise"])
        assert torch.equal(one["volume"], torch.from_numpy(volume)) is not augment
        assert torch.equal(one["volume"], other["volume"]) is not augment


def test_evenly():
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly("abc", 5) == ["a", "b", "c"]
    assert evenly([], 5) == []
    chosen = evenly(range(1000), 256)
    assert len(set(chosen)) == 256 and set(np.diff(chosen)) == {3, 4}
