"""Every config in configs/ trains: two steps of both stages with small networks and volumes, and all settings as they are.

Sizes and lengths are cut (grid, widths, scans, batch, steps, workers), and nothing else: precision, optimiser, averages,
schedule, losses and validation are those of the file. All of them prepare the same scans, whose registration is computed once.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import command_line

from ldm3d import figures
from ldm3d.base_model import first_unet, take_autoencoder
from ldm3d.conditions import ImageChannels
from ldm3d.config.read import load_config
from ldm3d.config.recipe import over_recipe
from ldm3d.data import registration
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.pipeline import Pipeline
from ldm3d.training.metrics import read_metrics

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
REGISTERED: dict = {}
LATENT = (9, 10, 9)  # in three levels no side is 2: there oneDNN's bfloat16 gradient of a convolution is at times NaN


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    write_dataset(folder, subjects=6, shape=(24, 28, 24), seed=3, workers=1)
    return folder


@pytest.fixture(autouse=True)
def registered_once(monkeypatch):
    def known(volume, affine, config, stripped):
        key = volume.tobytes(), affine.tobytes(), config.model_dump_json(), stripped
        if key not in REGISTERED:
            REGISTERED[key] = register(volume, affine, config, stripped)
        return REGISTERED[key]

    register = registration.register
    monkeypatch.setattr(registration, "register", known)


def cut(settings: dict, data: Path, output: Path) -> dict:
    factor = settings["autoencoder"]["network"]["downsampling"]
    settings["output"] = str(output)
    settings["data"]["bids"] = str(data)
    settings["data"]["grid"] = {"shape": [factor * side for side in LATENT], "spacing_mm": 20 / factor}
    settings["autoencoder"]["linear_path_steps"] = settings["generation"]["steps"] = 2
    for stage, width in (("autoencoder", 8), ("diffusion", 16)):
        network, training = settings[stage]["network"], settings[stage]["training"]
        network["channels"] = [width] * len(network["channels"])
        training |= {"steps": 2, "batch_size": 2 * training.get("accumulation", 1)}
        training["workers"] = min(1, training.get("workers", 0))  # each takes seconds to start
    settings["diffusion"]["network"]["head_channels"] = 16
    return settings


def test_there_are_configs():
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_trains_as_shipped(path, phantoms, tmp_path, train_here, monkeypatch):
    for picture in ("mosaic", "curves", "save"):  # what a run draws takes longer than its two steps
        monkeypatch.setattr(figures, picture, lambda *_, **__: None)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(cut(over_recipe(yaml.safe_load(path.read_text())), phantoms, tmp_path)))
    command_line("prepare", config, "--workers", 1)
    train_here("autoencoder", config)
    command_line("encode", config)
    train_here("diffusion", config)
    for stage in ("autoencoder", "diffusion"):
        (*_, row) = read_metrics(tmp_path / f"{stage}-training/metrics.jsonl")
        assert row["step"] == 2 and row["skipped_steps"] == 0 and row["loss"] > 0 and row["validation_loss"] > 0
    assert (tmp_path / "model").is_dir()


def test_channels_at_their_scales_from_training_to_a_loaded_model(phantoms, tmp_path, train_here, monkeypatch):
    """The scales that stage 2 measures are those of the model folder, and volumes are drawn with them."""
    for picture in ("mosaic", "curves", "save"):
        monkeypatch.setattr(figures, picture, lambda *_, **__: None)
    settings = cut(yaml.safe_load(CONFIGS[0].with_name("toy.yaml").read_text()), phantoms, tmp_path)
    settings["autoencoder"]["latent_scaling"], settings["diffusion"]["loss_weight"] = "voxels", "noise"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command_line("prepare", config, "--workers", 1)
    train_here("autoencoder", config)
    command_line("encode", config)
    train_here("diffusion", config)
    pipeline = Pipeline.from_pretrained(tmp_path / "model", "cpu")
    scales = torch.tensor(pipeline.scales)
    assert len(scales) == settings["autoencoder"]["network"]["latent_channels"] and scales.max() > 1.5 * scales.min()
    spread = torch.from_numpy(np.load(tmp_path / "latents/moments.npy")).chunk(2, dim=1)[0]
    spread = pipeline.autoencoder.normalise(spread).std(dim=(0, 2, 3, 4))
    torch.testing.assert_close(spread, scales, rtol=0.2, atol=0)  # of five subjects, not all of them trained on
    (volume,) = pipeline(1, steps=2).images
    assert volume.shape == pipeline.grid.shape and np.isfinite(volume.get_fdata()).all()

    settings["diffusion"]["target"] = "noise"
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        command_line("prepare", config)


CONDITIONED = sorted((Path(__file__).parents[1] / "configs/conditions").glob("*.yaml"))


@pytest.mark.parametrize("path", CONDITIONED, ids=lambda path: path.stem)
def test_a_shipped_config_with_images_fits_the_model_it_starts_from(path, tmp_path):
    config = load_config(path, [f"output={tmp_path}"])
    if config.diffusion.init_from is None:  # it is of label maps, which no shipped autoencoder knows
        assert config.made_labels and config.autoencoder_arguments["in_channels"] == len(config.made_labels.groups)
        return
    assert take_autoencoder(config)
    channels = ImageChannels(config.given_conditions, LatentSpace.from_pretrained(config.autoencoder_folder))
    unet, schema, _ = first_unet(config, channels.count)
    assert unet.image_channels == channels.count > 0 and len(schema) == len(config.covariates)
