"""A training that starts from a model with more covariates than its own data have: the others stay, and are left open."""

import shutil

import pytest
import torch
import yaml
from conftest import command_line, tiny_settings
from in_process import train

from ldm3d.account import account_of, read_account, write_account
from ldm3d.base_model import first_schema
from ldm3d.config.read import load_config
from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.errors import InputError
from ldm3d.pipeline import Pipeline
from ldm3d.training.diffusion import DiffusionTask


@pytest.fixture(scope="module")
def fewer(experiment, tmp_path_factory):
    """A config with sex and age, in this order, that starts from a model of age, sex and ventricles; trained for a step."""
    folder = tmp_path_factory.mktemp("fewer")
    shutil.copytree(experiment / "data", folder / "data")
    table = folder / "data/participants.tsv"
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    kept = [rows[0].index(name) for name in ("participant_id", "age", "sex")]
    table.write_text("\n".join("\t".join(row[i] for i in kept) for row in rows) + "\n")
    settings = tiny_settings(folder)
    settings["covariates"] = [settings["covariates"][1], settings["covariates"][0]]
    settings["diffusion"]["init_from"] = str(experiment / "run/model")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    command_line("prepare", folder / "config.yaml", "--workers", 1)
    command_line("encode", folder / "config.yaml")
    return folder


def test_the_others_are_left_open_in_training_and_can_be_asked_for(experiment, fewer, monkeypatch):
    contexts = []
    monkeypatch.setattr(DiffusionTask, "score", lambda self, average, step: contexts.append(self.contexts) or {})
    train("diffusion", fewer / "config.yaml", "training.steps=2", "training.learning_rate=1e-9")
    base, tuned = (Pipeline.from_pretrained(folder / "run/model", "cpu", torch.float32) for folder in (experiment, fewer))
    assert tuned.schema.names == base.schema.names == ["age", "sex", "ventricular_volume_ml"]
    assert contexts[0][:, :2, 1].all() and not contexts[0][:, 2].any()
    ages = base.schema.encode([{"age": 50}])[0, 0, 0]
    assert tuned.schema.encode([{"age": 50}])[0, 0, 0] == ages  # normalised as the network has learned them
    assert tuned.schema["ventricular_volume_ml"].seen == base.schema["ventricular_volume_ml"].seen
    z, time = torch.randn(1, 3, 6, 7, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    for asked in ({"age": 50, "sex": "F"}, {"ventricular_volume_ml": 30}):
        context = base.schema.encode([asked])
        with torch.no_grad():
            torch.testing.assert_close(tuned.unet(z, time, context), base.unet(z, time, context), rtol=0, atol=1e-4)


def test_the_model_is_evaluated_on_data_without_them(fewer, tmp_path, capsys):
    train("diffusion", fewer / "config.yaml", "training.steps=2", "training.learning_rate=1e-9")
    options = "--num", 3, "--no-classifier", "--steps", 1
    command_line("evaluate", fewer / "run/model", "--data", fewer / "data", "--out", tmp_path / "evaluation", *options)
    assert "page written" in capsys.readouterr().out


@pytest.mark.parametrize("before, now, found", [((), ("age",), 0.5), (("age",), (), 2.0), (("age",), ("age",), 0.5)])
def test_what_follows_from_others_does_so_as_the_config_says(before, now, found):
    """Or as in the model where the config says nothing. Of the model's people ventricles grow by 2 a year, of these by 0.5."""

    def fitted(follows, slope, ages):
        rows = [{"age": age, "ventricles": slope * age} for age in ages]
        covariates = Covariate("age", "continuous"), Covariate("ventricles", "continuous", follows=follows)
        return CovariateSchema(covariates).fit(rows), rows

    model, _ = fitted(before, 2.0, range(20, 80))
    own, rows = fitted(now, 0.5, range(50, 90))
    schema = first_schema(model, own, rows)
    assert [c.mean for c in schema] == [c.mean for c in model] and [c.seen for c in schema] == [c.seen for c in own]
    rule = schema["ventricles"]
    assert rule.follows == ("age",) and rule.following is not None
    older = [rule.following.moved(0.0, *(schema.numbers(("age",), {"age": age}) for age in (60, after))) for after in (60, 61)]
    assert older[1] - older[0] == pytest.approx(found, rel=0.05)


def test_its_account_tells_of_the_first_training_too(experiment, fewer):
    first, base = read_account(experiment / "run/model"), str(experiment / "run/model")
    config = load_config(fewer / "config.yaml", ["diffusion.training.steps=3", "autoencoder.training.steps=99"])
    account = account_of(config)
    assert account["started_with"] == {"autoencoder": True, "diffusion": True} and account["stages"]["diffusion"]["steps"] == 3
    assert account["earlier"] == [first["stages"]["diffusion"]] and first["earlier"] == []
    assert account["stages"]["autoencoder"] == first["stages"]["autoencoder"]  # it was not trained again
    assert base not in str(account)


def test_an_account_says_what_it_does_not_know(experiment, fewer, tmp_path):
    """A model without an account, and one whose own account tells of no earlier part."""
    shutil.copytree(experiment / "run/model", tmp_path / "model")
    config = load_config(fewer / "config.yaml", [f"diffusion.init_from={tmp_path / 'model'}"])
    first = read_account(tmp_path / "model")
    first["started_with"]["diffusion"] = True
    del first["earlier"]
    write_account(first, tmp_path / "model")
    assert account_of(config)["earlier"] == [None, first["stages"]["diffusion"]]
    (tmp_path / "model/training.json").unlink()
    assert account_of(config)["earlier"] == [None]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "thickness"}, "its covariates are age (years)"),
        ({"name": "age", "unit": "months"}, "age (months)"),
    ],
)
def test_one_that_the_model_has_not_is_refused(fewer, change, message):
    from ldm3d.base_model import first_unet

    settings = yaml.safe_load((fewer / "config.yaml").read_text())
    settings["covariates"][1] |= change
    (fewer / "other.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError) as error:
        first_unet(load_config(fewer / "other.yaml"), 0)
    assert message in str(error.value) and "the others are left open" in str(error.value)
