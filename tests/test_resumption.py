"""Training that is stopped, killed, or fed what it cannot use: it goes on, says so, and ends with the same bits."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_end_to_end import another_run
from torch import nn
from torture.runs import send, wait_for

from ldm3d.data.batches import TrainingBatches
from ldm3d.errors import InputError
from ldm3d.preemption import REQUEUE, Stop, preemption
from ldm3d.training import parallel
from ldm3d.training.finite import FiniteSteps
from ldm3d.training.metrics import Metrics, read_metrics

STAGES = ["autoencoder", "diffusion"]


def end_alike(experiment, folder, stage):
    """The last checkpoint and the metrics are those of the experiment's own run, which nothing interrupted."""
    runs = [parent / f"{stage}-training" for parent in (experiment / "run", folder)]
    one, other = (load_file(run / "checkpoints/step-00000008/tensors.safetensors") for run in runs)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert read_metrics(runs[0] / "metrics.jsonl") == read_metrics(runs[1] / "metrics.jsonl")


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_after_any_step_it_ends_with_the_same_bits(experiment, tmp_path, train_here, stage, capsys, monkeypatch):
    config = another_run(experiment, tmp_path, stage)

    def asked(stop, *_, **__):
        stop.signal = "SIGUSR1"
        return True

    for step in (1, 2):  # neither is one where a checkpoint was due
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as done:
            patch.setattr(parallel, "asked_to_stop", asked)
            train_here(stage, config, stop=Stop())
        assert done.value.code == REQUEUE
        assert f"SIGUSR1 after step {step}; run the same command to continue" in capsys.readouterr().out
        assert (tmp_path / f"{stage}-training/checkpoints/step-{step:08d}").is_dir()
    train_here(stage, config)
    end_alike(experiment, tmp_path, stage)


def test_stopped_during_the_linear_path_it_ends_with_the_same_bits(experiment, tmp_path, train_here, capsys):
    config = another_run(experiment, tmp_path, "autoencoder")
    with pytest.raises(SystemExit) as done:
        train_here("autoencoder", config, stop=Stop("SIGTERM"))
    assert done.value.code == REQUEUE
    assert "SIGTERM after step 0; run the same command to continue" in capsys.readouterr().out
    assert not list((tmp_path / "autoencoder-training").glob("checkpoints/step-*"))
    train_here("autoencoder", config)
    end_alike(experiment, tmp_path, "autoencoder")


def test_killed_while_it_writes_a_checkpoint_it_ends_with_the_same_bits(experiment, tmp_path, train_here):
    config = another_run(experiment, tmp_path, "diffusion")
    checkpoints = tmp_path / "diffusion-training/checkpoints"
    command = [sys.executable, "-m", "ldm3d.training.diffusion", str(config), "--set", "training.checkpoint_every=1"]
    process = subprocess.Popen(command, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, stderr=subprocess.DEVNULL)
    assert wait_for(process, lambda: list(checkpoints.glob("step-*")) and list(checkpoints.glob("partial-*")))
    send(process)
    process.wait()
    train_here("diffusion", config)
    end_alike(experiment, tmp_path, "diffusion")
    assert not list(checkpoints.glob("partial-*"))


