"""Which scans a model has seen, by both stages; what its folder gives away; and what judging it leaves alone."""

import gzip
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import SHAPE, command_line, tiny_settings

from ldm3d.config.read import load_config
from ldm3d.data.keys import scan_of, volume_key
from ldm3d.data.nifti import read_volume, write_volume
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.data.preparing import prepare, read_scan_table
from ldm3d.errors import InputError
from ldm3d.experiment import EXPERIMENT, find_experiment, save_experiment, scans_by_use
from ldm3d.seen import RECORD, record_export, record_scans, seen_by


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Scans are prepared here: starting workers takes longer than 20 tiny scans."""
    monkeypatch.setattr("ldm3d.data.preparing.cores_each", lambda: 1)


# Identity of a scan


def test_a_scan_is_its_voxels(tmp_path):
    """What keeps a scan's identity, and what does not."""
    volume = np.random.default_rng(0).uniform(0, 100, (1, 5, 6, 7)).astype(np.float32)
    affine, settings = np.diag([2.0, 2, 2, 1]), {"version": 1}

    def scan(volume, affine=affine):
        return scan_of(volume_key(volume, affine, settings))

    first = scan(volume)
    moved = affine.copy()
    moved[:3, 3] = 5
    turned = affine @ [[-1, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert first == scan(volume, moved) == scan(volume[:, ::-1], turned)
    assert first == scan(volume.transpose(0, 2, 1, 3), affine[:, [1, 0, 2, 3]]) == scan(np.asfortranarray(volume))
    rounded = volume.copy()
    rounded[0, 0, 0, 0] = np.nextafter(rounded[0, 0, 0, 0], np.float32(200))
    assert len({first, scan(rounded), scan(volume[:, :-1]), scan(volume[:, ::-1]), scan(volume.reshape(1, 6, 5, 7))}) == 5
    # The whole key follows from where it lies and how it is prepared, too
    keys = {volume_key(volume, affine, settings), volume_key(volume, moved, settings), volume_key(volume, affine, {})}
    assert len(keys) == 3 and volume_key(volume, affine + 1e-6, settings) in keys


@pytest.fixture
def packed_anew(experiment, tmp_path):
    """The experiment's data with every file packed at another level, under another name of the folder."""
    shutil.copytree(experiment / "data", tmp_path / "again")
    for path in (tmp_path / "again").glob("sub-*/anat/*.nii.gz"):
        content = path.read_bytes()
        path.write_bytes(gzip.compress(gzip.decompress(content), 1, mtime=5))
        assert path.read_bytes() != content
    return tmp_path / "again"


def test_training_data_that_was_packed_anew_counts_as_trained_on(experiment, packed_anew, tmp_path):
    _, trained, held_out = scans_by_use(experiment / "run/model", packed_anew, tmp_path / "work")
    before = pd.read_csv(experiment / "run/prepared/scans.tsv", sep="\t", dtype=str)
    for split, found in (("train", trained), ("test", held_out)):
        assert sorted(found["subject"]) == sorted(before.loc[before["split"] == split, "subject"])


def test_data_that_was_packed_anew_is_not_prepared_anew(experiment, packed_anew, tmp_path):
    shutil.copytree(experiment / "run/prepared", tmp_path / "run/prepared")
    config = load_config(experiment / "config.yaml", [f"output={tmp_path / 'run'}", f"data.bids={packed_anew}"])
    assert prepare(config, workers=1).cached == 20
    assert list(read_scan_table(config)["key"]) == list(read_scan_table(load_config(experiment / "config.yaml"))["key"])


def test_own_data_that_was_changed_is_never_held_out(experiment, tmp_path):
    """Subjects are known by their labels, too, where the data is the model's own."""
    shutil.copytree(experiment / "run", tmp_path / "run", ignore=shutil.ignore_patterns("*-training", "latents"))
    shutil.copytree(experiment / "data", tmp_path / "data")
    values = json.loads((tmp_path / "run" / EXPERIMENT).read_text())
    values["config"]["data"]["bids"] = "data"
    (tmp_path / "run" / EXPERIMENT).write_text(json.dumps(values | {"base": str(tmp_path)}))
    for path in (tmp_path / "data").glob("sub-*/anat/*.nii.gz"):
        volume, affine = read_volume(path)
        write_volume(path, volume + np.float32(1), affine)
    shutil.rmtree(tmp_path / "run/prepared")
    with pytest.warns(UserWarning, match="15 subjects .* their scans were changed since the training"):
        _, trained, held_out = scans_by_use(tmp_path / "run/model", tmp_path / "data", tmp_path / "work")
    assert trained.empty and len(held_out) == 5
    shutil.move(tmp_path / "data", tmp_path / "others")
    with pytest.warns(UserWarning, match="if they are the same people, processed otherwise"):
        _, trained, held_out = scans_by_use(tmp_path / "run/model", tmp_path / "others", tmp_path / "work")
    assert trained.empty and len(held_out) == 20


# What both stages have seen


def table(**splits) -> pd.DataFrame:
    rows = [(f"{name:0>20}-00000000", name, split) for name, split in splits.items()]
    return pd.DataFrame(rows, columns=["key", "subject", "split"])


def test_a_run_goes_on_only_with_the_scans_it_began_with(tmp_path):
    first = table(a="train", b="train", c="validation", d="test")
    assert record_scans(tmp_path, first, go_on=False, begun=False) == ""
    assert record_scans(tmp_path, first, go_on=False, begun=True) == ""
    other = table(a="train", b="test", c="train", d="test", e="train")
    with pytest.raises(InputError) as error:
        record_scans(tmp_path, other, go_on=False, begun=True)
    for part in ("1 new (sub-e)", "1 no longer in training or validation (sub-b)", "1 in another split (sub-c)", "go-on"):
        assert part in str(error.value)
    assert "goes on with other scans" in record_scans(tmp_path, other, go_on=True, begun=True)
    assert record_scans(tmp_path, other, go_on=False, begun=True) == ""
    record_export(tmp_path, "abc")
    seen = seen_by(tmp_path)
    assert {scan.lstrip("0") for scan in seen.train} == {"a", "b", "c", "e"} and not seen.validation
    assert seen.subjects == {"a", "b", "c", "e"} and seen.network == "abc"
    with pytest.raises(InputError, match="the same ones, prepared with other settings"):
        record_scans(tmp_path, other.assign(key=[key[:-1] + "1" for key in other["key"]]), go_on=False, begun=True)


def test_a_run_of_before_takes_today_s_scans_and_says_so(tmp_path):
    assert "did not record its scans" in record_scans(tmp_path, table(a="train"), go_on=False, begun=True)
    assert seen_by(tmp_path).subjects == {"a"}
    (tmp_path / RECORD).write_text('{"now": {"a": 1}, "before": {}}')
    with pytest.raises(InputError, match=r"scans.json is damaged"):
        record_scans(tmp_path, table(a="train"), go_on=False, begun=True)


@pytest.fixture
def own(experiment, tmp_path) -> Path:
    """The experiment, copied with its runs; its config takes settings."""
    shutil.copytree(experiment / "run", tmp_path / "run")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_settings(experiment) | {"output": str(tmp_path / "run")}))
    return tmp_path


