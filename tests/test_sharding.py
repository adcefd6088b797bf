"""Parameters spread over two processes (FSDP2): the same averages, optimiser steps and checkpoints as on one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import free_port
from sharded import start, steps

from ldm3d.training import checkpoint
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
