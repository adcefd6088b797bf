"""A model meets data with other folders and columns: what can be said of them, and what stays the model's."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import tiny_settings

from ldm3d.config.read import load_config
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.errors import InputError
from ldm3d.experiment import scans_by_use
from ldm3d.other_data import config_for

MODEL = Path("brains-4.5mm")


@pytest.fixture(scope="module")
def clinic(tmp_path_factory) -> Path:
    """Two toys whose table has an age under another name, sexes as numbers, and no volumes."""
    folder = tmp_path_factory.mktemp("clinic")
    write_dataset(folder, subjects=2, shape=(24, 28, 24), seed=3, workers=1)
    names = sorted(path.name for path in folder.glob("sub-*"))
    rows = [f"{name}\t{40 + i}\t{1 + i % 2}" for i, name in enumerate(names)]
    (folder / "participants.tsv").write_text("\n".join(["participant_id\tAgeAtScan\tGender", *rows]) + "\n")
    return folder


SETTINGS = (
    "covariates.age.column=AgeAtScan",
    "covariates.sex.column=Gender",
    "covariates.sex.categories={F: [2], M: [1]}",
    "covariates.ventricular_volume_ml.column=null",
    "covariates.brain_volume_ml.column=null",
    "covariates.source.column=null",
)


def test_other_columns_are_read_and_missing_ones_left_open(clinic, tmp_path):
    config, trained, held_out = scans_by_use(MODEL, clinic, tmp_path, experiment="none", overrides=SETTINGS)
    assert trained.empty and held_out["age"].tolist() == [40, 41]
    assert held_out["sex"].tolist() == ["M", "F"]
    assert held_out["ventricular_volume_ml"].isna().all() and held_out["source"].isna().all()
    assert config.data.grid.shape == (40, 48, 40)  # the model's


def test_without_them_the_message_says_how(clinic, tmp_path):
    with pytest.raises(InputError, match=r"no column 'age'(.|\n)*--set covariates.NAME.column=COLUMN"):
        scans_by_use(MODEL, clinic, tmp_path, experiment="none")


def own_config(tmp_path, **data):
    settings = tiny_settings(tmp_path)
    settings["data"] |= data
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return load_config(tmp_path / "config.yaml")


def given(config, tmp_path, *overrides, own=False):
    return config_for(config, tmp_path, tmp_path, tmp_path / "work", None, own, overrides)


@pytest.mark.parametrize(
    "override, said",
    [
        ("data.grid.shape=[8, 8, 8]", "data.grid cannot be set here; the model has its own"),
        ("data.bids=x", "give --data"),
        ("training.steps=3", "write data.KEY=VALUE, or covariates.NAME.column=COLUMN"),
        ("covariates.agee.column=a", "did you mean 'age'"),
        ("covariates.age.colum=a", "did you mean 'column'"),
        ("data.filtr={run: 1}", "filter"),
        ("data.filter={rum: 1}", "did you mean 'run'"),
        ("data.filter", "write --set key.subkey=value"),
    ],
)
def test_what_cannot_be_set(tmp_path, override, said):
    with pytest.raises(InputError) as error:
        given(own_config(tmp_path), tmp_path, override)
    assert said in str(error.value)


def test_settings_of_the_training_that_name_files_are_dropped_and_others_can_be_given(tmp_path):
    config = own_config(tmp_path, participants="mine.tsv", filter={"run": 1}, exclude=["01"], bias_correction="n4")
    found = given(config, tmp_path).data
    assert found.participants is None and found.exclude is None and found.filter == {"run": 1}
    assert found.bias_correction == "n4"  # what is done with scans is the model's
    found = given(
        config, tmp_path, "data.participants=theirs.csv", "data.filter={acq: mprage}", "data.bias_correction=null"
    ).data
    assert found.participants == Path("theirs.csv") and found.filter == {"acq": "mprage"} and found.bias_correction is None
    assert given(config, tmp_path, own=True).data.participants == tmp_path / "mine.tsv"


def test_a_command_that_a_file_brings_along_is_not_run(tmp_path):
    command = "evil {scan} {mask}"
    config = own_config(tmp_path, brain_extraction={"command": command})
    with pytest.raises(InputError, match="if you trust it, add --set"):
        given(config, tmp_path)
    assert (
        given(config, tmp_path, f"data.brain_extraction.command={json.dumps(command)}").data.brain_extraction.command
        == command
    )
    assert given(config, tmp_path, "data.brain_extraction=null").data.brain_extraction is None
    assert given(own_config(tmp_path, brain_extraction={"command": "bet"}), tmp_path).data.brain_extraction.command == "bet"
