"""Parameters spread over two processes (FSDP2): the same averages, optimiser steps and checkpoints as on one process.

Two processes are started once, for all of it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import free_port
from safetensors.torch import load_file
from sharded import start, steps
from test_end_to_end import another_run

from ldm3d.errors import InputError
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.training import checkpoint
from ldm3d.training.metrics import read_metrics
from ldm3d.training.optimizer import make_optimizer
from ldm3d.training.sharding import sharding_plugin


@pytest.fixture(scope="module")
def spread(experiment, tmp_path_factory) -> Path:
    """Folder of what two processes did, see sharded.py: adamw/, muon/, diffusion/, autoencoder/, spread.json."""
    folder = tmp_path_factory.mktemp("spread")
    configs = []
    for stage in ("diffusion", "autoencoder"):
        (folder / stage).mkdir()
        configs.append(another_run(experiment, folder / stage, stage))
    program = Path(__file__).with_name("sharded.py")
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"OMP_NUM_THREADS": "1"}
    running = []
    for rank in "01":
        environment = {**os.environ, **variables, "RANK": rank, "LOCAL_RANK": rank}
        with open(folder / f"said-{rank}", "w") as said:
            command = [sys.executable, program, folder, *configs]
            running.append(subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(running):
            assert process.wait(timeout=240) == 0, (folder / f"said-{rank}").read_text()[-4000:]
    finally:
        for process in running:
            process.kill()
    return folder


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_sharded_run_interrupted_once_ends_as_a_whole_one(spread, kind):
    tensors, state = checkpoint.load_checkpoint(spread / kind, 4)
    assert state["step"] == 4

    network, ema, settings = start(kind)
    optimizer = make_optimizer(network, settings)
    steps(network, ema, optimizer, 0, 4)
    for name, expected in (("model", network.state_dict()), ("ema", ema.network.state_dict())):
        assert tensors[name].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(tensors[name][key], value, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")


def test_training_under_the_accelerate_config_is_that_of_one_process(experiment, spread, tmp_path, train_here):
    """configs/accelerate/fsdp.yaml: the losses and weights of a whole run, and a checkpoint from which one process goes on."""
    shutil.copytree(spread / "diffusion/diffusion-training", tmp_path / "diffusion-training")
    config, run = another_run(experiment, tmp_path, "diffusion"), tmp_path / "diffusion-training"

    def ends_as_the_whole_one():
        one, other = (folder / "diffusion-training" for folder in (experiment / "run", tmp_path))
        losses = [[row["loss"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (one, other)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        whole, spread = (load_file(folder / "checkpoints/step-00000008/tensors.safetensors") for folder in (one, other))
        assert whole.keys() == spread.keys()
        for name in whole:
            if name.startswith(("model/", "ema/")):
                torch.testing.assert_close(spread[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)

    ends_as_the_whole_one()
    shutil.rmtree(run / "checkpoints/step-00000008")
    train_here("diffusion", config)
    ends_as_the_whole_one()


def test_every_network_starts_under_the_accelerate_config(spread):
    """Each is spread by those of the config's blocks that it has. sharded.py asserts that times and gradients keep float32."""
    assert json.loads((spread / "spread.json").read_text()) == {
        "U-Net": ["ChannelNorm", "ResBlock", "TransformerBlock"],  # Accelerate adds the last norm
        "U-Net without attention": ["ChannelNorm", "ResBlock"],
        "MONAI U-Net": ["DiffusionUNetResnetBlock", "SpatialTransformer"],
        "MONAI autoencoder": ["AEKLResBlock", "SpatialAttentionBlock"],
        "adversary": [],
    }


def test_stage_1_with_an_adversary_trains_under_the_accelerate_config(spread):
    rows = read_metrics(spread / "autoencoder/autoencoder-training/metrics.jsonl")
    assert {"loss", "adversarial", "discriminator", "validation_psnr_db"} <= rows[-1].keys()
    assert rows[-1]["skipped_steps"] == 0
    network = Autoencoder.from_pretrained(spread / "autoencoder/autoencoder")
    assert network.latent_std.ne(1).all()


def test_fsdp_in_its_first_version_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="fsdp_version: 2"):
        sharding_plugin("bf16")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert sharding_plugin("bf16") is None
