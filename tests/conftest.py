"""A tiny experiment, trained once for all tests that need a model; and a core for each of pytest-xdist's workers."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

# Before PyTorch counts the cores, so that it and all that a test starts have one thread: threads that share cores wait for
# each other, and sums over several of them were seen to be rounded otherwise once in a while (docs/reliability.md)
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from in_process import train

from ldm3d import cli
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.preemption import SIGNALS

torch.set_num_threads(1)

SHAPE = (24, 28, 24)


def tiny_settings(folder: Path) -> dict:
    """An experiment that trains in seconds, and learns as much as that allows."""
    training = {"batch_size": 4, "learning_rate": 1e-3, "mixed_precision": "no", "schedule": "constant", "warmup_steps": 2}
    intervals = {"log_every": 2, "validate_every": 8, "preview_every": 8, "checkpoint_every": 4}
    return {
        "name": "tiny",
        "output": str(folder / "run"),
        "data": {
            "bids": str(folder / "data"),
            "grid": {"shape": list(SHAPE), "spacing_mm": 7.5},
            "splits": {"validation": 0.2, "test": 0.25, "seed": 18},  # of 20 phantoms 11, 4 and 5
        },
        "covariates": [
            {"name": "age", "kind": "continuous", "unit": "years", "range": [0, 120]},
            {"name": "sex", "kind": "categorical", "categories": ["F", "M"]},
            {"name": "ventricular_volume_ml", "kind": "continuous", "unit": "ml", "range": [0, 300]},
        ],
        "autoencoder": {
            "network": {"latent_channels": 3, "downsampling": 4, "channels": [8, 16], "blocks": 1},
            "linear_path_steps": 20,
            "training": {"steps": 8, "optimizer": "muon", **training, **intervals},
        },
        "diffusion": {
            "network": {"channels": [16, 32], "attention": [False, True], "head_channels": 16, "context_dim": 16},
            "training": {"steps": 8, **training, **intervals},
        },
        "decoder": {
            "adversarial": {"weight": 0.01, "start": 2, "channels": 4, "layers": 1},
            "training": {"steps": 8, **training, **intervals},
        },
        "generation": {"sampler": "heun", "steps": 2, "guidance": 1.5},
    }


@pytest.fixture(scope="session")
def experiment(tmp_path_factory) -> Path:
    """Folder with config.yaml, data/ and run/ of an experiment that has been through every command."""
    folder = tmp_path_factory.mktemp("experiment")
    write_dataset(folder / "data", subjects=20, shape=SHAPE, seed=3, workers=1)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_settings(folder)))
    command_line("prepare", config, "--workers", 1)
    train("autoencoder", config)
    command_line("encode", config)
    train("diffusion", config)
    return folder


GROUPS = {"inside": [4, 43], "rest": [3]}
CONDITIONS = [
    {"name": "T2w", "kind": "image", "suffix": "T2w", "drop": 0.5},
    {"name": "labels", "kind": "labels", "derivatives": "labels", "groups": GROUPS},
    {"name": "holed", "kind": "degraded", "degradations": [{"operator": "hole", "strength": [40, 80]}]},
]


@pytest.fixture(scope="session")
def conditioned(experiment, tmp_path_factory):
    """An experiment with three conditions that starts from the tiny model; all but one subject have a T2w and labels."""
    folder = tmp_path_factory.mktemp("conditioned")
    shutil.copytree(experiment / "data", folder / "data")
    for path in sorted(folder.glob("data/sub-*/anat/*_T1w.nii.gz"))[1:]:
        image = nib.load(path)
        voxels = image.get_fdata(dtype=np.float32)
        nib.save(nib.Nifti1Image(voxels.max() - voxels, image.affine), str(path).replace("T1w", "T2w"))
        labels = np.where(voxels > 0.6 * voxels.max(), 4, np.where(voxels > 0.2 * voxels.max(), 3, 0)).astype(np.int16)
        target = folder / "labels" / path.parents[1].name / path.name.replace("T1w", "dseg")
        target.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(labels, image.affine), target)
    settings = tiny_settings(folder)
    settings["diffusion"]["init_from"] = str(experiment / "run/model")
    settings["diffusion"]["conditions"] = [dict(each) for each in CONDITIONS]
    settings["diffusion"]["conditions"][1]["derivatives"] = str(folder / "labels")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command_line("prepare", config, "--workers", 1)
    command_line("encode", config)
    return folder


def command_line(*arguments) -> None:
    """`ldm3d ARGUMENTS` in this process; SystemExit if it fails."""
    before, sys.argv = sys.argv, ["ldm3d", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as done:
        if done.code not in (0, None):
            raise
    finally:
        sys.argv = before


def launch(module: str, *arguments, check: bool = True, processes: int = 1) -> subprocess.CompletedProcess:
    """`accelerate launch --cpu -m MODULE ARGUMENTS`, as a user starts it."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command = [*launcher, "-m", module]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def signals_as_before():
    """A command that leaves with `REQUEUE` ignores signals to its end; here that is not the process's."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train_here(monkeypatch):
    """(stage, config, settings, stop) -> train in this process, on the CPU; and what the test starts is there, too."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return train


@pytest.fixture
def fails(capsys):
    """Run a command that must exit with code 2 and one clear message, which is returned."""

    def run(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            command_line(*arguments)
        assert done.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return run
