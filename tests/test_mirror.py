"""Training on mirrored brains: what the cache holds, what a step reads, what Gaussians are fitted to."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import command_line

from ldm3d.config.read import load_config
from ldm3d.data.conditions import ScanImages
from ldm3d.data.degrade import degraded
from ldm3d.data.latents import read_latents
from ldm3d.data.preparing import load_prepared
from ldm3d.data.samples import DegradedVolumes, LatentSamples
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
    mirrored = np.load(config.latents_folder / "mirrored-moments.npy")
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
    for k, name in enumerate(("moments", "mirrored-moments")):
        np.save(tmp_path / f"{name}.npy", np.full((4, 6, 4, 5, 4), k, np.float32))
    of = {"folder": tmp_path, "rows": (0, 1, 2, 3), "contexts": torch.rand(4, 2, 2), "padded": (4, 6, 4)}
    plain, mirrored = LatentSamples(**of), LatentSamples(**of, mirrored=True)
    chosen = []
    for seed in range(100):
        one, other = (samples(1, generator(seed)) for samples in (plain, mirrored))
        assert all(torch.equal(one[name], other[name]) for name in one if name != "moments")
        chosen.append(float(other["moments"].mean()))
    assert set(chosen) == {0, 1} and 35 <= sum(chosen) <= 65


@pytest.fixture
def given(conditioned, tmp_path):
    """Settings of an experiment with a T2w, labels and a hole as conditions that asks for mirrored brains; not yet encoded."""
    settings = yaml.safe_load((conditioned / "config.yaml").read_text())
    settings["diffusion"] |= {"mirror": True, "loss_weight": "none"}
    settings["diffusion"]["conditions"][1]["groups"] = {"bright": [4, 43], "dark": [3, 42]}
    settings["output"] = str(tmp_path / "run")
    shutil.copytree(conditioned / "run/prepared", tmp_path / "run/prepared")
    return settings


def test_images_are_mirrored_with_their_brain(given, tmp_path, train_here, monkeypatch):
    """What a step reads of a mirrored sample is what it would read of a dataset whose images are all mirrored."""
    from ldm3d.training import diffusion

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    command_line("encode", tmp_path / "config.yaml", "--precision", "float32")
    seen = {}
    monkeypatch.setattr(diffusion, "fit", lambda task, *_: seen.update(task=task))
    train_here("diffusion", tmp_path / "config.yaml")
    task, config = seen["task"], load_config(tmp_path / "config.yaml")
    task.accelerator = Accelerator(cpu=True)
    row = task.split["train"][-1]
    images, channels = ScanImages(config, task.scans), task.images.channels
    volumes = {name: torch.from_numpy(images._cached(name, row))[None].flip(2) for name in ("T2w", "labels")}
    shown, own = (task.conditions_of([row], mirrored=[flipped]).images for flipped in (True, False))
    with torch.no_grad():
        raw = {each.name: channels.encoded(each, volumes[each.name]) for each in channels.conditions[:2]}
        expected = channels.stacked(raw, {})[0]
    first, second = channels.widths[:2]
    torch.testing.assert_close(shown[:, : first + second], expected[:, : first + second], atol=1e-4, rtol=1e-4)
    assert not torch.equal(shown[:, first:], own[:, first:])
    (hole,) = (reader for reader in task.images.readers if isinstance(reader, DegradedVolumes))
    scan = torch.from_numpy(load_prepared(config, task.scans["key"][row])).flip(1)
    made, known, _ = degraded(scan, config.data.grid.spacing_mm, hole.condition.degradations, generator(7))
    read = hole(row, generator(7), True)
    assert torch.equal(read["image holed"], made) and torch.equal(read["measured holed"], known)

    # A Gaussian that knows images is fitted to mirrored brains with mirrored images
    rows = task.complete["train"]
    half = len(task.to_fit(rows)[0]) // 2
    fitted = task.of_fitted(rows, [1, half + 1, half + 2]).images
    assert torch.equal(fitted, task.conditions_of([rows[1], rows[1], rows[2]], mirrored=[False, True, True]).images)
    assert not torch.equal(fitted[0], fitted[1])


def test_a_mirrored_sample_has_mirrored_images():
    def image(row, rng, mirrored):
        return {"image it": torch.tensor(float(mirrored))}

    of = {"folder": None, "rows": (0, 1), "contexts": torch.rand(2, 2, 2), "padded": (4, 6, 4), "images": (image,)}
    samples = LatentSamples(**of, mirrored=True)
    samples.__dict__["_rows"] = lambda row, mirrored=False: torch.full((6, 4, 5, 4), float(mirrored))
    read = [samples(0, generator(seed)) for seed in range(20)]
    assert all((each["moments"] == each["image it"]).all() for each in read)
    assert {float(each["image it"]) for each in read} == {0, 1}


def test_mirrored_labels_of_one_side_would_be_those_of_the_other(given, tmp_path, fails):
    given["diffusion"]["conditions"][1]["groups"] = {"left": [4], "dark": [3, 42]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    assert "the group left of labels holds label 4 and not 43" in fails("encode", tmp_path / "config.yaml")
    given["diffusion"] |= {"mirror": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    load_config(tmp_path / "config.yaml")
