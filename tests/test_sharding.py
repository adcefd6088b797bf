"""Parameters spread over two processes (FSDP2): the same averages, optimiser steps and checkpoints as on one process."""

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

from ldm3d.training import checkpoint
from ldm3d.training.metrics import read_metrics
from ldm3d.training.optimizer import make_optimizer


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_sharded_run_interrupted_once_ends_as_a_whole_one(tmp_path, kind):
    program = Path(__file__).with_name("sharded.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    for _ in range(2):  # two steps, a checkpoint, a new start from it, two more
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, program, tmp_path, kind], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    tensors, state = checkpoint.load_checkpoint(tmp_path, 4)
    assert state["step"] == 4

    network, ema, settings = start(kind)
    optimizer = make_optimizer(network, settings)
    steps(network, ema, optimizer, 0, 4)
    for name, expected in (("model", network.state_dict()), ("ema", ema.network.state_dict())):
        assert tensors[name].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(tensors[name][key], value, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")


def test_training_under_the_accelerate_config_is_that_of_one_process(experiment, tmp_path, train_here):
    """configs/accelerate/fsdp.yaml: the losses and weights of a whole run, and a checkpoint from which one process goes on."""
    config, run = another_run(experiment, tmp_path, "diffusion"), tmp_path / "diffusion-training"
    program = Path(__file__).with_name("sharded_training.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, program, config], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FSDP2: True; 2 processes; ResBlock, TransformerBlock" in done.stdout

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
