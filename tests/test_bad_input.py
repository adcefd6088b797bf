"""Bad input to the commands: exit code 2, one message that says what to do, nothing lost."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import command_line, launch, tiny_settings

from ldm3d.errors import InputError

LIMIT_FILE_SIZE = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "


@pytest.fixture
def config(experiment, tmp_path):
    """The tiny experiment's config, with its output copied to where it may be damaged."""
    shutil.copytree(experiment / "run", tmp_path / "run")
    settings = tiny_settings(experiment) | {"output": str(tmp_path / "run")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_config(fails, config, tmp_path):
    assert "no config file" in fails("prepare", tmp_path / "none.yaml")
    assert "did you mean 'percentiles'?" in fails("prepare", config, "--set", "data.percentile=[0, 99]")
    assert "crop to (24, 28, 24) or pad to (28, 32, 28)" in fails("prepare", config, "--set", "data.grid.shape=[25, 29, 27]")
    assert "/nowhere" in fails("prepare", config, "--set", "data.bids=/nowhere")


def test_more_processes_than_were_started(config):
    done = launch("ldm3d.training.autoencoder", config, check=False, processes=2)
    assert done.returncode != 0 and "several processes and started one" in done.stderr and "torchrun" in done.stderr


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--agee", "72"], "did you mean 'age'?"),
        (["--age", "old"], "'old' is not a number"),
        (["--age", "150"], "outside its range 0 to 120"),
        (["--sex", "X"], "not one of F, M"),
        (["--age"], "needs a value"),
        (["72"], "has no name"),
        (["--sampler", "huen"], "did you mean 'heun'?"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--table", "requests.csv", "--num", "3"], "either --table"),
    ],
)
def test_requests(fails, experiment, tmp_path, arguments, expected):
    assert expected in fails("generate", experiment / "run/model", "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()  # the corrected command finds it empty


def test_asking_beyond_what_training_saw_is_a_warning(experiment, tmp_path, capsys):
    out = tmp_path / "out"
    command_line("generate", experiment / "run/model", "--age", 110, "--out", out, "--steps", 1)
    assert "extrapolation" in capsys.readouterr().out
    assert list(out.rglob("*.nii.gz"))


def test_tables_of_requests(fails, experiment, tmp_path):
    model, table = experiment / "run/model", tmp_path / "requests.csv"

    def message(content: str) -> str:
        table.write_text(content)
        return fails("generate", model, "--table", table, "--out", tmp_path / "out")

    assert "unknown covariate 'weight'" in message("age,weight\n70,80\n")
    assert "is not a number" in message("age\nseventy\n")
    assert "row 3: sex: 'X' is not one of" in message("age,sex\n70,F\n60,M\n50,X\n")
    assert "no rows" in message("age,sex\n")
    assert "requests.txt" in fails("generate", model, "--table", tmp_path / "requests.txt", "--out", tmp_path / "out")


def test_an_output_folder_with_something_in_it(fails, experiment, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    message = fails("generate", experiment / "run/model", "--age", 50, "--out", tmp_path)
    assert "empty" in message and (tmp_path / "mine.txt").read_text() == "precious"
    assert "empty" in fails("phantoms", tmp_path, "--subjects", 2)


def test_models(fails, experiment, tmp_path):
    out = tmp_path / "out"
    assert "holds no model" in fails("generate", tmp_path / "nowhere", "--out", out)
    for file, content, expected in (
        ("pipeline.json", b"{", "damaged"),
        ("unet/model.safetensors", b"x" * 100, "damaged"),
        ("unet/config.json", b"[]", "damaged"),
        ("autoencoder/model.safetensors", None, "missing"),
    ):
        model = tmp_path / file.replace("/", "-")
        shutil.copytree(experiment / "run/model", model)
        (model / file).unlink()
        if content is not None:
            (model / file).write_bytes(content)
        assert expected in fails("generate", model, "--out", out)


def test_evaluation_data(fails, experiment, tmp_path):
    model = experiment / "run/model"
    assert "no data in" in fails("evaluate", model, "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert "cannot be imported" in fails("evaluate", model, "--data", experiment / "data", "--measure", "no.such:thing")


def test_commands_in_the_wrong_order(config, fails, tmp_path, train_here):
    shutil.rmtree(tmp_path / "run")
    assert "run `ldm3d prepare`" in fails("encode", config)
    command_line("prepare", config, "--workers", 1)
    assert "ldm3d.training.autoencoder" in fails("encode", config)
    with pytest.raises(InputError, match=r"ldm3d\.training\.autoencoder"):
        train_here("diffusion", config)


def test_a_stale_latent_cache_says_what_changed(config, train_here):
    command_line("prepare", config, "--set", "data.percentiles=[0, 98]", "--workers", 1)
    shutil.rmtree(config.parent / "run/diffusion-training")
    with pytest.raises(InputError, match=r"stale: the prepared data changed(.|\n)*ldm3d encode"):
        train_here("diffusion", config, "data.percentiles=[0, 98]")


def test_a_checkpoint_of_another_configuration(config):
    # Without accelerate launch, which turns any failure into 1
    command = [sys.executable, "-m", "ldm3d.training.autoencoder", config, "--set", "network.latent_channels=5"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "autoencoder.network.latent_channels: 3 -> 5" in done.stderr


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole(config):
    """A limit on the size of files stands for the full disk: both end in an error from write()."""
    run = config.parent / "run/autoencoder-training"
    before = (run / "checkpoints/step-00000008/tensors.safetensors").read_bytes()
    program = (
        LIMIT_FILE_SIZE + "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); import runpy, sys; "
        f"sys.argv = ['x', {str(config)!r}, '--set', 'training.steps=12']; "
        "runpy.run_module('ldm3d.training.autoencoder', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "free some space" in done.stderr and "Traceback" not in done.stderr
    assert (run / "checkpoints/step-00000008/tensors.safetensors").read_bytes() == before
    launch("ldm3d.training.autoencoder", config, "--set", "training.steps=12")  # goes on once there is room
