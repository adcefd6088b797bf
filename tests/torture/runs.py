"""A tiny experiment whose trainings are started, killed and compared as a user's would be."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.training.metrics import read_metrics

# The U-Net's coarsest grid has sides of 3: for sides of 2, PyTorch's bfloat16 gradients are NaN on some CPUs
SHAPE = (24, 24, 24)
STEPS = 24
TRAINING = {
    **{"steps": STEPS, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2},
    **{"log_every": 1, "validate_every": 6, "preview_every": STEPS, "checkpoint_every": 3},
}


def make_experiment(folder: Path) -> Path:
    """Phantoms, a config for them and their prepared volumes; gives the config."""
    write_dataset(folder / "data", subjects=20, shape=SHAPE, seed=3, workers=1)
    settings = {
        "name": "tiny",
        "output": str(folder / "run"),
        "data": {
            "bids": str(folder / "data"),
            "grid": {"shape": list(SHAPE), "spacing_mm": 8},
            "splits": {"validation": 0.2, "test": 0.1},
        },
        "covariates": [{"name": "age", "kind": "continuous", "unit": "years", "range": [0, 120]}],
        "autoencoder": {
            "network": {"latent_channels": 3, "downsampling": 4, "channels": [8, 16], "blocks": 1},
            "linear_path_steps": 20,
            "training": {**TRAINING, "optimizer": "muon"},
        },
        "diffusion": {
            "network": {"channels": [16, 32], "attention": [False, True], "head_channels": 16, "context_dim": 16},
            "training": TRAINING,
        },
        "generation": {"sampler": "heun", "steps": 2},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    finish(start("ldm3d", "prepare", config, "--workers", 1))
    return config


def start(module: str, *arguments, processes: int = 1) -> subprocess.Popen:
    """A module as a program of its own, with `processes` of it if they are more than one."""
    command = [sys.executable, "-m", module]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            *command[1:],
        ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin would hold up the other processes on a small machine
    command += map(str, arguments)
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What a program that must end with `code` has printed."""
    output, _ = process.communicate()
    assert process.returncode == code, f"exit code {process.returncode} instead of {code}:\n{output[-3000:]}"
    return output


def train(stage: str, config: Path, output: Path, precision: str = "no", processes: int = 1, steps: int = STEPS):
    """Start a stage's training with its results below `output`, where what it needs must be."""
    settings = {"output": output, "training.mixed_precision": precision, "training.steps": steps}
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return start(f"ldm3d.training.{stage}", config, *arguments, processes=processes)


def send(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """A signal to a program and all that it has started (torchrun's workers lead sessions of their own)."""
    family = [process.pid]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_for(process: subprocess.Popen, condition) -> bool:
    """Until `condition()`; False if the program ends before."""
    while process.poll() is None:
        try:
            if condition():
                return True
        except FileNotFoundError:  # it looked at a file that was just renamed
            continue
        time.sleep(0.001)
    return False


def step_of(run: Path) -> int:
    """The last step in a run's metrics."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def differences(one: Path, other: Path, stage: str, steps: int = STEPS) -> list[str]:
    """Where two finished trainings are not the same to the last bit, and what is left of interruptions in the second."""
    run = f"{stage}-training"
    result = {"autoencoder": "autoencoder/model.safetensors", "diffusion": "model/unet/model.safetensors"}[stage]
    last = f"{run}/checkpoints/step-{steps:08d}"
    files = [f"{last}/tensors.safetensors", f"{last}/state.json", f"{run}/metrics.jsonl", result]
    found = [name for name in files if (one / name).read_bytes() != (other / name).read_bytes()]
    if list((other / run / "checkpoints").glob("partial-*")):
        found.append("a half-written checkpoint was left")
    events = EventAccumulator(str(other / run / "tensorboard")).Reload().Scalars("loss")
    rows = [row["step"] for row in read_metrics(other / run / "metrics.jsonl")]
    if rows != list(range(1, steps + 1)) or [event.step for event in events] != rows:
        found.append("steps are missing or doubled in metrics.jsonl or TensorBoard")
    return found
