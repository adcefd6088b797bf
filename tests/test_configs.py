"""Every config in configs/ trains: two steps of both stages with small networks and volumes, and all settings as they are."""

from pathlib import Path

import pytest
import yaml
from conftest import command_line

from ldm3d.data.phantoms import write_dataset
from ldm3d.training.metrics import read_metrics

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SHAPE = (24, 32, 24)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    write_dataset(folder, subjects=20, shape=SHAPE, seed=3, workers=1)
    return folder


def cut(settings: dict, data: Path, output: Path) -> dict:
    """The settings with sizes and lengths cut, and nothing else."""
    settings["output"] = str(output)
    settings["data"] |= {"bids": str(data), "grid": {"shape": list(SHAPE), "spacing_mm": 7}}
    settings["autoencoder"]["linear_path_steps"] = 2
    for stage, width in (("autoencoder", 8), ("diffusion", 16)):
        network, training = settings[stage]["network"], settings[stage]["training"]
        network["channels"] = [width] * len(network["channels"])
        training |= {"steps": 2, "batch_size": 2 * training.get("accumulation", 1)}
    settings["diffusion"]["network"]["head_channels"] = 16
    return settings


def test_there_are_configs():
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_trains_as_shipped(path, phantoms, tmp_path, train_here):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(cut(yaml.safe_load(path.read_text()), phantoms, tmp_path)))
    command_line("prepare", config, "--workers", 1)
    train_here("autoencoder", config)
    command_line("encode", config)
    train_here("diffusion", config)
    for stage in ("autoencoder", "diffusion"):
        (*_, row) = read_metrics(tmp_path / f"{stage}-training/metrics.jsonl")
        assert row["step"] == 2 and row["skipped_steps"] == 0 and row["loss"] > 0 and row["validation_loss"] > 0
    assert (tmp_path / "model").is_dir()
