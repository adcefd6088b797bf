"""`ldm3d check`: what it finds is what there is, and what it expects is what an experiment takes."""

import subprocess
import sys
import types

import pytest
import torch
import yaml
from conftest import SHAPE, command_line, tiny_settings

from ldm3d import check as checking
from ldm3d.budget import estimate
from ldm3d.check import Findings, check, duration, size
from ldm3d.config.read import load_config
from ldm3d.config.recipe import shipped_configs
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.demo_clock import training_seconds

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "data", 12, SHAPE, seed=3, workers=1)


@pytest.fixture
def config(data, tmp_path):
    """A config on links to the data, whose table may be changed."""
    (tmp_path / "data").mkdir()
    for path in data.iterdir():
        if path.name != "participants.tsv":
            (tmp_path / "data" / path.name).symlink_to(path)
    (tmp_path / "data/participants.tsv").write_text((data / "participants.tsv").read_text())
    path = tmp_path / "config.yaml"
    settings = tiny_settings(tmp_path)
    settings["data"]["root"] = str(tmp_path.parents[1])
    path.write_text(yaml.safe_dump(settings))
    return path


def found(config, *settings, timed=False) -> Findings:
    return check(load_config(config, settings), timed)


def test_what_there_is_is_said(config, monkeypatch):
    monkeypatch.setattr(checking, "training_seconds", lambda *_: (0.5, 60.0, 120.0, 1.0))
    result = found(config, timed=True)
    assert result.todo == []
    text = result.text()
    assert text.splitlines()[-1] == "ready"
    assert "12 of 12 subjects in " in text and "0 missing" in text and "sex: F " in text
    # 8 steps of 120 s; 12 scans of 1 s; 20 steps of the linear path, 8 of 60 s, and 2 x 2 x 15 s for validation, 6 scans
    assert "train the diffusion model: 16 minutes" in text and "encode: 0.5 minutes" in text
    expected = 20 * 0.5 + 8 * 60 + 2 * _held_out(result) * 15 + _trained(result)
    assert f"train the autoencoder: {duration(expected)}" in text
    assert not (config.parent / "run").exists()  # nothing is written


def _held_out(result):
    return int(result.said["scans"][1].split(", ")[1].split()[0])


def _trained(result):
    return int(result.said["scans"][1].split()[0])


def test_the_command_ends_in_ready_or_in_what_to_do(config, fails, capsys):
    command_line("check", config, "--no-times")
    assert capsys.readouterr().out.rstrip().endswith("ready")
    with pytest.raises(SystemExit) as done:
        command_line("check", config, "--no-times", "--set", "covariates=[{name: weight, kind: continuous}]")
    assert done.value.code == 2
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("what to do before the run")
    assert "no column 'weight'" in lines[at + 1] and "ready" not in lines
    assert "unknown key" in fails("check", config, "--set", "data.girth=3")


@pytest.mark.parametrize(
    "settings, expected",
    [
        (["data.suffix=T2w"], "no scan found"),
        (["data.exclude=['99']"], "data.exclude: '99'"),
        (["covariates=[{name: sex, kind: categorical, categories: [X, Y]}]"], "not one of X, Y"),
    ],
)
def test_what_would_stop_the_run_is_to_do(config, settings, expected):
    result = found(config, *settings)
    assert any(expected in item for item in result.todo), result.text()


def test_masks_and_columns_of_splits_are_looked_at(config):
    result = found(config, "data.mask={desc: brain}", "data.split_column=fold")
    assert len(result.todo) == 1 and "no column 'fold' (data.split_column)" in result.todo[0]
    (todo,) = found(config, "data.mask={desc: brain}").todo
    assert "no mask in" in todo
    mask = config.parent / "masks/sub-0001/anat/sub-0001_desc-brain_mask.nii.gz"
    mask.parent.mkdir(parents=True)
    mask.touch()
    result = found(config, "data.mask={desc: brain}", f"data.mask.root={config.parent / 'masks'}")
    assert any(item.startswith("11 of 12 scans have not the one mask that they need: ") for item in result.odd)


@pytest.mark.parametrize("bad, stops", [(3, True), (1, False)])
def test_scans_that_cannot_be_prepared(config, monkeypatch, bad, stops):
    tried = [{"reason": "it is cut short"}] * bad + [{"cut_mm": 20.0, "notes": ["a guess"]}] * (3 - bad)
    monkeypatch.setattr(checking, "try_out", lambda config, paths, folder: tried)
    result = found(config)
    text = f"{bad} of 3 scans that were tried cannot be prepared: sub-0001: it is cut short"
    assert any(item.startswith(text) for item in (result.todo if stops else result.odd))
    assert any("cuts off foreground" in item for item in result.odd) is ("a guess" in result.odd) is not stops


def test_whole_heads_that_are_called_stripped(config, monkeypatch):
    head = {"cut_mm": 0.0, "notes": [], "foreground_ml": 3186.0, "even_background": False}
    monkeypatch.setattr(checking, "try_out", lambda config, paths, folder: [head] * 3)
    assert not any("whole heads" in item for item in found(config).odd)
    assert any("3 scans look like whole heads" in item for item in found(config, "data.skull_stripped=true").odd)


