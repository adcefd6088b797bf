"""Training on mirrored brains: what the cache holds, what a step reads, what Gaussians are fitted to."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import command_line

from ldm3d.config.read import load_config
from ldm3d.data.latents import read_latents
from ldm3d.data.preparing import load_prepared
from ldm3d.data.samples import LatentSamples
from ldm3d.errors import InputError
from ldm3d.experiment import latents_origin
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.randomness import generator
from ldm3d.training.diffusion import DiffusionTask


@pytest.fixture
def mirroring(experiment, tmp_path):
    """A config like the experiment's that asks for mirrored brains, with its prepared scans, autoencoder and latents."""
    settings = yaml.safe_load((experiment / "config.yaml").read_text())
    settings["diffusion"] |= {"mirror": True, "start": {"components": 3, "until": 1}}
    settings["output"] = str(tmp_path / "run")
    for part in ("prepared", "autoencoder", "autoencoder-training", "latents"):
        shutil.copytree(experiment / "run" / part, tmp_path / "run" / part)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "config.yaml"


def test_latents_of_mirrored_volumes_are_encoded_beside(mirroring):
    config = load_config(mirroring)
    with pytest.raises(InputError, match="stale: the mirrored volumes"):
        read_latents(config.latents_folder, latents_origin(config))
    command_line("encode", mirroring, "--precision", "float32")
    moments, scans = read_latents(config.latents_folder, latents_origin(config))
    autoencoder = LatentSpace.from_pretrained(config.autoencoder_folder)
    mirrored = np.load(config.latents_folder / "mirrored.npy")
    assert mirrored.shape == moments.shape
    volume = torch.from_numpy(load_prepared(config, scans["key"][2]))[None].float()
    with torch.no_grad():
        np.testing.assert_allclose(mirrored[2:3], autoencoder.encode(volume.flip(2)), atol=1e-4)
        np.testing.assert_allclose(moments[2:3], autoencoder.encode(volume), atol=1e-4)

    train = [i for i, split in enumerate(scans["split"]) if split == "train"]
    task = DiffusionTask(config, autoencoder, moments, scans, latents_origin(config), Accelerator(cpu=True))
    latents, contexts = task.to_fit(train)
    half = len(latents) // 2
    assert half % 5 == 0 and 0 <= len(train) - half < 5  # a brain and its mirror image are in one fold
    assert torch.equal(contexts[:half], contexts[half:])
    assert torch.equal(latents[half:], task.means(train[:half], mirrored)) and not torch.equal(latents[half:], latents[:half])
    assert task.start.directions.shape[0] == 3


def test_a_step_reads_every_second_sample_mirrored(tmp_path):
    for k, name in enumerate(("moments", "mirrored")):
        np.save(tmp_path / f"{name}.npy", np.full((4, 6, 4, 5, 4), k, np.float32))
    of = {"folder": tmp_path, "rows": (0, 1, 2, 3), "contexts": torch.rand(4, 2, 2), "padded": (4, 6, 4)}
    plain, mirrored = LatentSamples(**of), LatentSamples(**of, mirrored=True)
    chosen = []
    for seed in range(100):
        one, other = (samples(1, generator(seed)) for samples in (plain, mirrored))
        assert all(torch.equal(one[name], other[name]) for name in one if name != "moments")
        chosen.append(float(other["moments"].mean()))
    assert set(chosen) == {0, 1} and 35 <= sum(chosen) <= 65


def test_images_of_conditions_are_not_mirrored(mirroring, fails):
    settings = yaml.safe_load(mirroring.read_text())
    hole = {"name": "hole", "kind": "degraded", "degradations": [{"operator": "hole", "strength": [20, 40]}]}
    settings["diffusion"] |= {"conditions": [hole]}
    mirroring.write_text(yaml.safe_dump(settings))
    assert "mirror: leave it out" in fails("encode", mirroring)
