"""Stage 3: the decoder learns alone, and what was trained on the latents stays valid."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_end_to_end import another_run

from ldm3d.config.read import load_config
from ldm3d.data.latents import read_latents
from ldm3d.experiment import latents_origin
from ldm3d.pipeline import Pipeline
from ldm3d.preemption import Stop
from ldm3d.training.metrics import read_metrics


def test_the_decoder_changes_and_nothing_else(experiment, tmp_path, train_here):
    config = another_run(experiment, tmp_path, "decoder")
    for name in ("model", "diffusion-training"):
        shutil.copytree(experiment / "run" / name, tmp_path / name)
    before = load_file(tmp_path / "autoencoder/model.safetensors")
    train_here("decoder", config)

    after = load_file(tmp_path / "decoder/model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "to_voxels", "synthesis"}
    assert torch.equal(load_file(tmp_path / "autoencoder/model.safetensors")["to_voxels.weight"], before["to_voxels.weight"])
    read_latents(load_config(config).latents_folder, latents_origin(load_config(config)))  # is not stale
    pipeline = Pipeline.from_pretrained(tmp_path / "model", "cpu", torch.float32)
    assert torch.equal(pipeline.autoencoder.state_dict()["to_voxels.weight"], after["to_voxels.weight"])
    assert (tmp_path / "decoder-training/preview-00000008.png").is_file()

    train_here("diffusion", config, "training.steps=9")  # stage 2 after it takes it up, too
    pipeline = Pipeline.from_pretrained(tmp_path / "model", "cpu", torch.float32)
    assert torch.equal(pipeline.autoencoder.state_dict()["to_voxels.weight"], after["to_voxels.weight"])


def test_stopped_and_reading_ahead_it_ends_with_the_same_bits(experiment, tmp_path, train_here):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    train_here("decoder", another_run(experiment, whole, "decoder"))
    config = another_run(experiment, parts, "decoder")
    with pytest.raises(SystemExit):
        train_here("decoder", config, stop=Stop("SIGTERM"))  # after the first step; the adversary begins with the third
    train_here("decoder", config, "training.workers=1")
    one, other = (load_file(folder / "decoder/model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    runs = (folder / "decoder-training/metrics.jsonl" for folder in (whole, parts))
    first, second = map(read_metrics, runs)
    assert first == second and "discriminator" in first[-1]
