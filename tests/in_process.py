"""A training in the process that asks for it; and, run by torchrun, both stages of an experiment one after the other.

A process that is started only to train imports PyTorch anew, which takes longer than the few steps of a test.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ldm3d.config.read import load_config
from ldm3d.preemption import Stop

STAGES = ("autoencoder", "diffusion")


def train(stage: str, config: Path, *settings: str, stop: Stop | None = None) -> None:
    """Train on the CPU; nothing of it stays in this process."""
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    module = importlib.import_module(f"ldm3d.training.{stage}")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            module.train(load_config(config, settings, stage), stop or Stop())
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)


def both(folder: Path, *settings: str) -> None:
    """FOLDER/STAGE/config.yaml of each stage, on the processes of torchrun, which stay together in between."""
    os.sched_setaffinity(0, range(os.cpu_count()))  # a worker of the tests has one core
    Accelerator.end_training = lambda self: None
    for stage in STAGES:
        train(stage, folder / stage / "config.yaml", *settings)


if __name__ == "__main__":
    both(Path(sys.argv[1]), *sys.argv[2:])
