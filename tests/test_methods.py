"""Text for a paper: it says what the files say, cites what it names, and names nobody."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import SHAPE, command_line, tiny_settings

from ldm3d import methods
from ldm3d.account import account_of, read_account, write_account
from ldm3d.card import _data
from ldm3d.config.read import load_config
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.data.source import source_of
from ldm3d.description import Sampling
from ldm3d.diffusion.samplers import SAMPLERS
from ldm3d.methods import bibtex, methods_text
from ldm3d.seen import record_export


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A config with ten prepared toys from three sites."""
    folder = tmp_path_factory.mktemp("methods")
    write_dataset(folder / "data", subjects=10, shape=SHAPE, seed=3, workers=1)
    table = folder / "data/participants.tsv"
    rows = [row.split("\t") for row in table.read_text().splitlines()]
    sites = ["site", *("ABC"[i % 3] for i in range(10))]
    table.write_text("\n".join("\t".join([*row, site]) for row, site in zip(rows, sites)) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny_settings(folder)))
    command_line("prepare", folder / "config.yaml", "--workers", 1)
    return folder / "config.yaml"


def test_the_account_says_what_was_done_and_names_nobody(prepared, tmp_path):
    account = account_of(load_config(prepared))
    write_account(account, tmp_path)
    assert read_account(tmp_path) == json.loads(json.dumps(account))
    data = account["data"]
    assert sum(data["subjects"].values()) == sum(data["scans"].values()) == 10
    assert sum(data["sites"].values()) == data["subjects"]["train"] and set(data["sites"]) <= {"A", "B", "C"}
    assert sum(count for name, count in data["few"].items() if name.startswith("sex")) == data["subjects"]["train"]
    assert not re.search(r"sub-|\.nii|/", json.dumps(account))


def test_a_training_is_told_as_it_ran(experiment, tmp_path):
    """Settings of stage 1 may stand on its own command line alone: what its run recorded counts, if it is of this network."""
    config = load_config(experiment / "config.yaml", ["autoencoder.training.steps=99", "diffusion.training.steps=77"])
    stages = account_of(config)["stages"]
    assert (stages["autoencoder"]["steps"], stages["diffusion"]["steps"]) == (8, 77)
    output = tmp_path / "run"
    shutil.copytree(experiment / "run", output, ignore=shutil.ignore_patterns("checkpoints", "model", "latents"))
    record_export(output / "autoencoder-training", "the hash of another network")
    moved = load_config(experiment / "config.yaml", ["autoencoder.training.steps=99", f"output={output}"])
    assert account_of(moved)["stages"]["autoencoder"]["steps"] == 99


def test_the_text_has_the_figures_and_cites_what_it_names(prepared):
    account = account_of(load_config(prepared))
    text = methods_text(account, Sampling("unipc", 30, 2.0))
    subjects = account["data"]["subjects"]
    assert f"{subjects['train']} ({subjects['train']} scans) for training" in text
    assert "24 x 28 x 24 voxels of 7.5 x 7.5 x 7.5 mm centred on the foreground" in text
    assert "8 steps of 4 with Muon [@jordan2024]" in text and "UniPC [@zhao2023] in 30 steps" in text
    assert "classifier-free guidance 2 [@ho2022]" in text and "N4" not in text and "extracted" not in text
    assert (
        {*re.findall(r"@\w+\{(\w+),", bibtex(text, account))} == {*re.findall(r"@(\w+)", text)} >= {"rombach2022", "zhao2023"}
    )


def test_preparing_is_told_with_versions(prepared):
    account = account_of(load_config(prepared))
    account["prepared"] |= {
        "brain_extraction": {"command": "mri_synthstrip", "version": "1.8"},
        "bias_correction": {"method": "N4", "simpleitk": "2.5", "field": [0.8, 1.2]},
        "registration": {"to": "mni152", "kind": "rigid"},
        "registered_with": {"SimpleITK": "2.5"},
    }
    text = methods_text(account, Sampling())
    for part in (
        "extracted with mri_synthstrip [@hoopes2022] (version 1.8)",
        "N4 [@tustison2010] in SimpleITK 2.5",
        "registered to the MNI152 template [@fonov2011] (rigid, correlation) with SimpleITK 2.5",
    ):
        assert part in text


def test_every_key_that_can_be_cited_is_there_and_every_sampler_has_its_words():
    source = Path(methods.__file__).read_text()
    cited = {*re.findall(r"@(\w+\d{4}\w*)", source)}
    assert len(cited) > 20 and bibtex(" ".join(f"[@{key}]" for key in cited)).count("\n}") == len(cited)
    assert set(methods._SAMPLERS) == set(SAMPLERS)
    entries = methods._BIB.read_text("utf-8")
    assert {*re.findall(r"@\w+\{(\w+),", entries)} == cited  # none that is never cited
    for entry in entries.split("\n\n"):
        assert entry.count("{") == entry.count("}") and "author = {" in entry and "year = {" in entry and "title = {" in entry


def test_without_an_account_only_sampling_is_told(tmp_path):
    assert read_account(tmp_path) is None
    assert (
        methods_text(None, Sampling("ddim", 50))
        == "Volumes are sampled with DDIM [@song2021ddim] in 50 steps, without guidance.\n"
    )


def test_the_dataset_is_named_with_its_licence_and_how_it_is_cited(prepared, tmp_path):
    """In the text, in BibTeX and in the card, from what the dataset says of itself."""
    description = {
        "Name": "Rest with\neyes closed",
        "License": "CC0",
        "Authors": ["Doe J", "Roe {R}"],
        "DatasetDOI": "doi:10.18112/openneuro.ds000000.v1.0.5",
        "HowToAcknowledge": "Please cite Doe et al. 2021.",
        "ReferencesAndLinks": ["https://doi.org/10.1155/2021/0000000"],
    }
    (tmp_path / "dataset_description.json").write_text(json.dumps(description))
    account = account_of(load_config(prepared))
    account["data"]["source"] = source_of(tmp_path)
    text = methods_text(account, Sampling())
    assert (
        'The data of "Rest with eyes closed" [@dataset] (licence: CC0, https://doi.org/10.18112/openneuro.ds000000.v1.0.5)'
        in text
    )
    assert (
        "acknowledged so: Please cite Doe et al. 2021. It refers to: https://doi.org/10.1155" in text
        and " came from 3 sites: " in text
    )
    entry = bibtex(text, account)
    assert (
        "@misc{dataset,\n  title = {Rest with eyes closed},\n  author = {Doe J and Roe R}," in entry
        and "{Licence: CC0}" in entry
    )
    assert entry.count("{") == entry.count("}") and "@misc{dataset" not in bibtex(text)
    told = _data(account)
    for line in (
        "- Dataset: Rest with eyes closed",
        "- Licence: CC0",
        "- DOI: https://doi.org/10.18112/openneuro.ds000000.v1.0.5",
        "- To be acknowledged as: Please cite Doe et al. 2021.",
        "- References: https://doi.org/10.1155/2021/0000000",
        "Sites of the training subjects: ",
    ):
        assert line in told


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"Name": 3, "License": null, "Authors": {"a": 1}}', "\x00"])
def test_a_description_that_says_nothing_is_no_error(tmp_path, content):
    (tmp_path / "dataset_description.json").write_text(content)
    assert source_of(tmp_path) == {} == source_of(tmp_path / "nowhere") == source_of(None)
