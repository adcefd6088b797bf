"""A model without covariates is a model: it goes through every command."""

import json

import pandas as pd
import pytest
import torch
import yaml
from conftest import SHAPE, command_line, tiny_settings

from ldm3d.config.read import load_config
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.models.attention import Attention
from ldm3d.models.monai import MonaiUNet
from ldm3d.models.unet import UNet
from ldm3d.pipeline import Pipeline


@pytest.fixture
def trained(tmp_path, train_here):
    """The folder of an experiment whose config names no covariate, trained for two steps a stage."""
    write_dataset(tmp_path / "data", subjects=10, shape=SHAPE, seed=3, workers=1)
    settings = tiny_settings(tmp_path)
    del settings["covariates"]
    for stage in ("autoencoder", "diffusion"):
        settings[stage]["training"]["steps"] = 2
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command_line("prepare", config, "--workers", 1)
    train_here("autoencoder", config)
    command_line("encode", config)
    train_here("diffusion", config)
    return tmp_path


@pytest.mark.slow
def test_every_command(trained, tmp_path, capsys, fails):
    model, data = trained / "run/model", ["--data", trained / "data"]
    fast = ["--steps", 1]
    command_line("info", model)
    assert "nothing: a model without covariates" in capsys.readouterr().out

    command_line("generate", model, "--num", 3, *fast, "--out", tmp_path / "one")
    participants = pd.read_csv(tmp_path / "one/participants.tsv", sep="\t")
    assert list(participants.columns) == ["participant_id"] and len(participants) == 3
    (tmp_path / "requests.tsv").write_text("participant_id\nsub-a\nsub-b\nsub-c\n")
    command_line("generate", model, "--table", tmp_path / "requests.tsv", *fast, "--out", tmp_path / "other")
    name = "sub-syn0003/anat/sub-syn0003_desc-synthetic_T1w.nii.gz"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert "this model knows none" in fails("generate", model, "--age", 60, "--out", tmp_path / "asked")

    command_line("evaluate", model, *data, "--num", 3, *fast, "--downstream", "--audit", "--out", tmp_path / "page")
    metrics = json.loads((tmp_path / "page/metrics.json").read_text())
    lights = [goal["name"] for goal in metrics["goals"]]
    assert lights[0].startswith("Reconstruction") and any(name.startswith("Copies") for name in lights)
    assert not any("Requests" in name or "Gaps" in name for name in lights) and metrics["fairness"] == []
    page = (tmp_path / "page/report.html").read_text()
    assert "Copies of training subjects" in page
    assert "requested and measured" not in page and "covariates of training" not in page

    command_line("audit", model, *data, "--synthetic", tmp_path / "one", *fast, "--out", tmp_path / "audit")
    command_line("generate", model, "--num", 2, *fast, "--audit", tmp_path / "audit", "--out", tmp_path / "guarded")
    command_line("likelihood", model, *data, "--times", 2, "--method", "bound", "--out", tmp_path / "likelihood.tsv")
    assert pd.read_csv(tmp_path / "likelihood.tsv", sep="\t")["bound"].notna().all()
    assert "nothing to change or explain" in fails("explain", model, "--from", "age=60", "--to", "age=70")
    (tmp_path / "volumes.csv").write_text("scan,v\nsub-syn0001,5\n")
    compared = ["compare", tmp_path / "one", "--table", tmp_path / "volumes.csv", "--column", "ml=v"]
    assert "these volumes have no requests" in fails(*compared)


def test_guidance_asks_the_network_once(trained, monkeypatch):
    """Both answers would be the same."""
    pipeline, batches = Pipeline.from_pretrained(trained / "run/model", "cpu"), []
    forward = pipeline.unet.forward
    monkeypatch.setattr(pipeline.unet, "forward", lambda z, *rest: batches.append(len(z)) or forward(z, *rest))
    pipeline(1, steps=2, sampler="euler", guidance=3.0)
    assert batches == [pipeline.group_size] * 2


@pytest.mark.parametrize("covariates", [[], None])
def test_no_covariates_may_be_said_in_two_ways(tmp_path, covariates):
    settings = tiny_settings(tmp_path)
    settings["covariates"] = covariates
    if covariates is None:
        del settings["covariates"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert len(load_config(tmp_path / "config.yaml").schema()) == 0


@pytest.mark.parametrize("conditioning", ["ours", "tokens", "values"])
def test_networks_have_no_cross_attention_to_no_tokens(conditioning):
    """Attention over no keys is 0 / 0, and no kernel promises to take it: it is left out."""
    if conditioning == "ours":
        network = UNet(2, 2, [], (8, 16), 1, (True, True), head_channels=8, context_dim=8)
        attentions = [module for module in network.modules() if isinstance(module, Attention)]
        assert len(attentions) == 4 and not any("cross" in name for name, _ in network.named_modules())
    else:
        arguments = {"norm_num_groups": 4, "conditioning": conditioning, "concatenate": conditioning == "values"}
        network = MonaiUNet(2, 2, [], (8, 16), 1, (False, True), head_channels=(8,), **arguments)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 2, 4, 4, 4)
    out = network(x, torch.tensor([100.0, 900.0]), torch.zeros(2, 0, 2))
    assert out.shape == x.shape and torch.isfinite(out).all()
    assert torch.equal(out, network(x, torch.tensor([100.0, 900.0])))
