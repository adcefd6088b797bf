"""Which network a finished run hands on, and by which figure."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_end_to_end import another_run

from ldm3d.config.sections import AutoencoderConfig
from ldm3d.diffusion.objective import Denoising
from ldm3d.diffusion.schedules import make_process
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.unet import UNet
from ldm3d.training import diffusion
from ldm3d.training.choice import Choice
from ldm3d.training.losses import VolumeLoss, kl_divergence
from ldm3d.training.volumes import VolumeTask

# The rule


def test_the_best_is_the_lowest_finite_loss():
    choice = Choice("best", None)
    for step, loss in enumerate([float("nan"), 3.0, 1.0, 2.0, float("inf"), 1.0]):
        choice.add(step, loss)
    assert choice.best == {"step": 2, "validation_loss": 1.0} and choice.step == 2
    again = Choice("best", choice.best)  # of a run that goes on
    again.add(7, 1.5)
    assert again.step == 2


def test_the_last_needs_no_best(tmp_path):
    choice = Choice("last", {"step": 2, "validation_loss": 1.0})
    choice.add(3, 0.5)
    assert choice.step is None and choice.load(tmp_path, {}) == "average after the last step"


def test_only_what_the_adversary_taught_is_a_candidate(tmp_path):
    choice = Choice("best", {"step": 4, "validation_loss": 0.1}, after=4)
    choice.add(4, 0.1)
    assert choice.step is None and "none to choose from" in choice.load(tmp_path, {})
    choice.add(5, 0.9)
    assert choice.step == 5


def test_the_best_by_psnr_of_an_older_run_is_none():
    assert Choice("best", {"step": 4, "psnr_db": 30.0}).best is None


def test_what_is_exported_follows_what_was_trained_for(experiment, tmp_path, train_here, monkeypatch, capsys):
    """An adversary from step 2 on; the networks before it have the lower losses. Then the same run again, with the default."""
    losses = iter([0.1, 0.2, 0.3, 0.4])  # of the steps 1 to 4
    monkeypatch.setattr(VolumeTask, "score", lambda *_: {"validation_loss": next(losses), "validation_psnr_db": 20.0})
    config, run = another_run(experiment, tmp_path, "autoencoder"), tmp_path / "autoencoder-training"
    settings = ["training.steps=4", "training.validate_every=1", "linear_path_steps=2"]
    settings += ["adversarial={weight: 0.01, start: 2, channels: 4, layers: 1}"]
    for keep, step, told in [
        ("best", 3, "(best of validation, step 3: loss 0.3000)"),
        ("last", 4, "(average after the last step)"),
    ]:
        train_here("autoencoder", config, *settings, f"training.keep={keep}")
        assert told in capsys.readouterr().out
        expected = load_file(run / f"checkpoints/step-{step:08d}/tensors.safetensors")
        (path,) = (tmp_path / "autoencoder").glob("*.safetensors")
        exported = load_file(path)
        assert torch.equal(exported["to_voxels.weight"], expected["ema/to_voxels.weight"])


# The loss of stage 1


def test_the_loss_of_stage_1_is_the_sum_of_its_parts():
    adversarial = {"weight": 0.5, "start": 3}
    network = {"latent_channels": 1, "downsampling": 2, "channels": [4]}
    training = {"steps": 9, "batch_size": 1, "learning_rate": 1}
    settings = AutoencoderConfig(network=network, l1=2, l2=3, kl=0.1, adversarial=adversarial, training=training)
    losses = VolumeLoss(settings, None, SimpleNamespace(module=lambda real, fake: fake.mean() if real is None else None))
    volume, again = torch.zeros(2, 1, 2, 2, 2), torch.full((2, 1, 2, 2, 2), 0.5)
    moments = torch.ones(2, 2, 1, 1, 1)
    without, parts = losses(volume, again, 2, moments)
    assert without.item() == pytest.approx(2 * 0.5 + 3 * 0.25 + 0.1 * kl_divergence(moments).item() / 8)
    assert set(parts) == {"loss", "l1", "kl_per_voxel"}
    with_it, parts = losses(volume, again, 3, moments)
    assert with_it.item() == pytest.approx(without.item() + 0.5 * 0.5) and parts["adversarial"] == 0.5


# Validation of stage 2


class Recorded:
    """A memory map that remembers which rows were read."""

    def __init__(self, values):
        self.values, self.read = values, []

    def __getitem__(self, row):
        assert isinstance(row, int), "one scan at a time: the whole split does not fit a device"
        self.read.append(row)
        return self.values[row]


def validated(moments, rows, rank=0, world=1):
    torch.manual_seed(0)
    unet = UNet(2, 2, [0], [8], 1, [False], context_dim=4)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    task = object.__new__(diffusion.DiffusionTask)  # of all that a task is, what its score is made from
    task.accelerator = SimpleNamespace(
        device="cpu", process_index=rank, num_processes=world, reduce=lambda value, _: value, autocast=nullcontext
    )
    task.objective, task.autoencoder = Denoising(make_process("flow"), "v", "none", "uniform"), LatentSpace(1, 2, 4)
    one_contrast = SimpleNamespace(channels=())
    task.images, task.config = None, SimpleNamespace(diffusion=SimpleNamespace(mirror=False), data=one_contrast)
    task.moments, task.split, task.padded = moments, {"train": [], "validation": rows}, (2, 2, 2)
    task.complete = task.split
    task.contexts = torch.arange(2000.0).reshape(-1, 1, 2) / 1000
    return task.score(unet, 0)["validation_loss"]


def test_validation_of_stage_2_does_not_depend_on_batches_or_processes(monkeypatch):
    moments = Recorded(np.random.default_rng(0).standard_normal((9, 4, 2, 2, 2), dtype=np.float32))
    rows = [1, 2, 4, 5, 8]
    whole = validated(moments, rows)
    assert set(moments.read) == set(rows) and len(moments.read) == len(rows) * diffusion.VALIDATION_REPEATS
    for size in (1, 3, 16):
        monkeypatch.setattr(diffusion, "VALIDATION_BATCH", size)
        assert validated(moments, rows) == pytest.approx(whole, rel=1e-5)
    shares = [validated(moments, rows, rank, world=3) for rank in range(3)]
    assert sum(shares) == pytest.approx(whole, rel=1e-5)
    assert validated(moments, rows[1:]) != pytest.approx(whole, rel=1e-3)


def test_validation_of_stage_2_does_not_grow_with_the_data(monkeypatch):
    monkeypatch.setattr(diffusion, "MAX_VALIDATION", 6)
    moments = Recorded(np.zeros((900, 4, 2, 2, 2), np.float32))
    validated(moments, list(range(900)))
    assert sorted(set(moments.read)) == [0, 150, 300, 450, 600, 750]
