"""Configs, models, runs and series that older versions wrote: see tests/older/README.md."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line

from ldm3d import Pipeline
from ldm3d.config.read import load_config
from ldm3d.data.preparing import read_scan_table
from ldm3d.data.tables import read_table
from ldm3d.errors import InputError
from ldm3d.experiment import scans_by_use
from ldm3d.training.metrics import read_metrics

OLDER = Path(__file__).parent / "older/569ac75"
MODELS = {"plain": "dfa8246940443df8", "vdm": "b6be157b2ad3b99e", "monai": "c499e01fdc558d05"}  # and their hashes
CONFIGS = json.loads((OLDER / "configs.json").read_text())


@pytest.fixture
def older(tmp_path, monkeypatch) -> Path:
    """A copy of the folder, which relative paths start from."""
    monkeypatch.setattr("ldm3d.data.preparing.cores_each", lambda: 1)  # scans are prepared in this process
    monkeypatch.chdir(shutil.copytree(OLDER, tmp_path / "older"))
    return Path.cwd()


def read_model(name: str) -> Pipeline:
    return Pipeline.from_pretrained(OLDER / name / "model", "cpu", torch.float32)


# Configs


def changed(before, now, key="") -> list[str]:
    """Keys of `before` that are missing in `now` or have another value there."""
    if isinstance(before, dict):
        return [each for name, value in before.items() for each in changed(value, (now or {}).get(name), f"{key}.{name}")]
    return [] if before == now else [key]


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_means_what_it_meant(path):
    now = load_config(OLDER / path).model_dump(mode="json")
    assert changed(CONFIGS[path], now) == []
    assert changed(CONFIGS[path] | {"seed": 1, "name": {"first": 1}}, now | {"name": {}}) == [".name.first", ".seed"]


# Models


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_numbers(name):
    """In float32, with room for the rounding of any CPU; what is asked moves latents a hundred times as far."""
    expected, pipeline = np.load(OLDER / "expected.npz"), read_model(name)
    assert pipeline.model_hash == MODELS[name]
    rows = pipeline.parse([{"age": 60, "sex": "F"}, {"ventricular_volume_ml": 30, "sex": "M"}, {}])
    for sampler in ("heun", "ddpm"):
        latents = pipeline.latents(rows, pipeline.sampling.replace(sampler=sampler, steps=3, seed=5), [0, 1, 2])
        np.testing.assert_allclose(latents, expected[f"{name}/{sampler}"], rtol=1e-3, atol=1e-3)
        open_instead = pipeline.latents(rows[2:], pipeline.sampling.replace(sampler=sampler, steps=3, seed=5), [0])
        assert (open_instead[0] - latents[0]).abs().max() > 0.1
    decoded = pipeline.decode(torch.from_numpy(expected[f"{name}/ddpm"]))
    np.testing.assert_allclose(decoded, expected[f"{name}/decoded"], rtol=1e-3, atol=1e-3)
    moments = pipeline.autoencoder.encode(torch.arange(6 * 8 * 6).reshape(1, 1, 6, 8, 6) / 288)
    np.testing.assert_allclose(moments, expected[f"{name}/moments"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_written_as_it_was_read(name, tmp_path):
    read_model(name).save_pretrained(tmp_path)
    for path in ("pipeline.json", "autoencoder/config.json", "unet/config.json"):
        before, now = (json.loads((folder / path).read_text()) for folder in (OLDER / name / "model", tmp_path))
        assert changed(before, now | {"versions": before.get("versions")}) == []


def test_what_a_model_has_seen_is_known(older):
    """By its own experiment.json, which is in the model folder, though today's keys of scans are others."""
    before = read_table(Path("plain/prepared/scans.tsv"))
    with pytest.warns(UserWarning, match="is of an older version"):
        config, trained, held_out = scans_by_use(Path("plain/model"), Path("scans"), Path("work"))
    assert set(trained["subject"]) == set(before.loc[before["split"] == "train", "subject"])
    assert set(held_out["subject"]) == set(before.loc[before["split"] == "test", "subject"])
    assert config.prepared_folder == Path("work/prepared")


# Series


def test_a_series_goes_on(older, monkeypatch):
    """With another version, PyTorch or CPU it would not: they are taken for those of then."""
    before = json.loads(Path("series/series.json").read_text())
    monkeypatch.setattr("ldm3d.__version__", before["ldm3d"])
    monkeypatch.setattr(Pipeline, "computing", before["computing"])
    finished = {path: path.read_bytes() for path in Path("series").rglob("*.nii.gz")}
    assert len(finished) == 2
    asked = ["--age", 72, "--sex", "F", "--num", 3, "--seed", 7, "--precision", "float32", "--device", "cpu"]
    command_line("generate", "plain/model", *asked, "--out", "series")
    assert len(list(Path("series").rglob("*.nii.gz"))) == 3 and Path("series/participants.tsv").is_file()
    assert all(path.read_bytes() == content for path, content in finished.items())
    assert json.loads(Path("series/series.json").read_text()) == before


# Runs


def test_stage_1_goes_on_with_scans_that_are_prepared_anew(older, train_here, capsys):
    with pytest.raises(InputError, match="was prepared by another version of ldm3d; run `ldm3d prepare`"):
        train_here("autoencoder", "plain.yaml")
    before = read_table(Path("plain/prepared/scans.tsv"))
    command_line("prepare", "plain.yaml", "--workers", 1)
    said = capsys.readouterr().out
    assert "all scans are prepared anew" in said and "Stage 1 goes on" in said
    now = read_scan_table(load_config("plain.yaml"))
    assert list(now["split"]) == list(before["split"])
    for old, new in zip(before["key"], now["key"]):
        one, other = (np.load(f"plain/prepared/volumes/{key}.npy") for key in (old, new))
        np.testing.assert_allclose(one[None], other, atol=2e-3)  # float16; volumes had no axis of channels
    first = read_metrics(Path("plain/autoencoder-training/metrics.jsonl"))
    train_here("autoencoder", "plain.yaml")
    rows = read_metrics(Path("plain/autoencoder-training/metrics.jsonl"))
    assert [row["step"] for row in rows] == [2, 4] and rows[0] == first[0]
    assert rows[1]["loss"] == pytest.approx(first[1]["loss"], rel=0.01)
    assert "begun by a version that did not record its scans" in capsys.readouterr().out


def test_latents_are_encoded_anew(older, train_here):
    shutil.copytree("plain/model/autoencoder", "plain/autoencoder")
    command_line("prepare", "plain.yaml", "--workers", 1)
    with pytest.raises(InputError, match=r"is stale: the prepared data changed .* run `ldm3d encode"):
        train_here("diffusion", "plain.yaml")
    before = np.load("plain/latents/moments.npy")
    command_line("encode", "plain.yaml", "--precision", "float32", "--device", "cpu")
    np.testing.assert_allclose(np.load("plain/latents/moments.npy"), before, rtol=1e-3, atol=1e-2)  # of float16 volumes
    train_here("diffusion", "plain.yaml", "training.steps=2", "training.validate_every=9")
    assert not Path("plain/model/experiment.json").exists() and Path("plain/experiment.json").is_file()
