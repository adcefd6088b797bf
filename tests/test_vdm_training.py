"""Training of the variational diffusion model: the schedule learns in the loop, survives a stop, reaches the saved model."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import command_line, free_port, tiny_settings
from safetensors.torch import load_file
from test_end_to_end import another_run
from torch.optim import Adam

import ldm3d
from ldm3d.config.read import load_config
from ldm3d.diffusion.objective import make_objective
from ldm3d.diffusion.vdm import VDMSchedule
from ldm3d.errors import InputError, differences
from ldm3d.models.pretrained import make_network
from ldm3d.preemption import REQUEUE, Stop
from ldm3d.training import diffusion, noise_schedule
from ldm3d.training.metrics import read_metrics

VDM = ("process={kind: vdm, gamma_min: -10, gamma_max: 8}", "diffusion.time_sampling={kind: uniform}")


def tensors(folder, step):
    return load_file(folder / f"diffusion-training/checkpoints/step-{step:08d}/tensors.safetensors")


def gamma_of(found):
    """The schedule in a checkpoint's tensors as a process."""
    schedule = VDMSchedule(-10.0, 8.0)
    schedule.load_state_dict({key: found[f"schedule/{key}"] for key in ("logits", "mean_loss")})
    return schedule.process()


# In the loop


def test_a_run_is_stopped_goes_on_and_makes_a_model(experiment, tmp_path, train_here, capsys):
    """The same bits as without a stop, the schedule's and its optimiser's too; then likelihood and volumes from the model."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    train_here("diffusion", another_run(experiment, one, "diffusion"), *VDM)
    config = another_run(experiment, other, "diffusion")
    for step in (1, 2):
        with pytest.raises(SystemExit) as done:
            train_here("diffusion", config, *VDM, stop=Stop("SIGUSR1"))
        assert done.value.code == REQUEUE
        assert tensors(other, step)["schedule_optimizer/logits/step"] == step
    train_here("diffusion", config, *VDM)
    whole, stopped = tensors(one, 8), tensors(other, 8)
    assert whole.keys() == stopped.keys()
    assert {"schedule/logits", "schedule/mean_loss", "schedule_optimizer/logits/exp_avg_sq"} <= whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []
    assert read_metrics(one / "diffusion-training/metrics.jsonl") == read_metrics(other / "diffusion-training/metrics.jsonl")

    process = ldm3d.Pipeline.from_pretrained(other / "model", "cpu").process
    assert (process.kind, process.gamma[0], process.gamma[-1], len(process.gamma)) == ("vdm", -10, 8, 65)
    assert process == gamma_of(whole)
    straight = torch.linspace(-10, 8, 65, dtype=torch.float64)
    assert 1e-3 < (torch.tensor(process.gamma, dtype=torch.float64) - straight).abs().max() < 1
    assert (one / "diffusion-training/preview-00000008.png").stat().st_size > 10_000
    image = ldm3d.Pipeline.from_pretrained(other / "model", "cpu")(age=60, steps=2).images[0]
    assert np.isfinite(np.asarray(image.dataobj)).all()

    out = tmp_path / "likelihood.tsv"
    data = ["--data", experiment / "data", "--out", out, "--method", "bound", "--times", 4, "--device", "cpu"]
    command_line("likelihood", one / "model", *data)
    table = pd.read_csv(out, sep="\t")
    parts = table[["prior", "reconstruction", "diffusion"]]
    assert len(table) == 5 and np.isfinite(parts.to_numpy()).all()
    np.testing.assert_allclose(table["bound"], parts.sum(axis=1), rtol=1e-4)
    # The two ends of gamma say all of this term: log-variance gamma_min of x given z_0
    np.testing.assert_allclose(parts["reconstruction"], (1 + np.log(2 * np.pi) - 10) / 2, rtol=1e-6)


def test_the_best_weights_have_the_schedule_they_learned_with(experiment, tmp_path, train_here, monkeypatch):
    losses = iter([1.0, 2.0])  # of steps 2 and 4: the first is the best
    monkeypatch.setattr(diffusion.DiffusionTask, "score", lambda *_: {"validation_loss": next(losses)})
    config = another_run(experiment, tmp_path, "diffusion")
    rare = ("training.steps=4", "training.validate_every=2", "training.preview_every=9")
    train_here("diffusion", config, *VDM, *rare, "training.keep=best")
    best, last = (gamma_of(tensors(tmp_path, step)) for step in (2, 4))
    assert best != last
    assert ldm3d.Pipeline.from_pretrained(tmp_path / "model", "cpu").process == best


FOUR_STEPS = (*VDM, "training.steps=4", "training.validate_every=9", "training.preview_every=9")


@pytest.fixture
def in_one_part(experiment, tmp_path, train_here):
    folder = tmp_path / "one"
    folder.mkdir()
    train_here("diffusion", another_run(experiment, folder, "diffusion"), *FOUR_STEPS)
    return folder


def check_alike(one, other):
    """Two runs of four steps learned the same, to rounding."""
    first, second = tensors(one, 4), tensors(other, 4)
    assert first["schedule/logits"].abs().max() > 0.01
    for name in first:
        if name.startswith(("schedule", "model/")):
            torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_accumulated_parts_teach_the_schedule_as_one(experiment, in_one_part, tmp_path, train_here):
    config = another_run(experiment, tmp_path, "diffusion")
    train_here("diffusion", config, *FOUR_STEPS, "training.accumulation=2")
    check_alike(in_one_part, tmp_path)


@pytest.mark.slow
def test_two_processes_teach_the_schedule_as_one(experiment, in_one_part, tmp_path):
    """In two accumulated parts each."""
    config = another_run(experiment, tmp_path, "diffusion")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command += ["-m", "ldm3d.training.diffusion", str(config)]
    for setting in (*FOUR_STEPS, "training.accumulation=2"):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    check_alike(in_one_part, tmp_path)


# One step of the schedule


def taught(*steps):
    """(state of a schedule and of its optimiser) after `learn` with each (gradient, loss)."""
    schedule = VDMSchedule(knots=5)
    optimizer = Adam(schedule.parameters(), 0.01, fused=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    for gradient, loss in steps:
        schedule.logits.grad = torch.tensor(gradient)
        noise_schedule.learn(schedule, optimizer, torch.tensor(loss), accelerator)
        assert schedule.logits.grad is None
    return {**schedule.state_dict(), **optimizer.state[schedule.logits]}


GOOD = [([1.0, -2.0, 0.5, 0.5], 3.0), ([0.5, 1.0, -1.0, -0.5], 5.0), ([1.0, 1.0, -1.0, -1.0], 4.0)]


@pytest.mark.parametrize("bad", [([1.0, 1.0, 1.0, 1.0], float("nan")), ([float("inf"), 0.0, 0.0, 0.0], 3.5)])
def test_a_step_that_is_not_finite_teaches_nothing(bad):
    expected, found = taught(*GOOD), taught(GOOD[0], GOOD[1], bad, GOOD[2])
    expected_mean, found_mean = expected.pop("mean_loss"), found.pop("mean_loss")
    assert expected["logits"].abs().max() > 0
    if not np.isfinite(bad[1]):
        assert found_mean == expected_mean  # a finite loss with an infinite gradient does count in the running mean
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(value.isfinite().all() for value in found.values()) and found["step"] == 3


# The config


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(tmp_path)))
    return lambda *overrides: load_config(path, overrides, "diffusion")


@pytest.mark.parametrize(
    "overrides, told",
    [
        (VDM[:1], ["process.kind vdm does not go with time_sampling.kind logit-normal: set it to uniform"]),
        ([*VDM, "target=velocity"], ["vdm does not go with target velocity: use v, noise or data"]),
        (
            [VDM[0], "loss_weight=min-snr", "target=velocity"],
            ["kind vdm", "time_sampling.kind logit-normal", "nor with loss_weight min-snr", "nor with target velocity"],
        ),
        ([*VDM, "process.gamma_max=-11"], ["gamma_min -10.0 and gamma_max -11.0", "rising"]),
        (["process={kind: vdm, gamma_min: -8}", VDM[1]], ["gamma_min -8.0 and gamma_max None: give both"]),
        ([*VDM, "process.beta_end=0.1"], ["vdm has no betas"]),
        (["process.gamma_min=-9"], ["flow has no schedule to be learned", "or use vdm"]),
        (["process.schedule_learning_rate=0.1"], ["flow has no schedule"]),
        ([*VDM, "generation.spacing=leading"], ["diffusion.process.kind vdm has none"]),
        (["network.fourier_features=[40]"], ["network.fourier_features.0 is 40"]),
    ],
)
def test_contradictions_name_both_sides(load, overrides, told):
    with pytest.raises(InputError) as caught:
        load(*overrides)
    assert all(part in str(caught.value) for part in told), str(caught.value)


def test_config_reaches_schedule_and_network(load):
    settings = load(*VDM, "network.fourier_features=[-1, 2]").diffusion
    schedule = make_objective(**settings.objective()).schedule
    assert (schedule.gamma_min, schedule.gamma_max) == (-10, 8)
    usual = make_objective(**load("process={kind: vdm}", VDM[1]).diffusion.objective()).schedule
    assert (usual.gamma_min, usual.gamma_max) == (-13.3, 10)
    assert make_objective(**load().diffusion.objective()).schedule is None
    unet = make_network("UNet", in_channels=3, out_channels=3, num_categories=[0], **settings.network.model_dump())
    assert unet.conv_in.weight.shape[1] == 15
    plain = make_network("UNet", in_channels=3, out_channels=3, num_categories=[0], **load().diffusion.network.model_dump())
    assert plain.fourier_features == () and plain.conv_in.weight.shape[1] == 3


def test_new_keys_leave_runs_that_were_begun_before_them_alone(load):
    """A checkpoint's settings then have no such key, and that is the same as its being off."""
    now = load().diffusion.model_dump(mode="json")
    before = json.loads(json.dumps(now))
    for key in ("gamma_min", "gamma_max", "schedule_learning_rate"):
        del before["process"][key]
    del before["network"]["fourier_features"]
    assert differences(before, now) == []
    assert differences(before, load("network.fourier_features=[1]").diffusion.model_dump(mode="json"))