def test_signals_are_noted_and_then_what_they_were():
    handler = signal.getsignal(signal.SIGTERM)
    with preemption() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and stop.signal == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_signal_on_the_way_out_does_not_change_the_exit_code():
    """As of srun --kill-on-bad-exit, when another process of the job was faster."""
    program = (
        "import os, signal\n"
        "from ldm3d.preemption import REQUEUE, preemption\n"
        "try:\n"
        "    with preemption() as stop:\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "        raise SystemExit(REQUEUE if stop.asked else 0)\n"
        "finally:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == REQUEUE


def test_who_ends_the_demo_ends_its_steps():
    program = (
        "import os, signal, threading\n"
        "from ldm3d import demo\n"
        "threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "waiting = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "demo._step('wait', 'timeit', '-n', '1', '-r', '1', waiting)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == REQUEUE and "stopped by SIGTERM; run the same command to continue" in done.stdout
    (number,) = (int(line) for line in done.stdout.splitlines() if line.isdigit())
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_another_number_of_processes_is_said(experiment, tmp_path, train_here, capsys):
    """A run of one process that was begun on two; the checkpoint says so."""
    config = another_run(experiment, tmp_path, "diffusion")
    with pytest.raises(SystemExit):
        train_here("diffusion", config, stop=Stop("SIGTERM"))
    folder = tmp_path / "diffusion-training/checkpoints/step-00000001"
    state = folder / "state.json"
    state.write_text(state.read_text().replace('"processes": 1', '"processes": 2'))
    sums = subprocess.run(["sha256sum", "tensors.safetensors", "state.json"], cwd=folder, capture_output=True, check=True)
    (folder / "SHA256SUMS").write_bytes(sums.stdout)
    train_here("diffusion", config)
    said = capsys.readouterr().out
    assert "processes: 2 -> 1" in said and "no longer bit-identical" in said


def test_settings_that_only_round_otherwise_may_change_and_are_said(experiment, tmp_path, train_here, capsys):
    """A run of more processes goes on on fewer with more parts of each batch: the same losses, to rounding."""
    config = another_run(experiment, tmp_path, "diffusion")
    with pytest.raises(SystemExit):
        train_here("diffusion", config, stop=Stop("SIGTERM"))
    capsys.readouterr()
    train_here("diffusion", config, "training.accumulation=2", "network.attention_backend=math")
    said = capsys.readouterr().out
    assert "diffusion.training.accumulation: 1 -> 2" in said and "network.attention_backend: auto -> math" in said
    assert "no longer bit-identical" in said and "mixed_precision" not in said
    runs = (folder / "diffusion-training/metrics.jsonl" for folder in (experiment / "run", tmp_path))
    one, other = ([row["loss"] for row in read_metrics(run)] for run in runs)
    assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_that_reads_ahead_changes_no_bit(experiment, tmp_path, train_here, stage):
    """It gets the samples by pickle and opens their files itself."""
    train_here(stage, another_run(experiment, tmp_path, stage), "training.workers=1")
    end_alike(experiment, tmp_path, stage)


def test_a_latent_that_is_not_finite_is_skipped_and_named(experiment, tmp_path, train_here, capsys):
    config = another_run(experiment, tmp_path, "diffusion")
    scans = pd.read_csv(tmp_path / "latents/scans.tsv", sep="\t", dtype=str)
    train = [i for i, split in enumerate(scans["split"]) if split == "train"]
    moments = np.load(tmp_path / "latents/moments.npy", mmap_mode="r+")
    moments[train[3], 0, 0, 0, 0] = np.nan
    moments.flush()
    batches = TrainingBatches(None, len(train), 4, 1, seed=0)
    bad = [step for step in range(8) if 3 in batches.samples(step)]
    assert bad
    train_here("diffusion", config, "training.log_every=1")
    rows = read_metrics(tmp_path / "diffusion-training/metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [sum(b <= step for b in bad) for step in range(8)]
    assert ["loss" in row for row in rows] == [step not in bad for step in range(8)]
    tensors = load_file(tmp_path / "diffusion-training/checkpoints/step-00000008/tensors.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values())
    subject = scans["subject"][train[3]]
    assert subject in capsys.readouterr().out
    shutil.rmtree(tmp_path / "diffusion-training")
    with pytest.raises(InputError, match=rf"NaN or infinite at 1 steps, more than .* step {bad[0] + 1}, .*{subject}"):
        train_here("diffusion", config, "training.max_skipped_steps=0", "training.log_every=1")


def test_a_step_that_is_skipped_changes_nothing():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    network = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(network.parameters(), 0.1, fused=True)
    network, optimizer = accelerator.prepare(network, optimizer)
    finite = FiniteSteps(accelerator, 2, lambda step: [f"of step {step}"], skipped=1)

    def step(number, value):
        loss = network(torch.full((1, 3), value)).sum()
        accelerator.backward(loss)
        finite.step(optimizer, number, accelerator.clip_grad_norm_(network.parameters(), 1.0))
        optimizer.zero_grad()
        return network.weight.detach().clone()

    first, state = step(0, 1.0), None
    state = {key: value.clone() for key, value in optimizer.optimizer.state[network.weight].items()}
    assert torch.equal(step(1, float("inf")), first)
    assert all(torch.equal(value, optimizer.optimizer.state[network.weight][key]) for key, value in state.items())
    assert finite.check() == 2 and finite.state() == {"skipped_steps": 2}
    assert not torch.equal(step(2, 1.0), first)
    step(3, float("nan"))
    with pytest.raises(InputError, match=r"at 3 steps, more than training\.max_skipped_steps 2; .* step 4, .* of step 3"):
        finite.check()


def test_metrics_have_each_step_once(tmp_path):
    """TensorBoard's files, too, whatever a killed process left behind."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True)
    metrics = Metrics(tmp_path, accelerator, 0)
    for step in (1, 2, 3):
        metrics.add(step, {"loss": step / 10})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with pytest.warns(UserWarning, match="half-written"):
        again = Metrics(tmp_path, accelerator, 2)
    again.add(3, {"loss": 0.5, "other": float("nan")})
    again.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 3, "loss": 0.5},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, round(event.value, 6)) for event in events] == [(1, 0.1), (2, 0.2), (3, 0.5)]


def test_metrics_keep_small_learning_rates_and_large_counts(tmp_path):
    metrics = Metrics(tmp_path, Accelerator(cpu=True), 0)
    row = {"learning_rate": 3.2e-7, "loss": 0.0379148424, "volumes": 123456789.0}
    metrics.add(1, row)
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1} | row]


def unreadable(sample, rng):
    raise InputError(f"sample {sample} is damaged")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named(workers):
    batches = TrainingBatches(unreadable, 3, 1, 1, seed=0)
    with pytest.raises(InputError) as caught:
        next(batches.loader(0, 2, workers, False))
    assert str(caught.value).startswith("sample ") and "Traceback" not in str(caught.value)


def zeros(sample, rng):
    return {"zeros": torch.zeros(1)}


LEFT_BEHIND = """
import sys
from pathlib import Path
from ldm3d.data.batches import TrainingBatches
from test_resumption import zeros
if __name__ == "__main__":
    sys.batches = TrainingBatches(zeros, 3, 1, 1, seed=0).loader(0, 100, 1, False)  # as in the traceback of an error
    next(sys.batches)
"""


def test_workers_that_ignore_sigterm_do_not_keep_python_from_ending(tmp_path):
    (tmp_path / "script.py").write_text(LEFT_BEHIND)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True, timeout=120, env=environment)