def test_a_column_without_values_and_a_category_that_nobody_has(config):
    table = config.parent / "data/participants.tsv"
    head, *rows = table.read_text().splitlines()
    cells = [row.split("\t") for row in rows]
    table.write_text("\n".join([head, *("\t".join([c[0], "n/a", "F", *c[3:]]) for c in cells)]) + "\n")
    result = found(config)
    assert any("'age' has no value in the training split" in item for item in result.todo)
    assert any("no scan is M" in item for item in result.odd) and any("age is missing for 12 of 12" in o for o in result.odd)


def test_too_little_memory_and_disk(config, monkeypatch):
    monkeypatch.setattr(checking, "free_bytes", lambda device: 10**7)
    monkeypatch.setattr(checking.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**5))
    monkeypatch.setattr(checking, "training_seconds", lambda *_: pytest.fail("would be killed"))
    todo = found(config, timed=True).todo
    assert len(todo) == 3 and "lower autoencoder.training.batch_size" in todo[0] and "diffusion.training" in todo[1]
    assert "free some space, or set output to another disk" in todo[2]


def test_scans_that_are_not_there(config):
    for folder in sorted((config.parent / "data").glob("sub-*"))[:2]:
        folder.unlink()
        (folder / "anat").mkdir(parents=True)
        (folder / f"anat/{folder.name}_T1w.nii.gz").symlink_to("/nowhere/x.nii.gz")
    result = found(config)
    assert any(item.startswith("2 of 12 scans are no files (sub-0001, sub-0002)") for item in result.odd + result.todo)


def test_disk_is_what_an_experiment_took(experiment):
    """Each part within a factor of 2: a third checkpoint is there only while it is written."""
    config = load_config(experiment / "config.yaml")
    expected = estimate(config, 20, CPU).disk
    for part, folder in (
        ("prepared", "prepared"),
        ("latents", "latents"),
        ("autoencoder-training", "autoencoder-training/checkpoints"),
        ("diffusion-training", "diffusion-training/checkpoints"),
        ("autoencoder", "autoencoder"),
        ("model", "model"),
    ):
        took = sum(path.stat().st_size for path in (experiment / "run" / folder).rglob("*") if path.is_file())
        assert 0.5 < expected[part] / took < 2, (part, expected[part], took)


STEP = """
import torch
from ldm3d.models.pretrained import make_network
from ldm3d.config.read import load_config
from ldm3d.training.losses import kl_divergence
from ldm3d.training.optimizer import make_optimizer
from ldm3d.training.ema import EMA
import sys
torch.set_num_threads(1)
config = load_config(sys.argv[1], sys.argv[2:])
network, training = config.autoencoder.network, config.autoencoder.training

def resident(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return 1024 * int(line.split()[1])

def steps(count, batch, shape):
    model = make_network("Autoencoder", **network.model_dump())
    average, optimizer = EMA(model, 0.9), make_optimizer(model, training)
    for _ in range(count):
        volumes = torch.rand(batch, 1, *shape)
        noise = torch.randn(batch, *model.latent_shape(shape))
        made, moments = model(volumes, noise)
        ((made - volumes).abs().mean() + kl_divergence(moments)).backward()
        optimizer.step()
        optimizer.zero_grad()

# A small step first: pages of libraries and kernels that it reads from disk are no memory of a step
steps(1, 1, [8, 8, 8])
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew; importing has one of its own
steps(2, training.batch_size, config.data.grid.shape)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in another unit")
def test_memory_is_what_steps_take(config, tmp_path):
    """Of a network whose activations are far more than what PyTorch itself takes: within a factor of 1.6."""
    settings = ("autoencoder.network.channels=[32, 64]", "data.grid.shape=[48, 56, 48]", "autoencoder.training.batch_size=2")
    (tmp_path / "step.py").write_text(STEP)
    done = subprocess.run(
        [sys.executable, tmp_path / "step.py", config, *settings], capture_output=True, text=True, check=True
    )
    expected = estimate(load_config(config, settings), 12, CPU).stage_1
    assert 1 / 1.6 < expected / int(done.stdout) < 1.6


def test_memory_grows_with_the_batch_and_falls_with_accumulation(config):
    plain = estimate(load_config(config), 12, CPU)
    large = estimate(load_config(config, ["autoencoder.training.batch_size=32", "diffusion.training.batch_size=64"]), 12, CPU)
    parts = estimate(
        load_config(config, ["autoencoder.training.batch_size=32", "autoencoder.training.accumulation=8"]), 12, CPU
    )
    assert large.stage_1 > 5 * plain.stage_1 and large.stage_2 > 2 * plain.stage_2
    assert parts.stage_1 == plain.stage_1


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_has_an_estimate(name):
    """Networks that see more than z as well: on the meta device a wrong number of channels is an error, too."""
    budget = estimate(load_config(name), 12, CPU)
    assert budget.stage_1 > 0 and budget.stage_2 > 0


def test_a_network_that_learns_what_the_gaussian_leaves_is_timed(config):
    """`check` had counted and timed it with the channels of z alone, and ended in a traceback."""
    settings = ("diffusion.target=v", "diffusion.start={components: 2, until: 1.0, residual: true}")
    plain = estimate(load_config(config), 12, CPU)
    assert estimate(load_config(config, settings), 12, CPU).stage_2 > plain.stage_2
    assert all(seconds > 0 for seconds in training_seconds(load_config(config, settings), 1))


def test_sizes_and_durations_in_words():
    assert [size(n) for n in (2e6, 1.26e9)] == ["2.0 MB", "1.3 GB"]
    assert [duration(s) for s in (60, 7300)] == ["1 minute", "2.0 hours"]