def test_a_changed_split_reaches_the_autoencoder(own, experiment, train_here, capsys):
    """Stage 1 refuses it; on purpose it goes on, and subjects that either stage has seen are not held out afterwards."""
    config = own / "config.yaml"
    before = read_scan_table(load_config(config)).set_index("subject")["split"]
    changed = "data.splits.seed=1"
    prepare(load_config(config, [changed]), workers=1)
    with pytest.raises(InputError, match=r"has seen other scans: \d+ new \(sub-.*changed_data=go-on"):
        train_here("autoencoder", config, changed, "training.steps=8")
    train_here("autoencoder", config, changed, "training.steps=9", "autoencoder.changed_data=go-on")
    assert "goes on with other scans" in capsys.readouterr().out
    command_line("encode", config, "--set", changed)
    shutil.rmtree(own / "run/diffusion-training")
    train_here("diffusion", config, changed, "training.steps=1")
    after = read_scan_table(load_config(config, [changed])).set_index("subject")["split"]
    _, trained, held_out = scans_by_use(own / "run/model", experiment / "data", own / "work")
    by_either = {subject for splits in (before, after) for subject in splits.index[splits != "test"]}
    assert set(held_out["subject"]) == set(after.index) - by_either
    assert set(held_out["subject"]) < set(after.index[after == "test"]), "a test subject of stage 2 trained stage 1"
    assert set(trained["subject"]) == {subject for splits in (before, after) for subject in splits.index[splits == "train"]}


def test_an_autoencoder_of_elsewhere_is_said_to_be_unknown(own, experiment):
    shutil.rmtree(own / "run/autoencoder-training")
    save_experiment(load_config(own / "config.yaml"), own / "run/model")
    with pytest.warns(UserWarning, match="does not know which scans the autoencoder was trained on"):
        scans_by_use(own / "run/model", experiment / "data", own / "work")


def test_splits_of_an_older_experiment_stay(own):
    """Whatever rule made them; only data.splits, or deleting the table, splits anew."""
    path, config = own / "run/prepared/splits.tsv", load_config(own / "config.yaml")
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    turned = {"train": "test", "test": "train", "validation": "validation", "split": "split"}
    path.write_text("".join(f"{subject}\t{turned[split]}\n" for subject, split in rows))
    settings = json.loads((own / "run/prepared/settings.json").read_text())
    (own / "run/prepared/settings.json").write_text(json.dumps(settings | {"version": 1}))
    with pytest.raises(InputError, match="was prepared by another version of ldm3d; run `ldm3d prepare`"):
        read_scan_table(config)
    kept = prepare(config, workers=1).table.set_index("subject")["split"]
    assert kept.to_dict() == {subject: turned[split] for subject, split in rows[1:]}
    path.unlink()
    anew = prepare(config, workers=1).table.set_index("subject")["split"]
    assert anew.to_dict() == dict(rows[1:])


# What a model folder gives away, and what judging leaves alone


def test_a_model_folder_names_no_subject(tmp_path, train_here, monkeypatch):
    """No file of it holds a scan's key, a subject's label, a local path or a column's name."""
    write_dataset(tmp_path / "data", subjects=6, shape=SHAPE, seed=5, workers=1)
    table = pd.read_csv(tmp_path / "data/participants.tsv", sep="\t").rename(columns={"age": "AgeAtSecretVisit"})
    table.to_csv(tmp_path / "data/participants.tsv", sep="\t", index=False)
    settings = tiny_settings(tmp_path)
    settings["covariates"][0]["column"] = "AgeAtSecretVisit"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command_line("prepare", tmp_path / "config.yaml", "--workers", 1)
    for stage in ("autoencoder", "diffusion"):
        if stage == "diffusion":
            command_line("encode", tmp_path / "config.yaml")
        train_here(stage, tmp_path / "config.yaml", "training.steps=1")
    scans = read_scan_table(load_config(tmp_path / "config.yaml"))
    secrets = {"AgeAtSecretVisit", str(tmp_path), tmp_path.name, "run/", *map(scan_of, scans["key"])}
    secrets |= {f"{quote}{subject}{quote}" for subject in scans["subject"] for quote in ('"', "-", "/")}
    run = (tmp_path / "run" / EXPERIMENT).read_text()
    assert all(secret in run for secret in ("AgeAtSecretVisit", str(tmp_path), scan_of(scans["key"][0]))), "the test sees them"
    files = [path for path in (tmp_path / "run/model").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == sorted(
        ["pipeline.json", "methods.md", "references.bib", "training.json", *["config.json", "model.safetensors"] * 2]
    )
    for path in files:
        held = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in held], path


def test_a_model_alone_says_how_its_scans_were_prepared(experiment, tmp_path):
    shutil.copytree(experiment / "run/model", tmp_path / "shared")
    description = json.loads((tmp_path / "shared/pipeline.json").read_text())
    description["preparation"] = {"percentiles": [1, 99], "registration": {"to": "mni152", "kind": "affine"}}
    (tmp_path / "shared/pipeline.json").write_text(json.dumps(description))
    data = find_experiment(tmp_path / "shared", "none").config.data
    assert data.percentiles == (1, 99) and data.registration.kind == "affine"


def test_a_model_without_its_experiment_says_what_cannot_be_told(experiment, tmp_path, fails):
    shutil.copytree(experiment / "run/model", tmp_path / "shared")
    asked = ["evaluate", tmp_path / "shared", "--data", experiment / "data", "--num", 3, "--out", tmp_path / "out"]
    message = fails(*asked)
    assert "nothing says which scans" in message and "--experiment FILE" in message and "--experiment none" in message
    given = scans_by_use(tmp_path / "shared", experiment / "data", tmp_path, experiment=experiment / "run" / EXPERIMENT)
    pd.testing.assert_frame_equal(given[2], scans_by_use(experiment / "run/model", experiment / "data", tmp_path)[2])
    _, trained, held_out = scans_by_use(tmp_path / "shared", experiment / "data", tmp_path / "work", experiment="none")
    assert trained.empty and len(held_out) == 20
    values = json.loads((experiment / "run" / EXPERIMENT).read_text())
    for change, message in (({"model": "another"}, "is of model 'another'"), ({"format": 9}, "another version of ldm3d")):
        (tmp_path / "other.json").write_text(json.dumps(values | change))
        with pytest.raises(InputError, match=message):
            find_experiment(tmp_path / "shared", tmp_path / "other.json")
    (tmp_path / EXPERIMENT).write_text(json.dumps(values | {"model": "another"}))  # another model's, beside it
    with pytest.raises(InputError, match="nothing says which scans"):
        find_experiment(tmp_path / "shared")


def test_an_old_model_folder_still_works_and_is_warned_of(experiment, tmp_path, packed_anew):
    """Scans by the bytes of their files, in the model folder; where none of its own files is known, nothing is judged."""
    from ldm3d.data.keys import file_key, settings_of
    from ldm3d.geometry import Grid

    shutil.copytree(experiment / "run/model", tmp_path / "model")
    scans = read_scan_table(load_config(experiment / "config.yaml"))
    values = json.loads((experiment / "run" / EXPERIMENT).read_text())
    before = settings_of(Grid.centred(SHAPE, (7.5, 7.5, 7.5)), (0.0, 99.8), 1)
    names = {split: [file_key(Path(path), before) for path in rows["path"]] for split, rows in scans.groupby("split")}
    old = {"config": values["config"], "seen": names["train"] + names["validation"], "validation": names["validation"]}
    (tmp_path / "model" / EXPERIMENT).write_text(json.dumps(old))
    with pytest.warns(UserWarning) as said:
        _, trained, held_out = scans_by_use(tmp_path / "model", experiment / "data", tmp_path / "work")
    assert set(trained["split"]) == {"train"} and set(held_out["split"]) == {"test"}
    assert "before you publish the model folder" in str(said[0].message) and "bytes of their files" in str(said[1].message)
    old["config"]["data"]["bids"] = str(packed_anew)
    (tmp_path / "model" / EXPERIMENT).write_text(json.dumps(old))
    with warnings.catch_warnings(), pytest.raises(InputError, match="none of its 20 files is unchanged"):
        warnings.simplefilter("ignore")
        scans_by_use(tmp_path / "model", packed_anew, tmp_path / "work")


def test_judging_leaves_the_experiment_s_tables_alone(experiment, tmp_path, monkeypatch):
    """Also from another directory, and where participants.tsv was changed since."""
    shutil.copytree(experiment / "data", tmp_path / "data")
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            tiny_settings(tmp_path) | {"output": "run", "data": {**tiny_settings(tmp_path)["data"], "bids": "data"}}
        )
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config("config.yaml")
    prepare(config, workers=1)
    shutil.copytree(experiment / "run/model", "run/model")
    shutil.copytree(experiment / "run/autoencoder", "run/autoencoder")
    save_experiment(config, Path("run/model"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("run/prepared").iterdir() if path.is_file()}
    people = tmp_path / "data/participants.tsv"
    people.write_text("".join(people.read_text().splitlines(keepends=True)[:-1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the autoencoder, which this run did not train
        first = scans_by_use(Path("run/model"), Path("data"), tmp_path / "work")
        monkeypatch.chdir(tmp_path / "elsewhere")
        for data in ("../data", tmp_path / "data"):
            again = scans_by_use(Path("../run/model"), Path(data), tmp_path / "work")
            for one, two in zip(first[1:], again[1:]):
                pd.testing.assert_frame_equal(one, two)
            assert again[0].prepared_folder == (tmp_path / "run/prepared").resolve()
    assert not (tmp_path / "work").exists() and not os.listdir(".")
    monkeypatch.chdir(tmp_path)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}


def test_likelihood_prepares_under_its_out(experiment, tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", subjects=2, shape=SHAPE, seed=9, workers=1)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "deep/found.tsv"
    arguments = ["--data", tmp_path / "data", "--out", out, "--times", 2, "--method", "bound"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people with the labels of the model's own
        command_line("likelihood", experiment / "run/model", *arguments)
    assert out.is_file() and (tmp_path / "deep/found-work/prepared/scans.tsv").is_file()
    assert sorted(os.listdir(tmp_path)) == ["data", "deep"]
