"""The page of prepared scans: all of them, the oddest first, who is in which split, and lines that leave scans out."""

import re
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import SHAPE, command_line, tiny_settings

from ldm3d.config.data import CovariateConfig
from ldm3d.config.read import load_config
from ldm3d.config.yaml import parse_yaml
from ldm3d.covariates import CovariateSchema
from ldm3d.data import registration
from ldm3d.data.nifti import read_volume, write_volume
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.data.preparing import Prepared, load_look
from ldm3d.data.quality import MEASURES, look_at, write_look
from ldm3d.data.table_one import table_1
from ldm3d.data.tables import read_table
from ldm3d.report import preparation
from ldm3d.report.page import linked
from ldm3d.report.preparation import lines_of, write_preparation

SUBJECTS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "data", SUBJECTS, SHAPE, seed=3, workers=1)


@pytest.fixture
def config(data, tmp_path):
    """A config on a copy of the data, which may be damaged."""
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(tmp_path)))
    return path


def scan(config, number):
    return config.parent / f"data/sub-{number:04d}/anat/sub-{number:04d}_T1w.nii.gz"


def prepared(config, *settings) -> tuple[str, list[str]]:
    """The page, and the names of its pictures in their order."""
    command_line("prepare", config, "--workers", 1, *(word for each in settings for word in ("--set", each)))
    page = (config.parent / "run/prepared/report.html").read_text()
    return page, re.findall(r'alt="(sub-[^"]*)"', page)


def test_every_scan_is_shown_the_damaged_one_first(config, capsys):
    volume, affine = read_volume(scan(config, 5))
    volume[:, :, : volume.shape[2] // 2] = 0
    write_volume(scan(config, 5), volume, affine)
    scan(config, 7).write_bytes(b"not a scan")
    page, names = prepared(config)
    assert "look at every scan, the oddest first: " in capsys.readouterr().out
    assert len(names) == len(set(names)) == SUBJECTS - 1 and names[0] == "sub-0005" and "sub-0007" not in names
    assert "1 of 12 scans could not be prepared" in page and "cannot be read as NIfTI" in page
    assert "SYNTHETIC DATA" not in page and "http" not in page and page.count("<script") == 1
    found = read_table(config.parent / "run/prepared/quality.tsv")
    assert len(found) == SUBJECTS - 1 and set(MEASURES) < set(found)
    assert found.loc[found["oddness"].astype(float).idxmax(), "subject"] == "0005"


def test_lines_on_the_page_leave_the_scans_out(config, capsys):
    """What the page says, word for word, is what the config understands."""
    page, names = prepared(config)
    lines = re.search(r'<pre id="lines">(.*?)</pre>', page, re.DOTALL)[1].replace("&#34;", '"')
    exclude = parse_yaml(lines, "page")["data"]["exclude"]
    assert exclude == [name.removeprefix("sub-") for name in names[: len(exclude)]] and exclude
    settings = yaml.safe_load(config.read_text())
    settings["data"]["exclude"] = exclude
    config.write_text(yaml.safe_dump(settings))
    page, left = prepared(config)
    assert f"data.exclude leaves out {len(exclude)} of {SUBJECTS} scans" in capsys.readouterr().out
    assert sorted(left) == sorted(names[len(exclude) :])
    assert f'data-before="[&#34;{exclude[0]}&#34;' in page  # the next choice is added to these


def test_every_entry_on_the_page_names_its_scan_alone(config):
    """Of a subject with two sessions, too."""
    second = config.parent / "data/sub-0003/ses-b/anat/sub-0003_ses-b_T1w.nii.gz"
    second.parent.mkdir(parents=True)
    shutil.copy(scan(config, 4), second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page, names = prepared(config)
        entries = re.findall(r'type="checkbox" value="([^"]*)"', page)
        assert len(entries) == SUBJECTS + 1 and "sub-0003/ses-b/anat/sub-0003_ses-b_T1w.nii.gz" in entries
        entry = entries[names.index("sub-0003 ses-b")]
        _, left = prepared(config, f"data.exclude=[{entry}]")
    assert set(names) - set(left) == {"sub-0003 ses-b"}


def test_a_run_that_was_stopped_shows_everything_after_the_next(config, monkeypatch):
    real, count = registration.to_grid, []

    def stopped(*arguments):
        count.append(1)
        if len(count) > 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(registration, "to_grid", stopped)
    with pytest.raises(SystemExit):
        prepared(config)
    monkeypatch.undo()
    volumes = config.parent / "run/prepared/volumes"
    assert len(list(volumes.glob("*.npy"))) == 5
    next(volumes.glob("*.npz")).unlink()  # of an earlier version
    next(volumes.glob("*.npz")).write_bytes(b"damaged")
    page, names = prepared(config)
    assert len(set(names)) == SUBJECTS and "cannot be read" not in page


def test_fresh_and_cached_scans_are_measured_alike(config):
    first = prepared(config)
    values = (config.parent / "run/prepared/quality.tsv").read_text()
    for path in (config.parent / "run/prepared/volumes").glob("*.npz"):
        path.unlink()
    assert prepared(config)[1] == first[1] and (config.parent / "run/prepared/quality.tsv").read_text() == values


def test_a_volume_that_cannot_be_read_is_first_and_stops_nothing(config):
    prepared(config)
    volumes = config.parent / "run/prepared/volumes"
    key = read_table(config.parent / "run/prepared/scans.tsv").set_index("subject")["key"]["0004"]
    (volumes / f"{key}.npz").unlink()
    (volumes / f"{key}.npy").write_bytes(b"damaged")
    page, _ = prepared(config)
    assert re.search(r'value="0004"><b>sub-0004</b> <small>\w+</small><em>its prepared volume cannot be read', page)
    assert page.index('value="0004"') < page.index('value="0005"')


def test_sites_have_histograms_of_their_own(config):
    table = config.parent / "data/participants.tsv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{head}\tSite ID", *(f"{row}\t{'AB'[i % 2]}" for i, row in enumerate(rows))]) + "\n")
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        real = preparation.figures.profiles
        patch.setattr(preparation.figures, "profiles", lambda x, series, *a: drawn.update(series) or real(x, series, *a))
        page, _ = prepared(config)
    assert list(drawn) == ["A (6)", "B (6)"] and "by site" in page
    for density in drawn.values():
        assert density.sum() * 0.9 / len(density) == pytest.approx(1)


def test_a_table_that_no_covariate_needs_stops_nothing(config):
    """A row twice, which is an error where a covariate is read from it."""
    table = config.parent / "data/participants.tsv"
    table.write_text(table.read_text() + table.read_text().splitlines()[-1] + "\n")
    page, names = prepared(config, "covariates=[]")
    assert len(names) == SUBJECTS and "of all scans; the table has no column that names a site" in page


def test_table_1_of_known_people():
    table = pd.DataFrame(
        {
            "subject": ["a", "a", "b", "c"],
            "split": ["train", "train", "train", "test"],
            "age": [60.0, 64.0, np.nan, 30.0],
            "sex": pd.Series(["F", "F", "M", None], dtype=object),
        }
    )
    schema = load_schema([{"name": "age", "kind": "continuous", "unit": "years"}])
    found = table_1(table, schema, {"age": [0.0] * 4, "sex": ["F", "F", "M", None]})
    assert found["columns"] == ["", "all", "train", "test"]
    assert found["rows"] == [
        ["subjects", "3", "2", "1"],
        ["scans", "4", "3", "1"],
        ["age (years)", "51.3 ± 18.6\n30 to 64\n1 missing", "62.0 ± 2.8\n60 to 64\n1 missing", "30.0\n30 to 30"],
        ["sex (column of the table): F", "2 (50%)", "2 (67%)", "0 (0%)"],
        ["sex (column of the table): M", "1 (25%)", "1 (33%)", "0 (0%)"],
        ["sex (column of the table): missing", "1 (25%)", "0 (0%)", "1 (100%)"],
    ]


def load_schema(covariates):
    return CovariateSchema(tuple(CovariateConfig(**c).covariate() for c in covariates))


def test_names_in_tables_lead_to_the_pictures(config):
    """Whole names alone, of scans that are shown; what is cut off names a few scans, warnings name them within a text."""
    scan(config, 7).write_bytes(b"not a scan")
    page, names = prepared(config, "data.grid.shape=[16,16,8]")
    led = re.findall(r'<a href="#(scan-\d+)">(sub-\d+)</a>', page)
    assert {name for _, name in led} >= set(names[:1]) and len(led) > SUBJECTS
    for anchor, name in led:
        assert re.search(rf'id="{anchor}"><input type="checkbox" value="{name[4:]}"', page)
    assert "sub-0007</a>" not in page and "sub-0007" in page
    assert re.search(r"of their foreground|lose foreground", page) and re.search(r"</a>: [\d.]+ mm", page)


def test_links_take_the_longest_name_and_nothing_of_other_names():
    links = {"sub-1": "a", "sub-1 ses-2": "b", "sub-<3>": "c"}
    assert linked("sub-1 ses-2: 4 mm\nsub-1: 5", links) == '<a href="#b">sub-1 ses-2</a>: 4 mm\n<a href="#a">sub-1</a>: 5'
    assert linked("sub-10, my-sub-1 & sub-1-2", links) == "sub-10, my-sub-1 &amp; sub-1-2"
    assert linked("sub-<3>", links) == '<a href="#c">sub-&lt;3&gt;</a>'
    assert linked("<b>", links) == "&lt;b&gt;" and linked(3, {}) == 3


def test_lines_add_to_what_is_left_out_already():
    assert lines_of(("01",), ["02", "01"]) == 'data:\n  exclude: ["01", "02"]'
    assert lines_of("qc", ["02"]) == lines_of(None, ["02"]) == 'data:\n  exclude: ["02"]'
    assert parse_yaml(lines_of(None, ["07", "a b/'x'.nii", 'q"']), "x")["data"]["exclude"] == ["07", "a b/'x'.nii", 'q"']


def test_2000_scans_stay_below_30_mb(tmp_path, config):
    """A fifth of them, at 1 mm, with more noise than a picture of a scan has."""
    settings = load_config(config, [f"output={tmp_path / 'many'}"])
    volume = np.zeros((1, 160, 224, 160), np.float32)
    grid = np.indices(volume.shape[1:]) / np.array([80, 112, 80]).reshape(3, 1, 1, 1) - 1
    volume[0] = np.where((grid**2).sum(0) < 0.9, 0.5 + 0.3 * np.sin(20 * grid[0]) * np.cos(17 * grid[1]), 0)
    look = look_at(volume + 0.03 * np.random.default_rng(0).random(volume.shape), (1, 1, 1))
    rows = [{"subject": f"{i:05d}", "key": f"{i % 20:020x}", "split": "train", "age": 50.0, "sex": "F"} for i in range(400)]
    table = pd.DataFrame(rows).assign(session="", path=str(tmp_path / "data/x.nii.gz"), ventricular_volume_ml=30.0)
    (settings.prepared_folder / "volumes").mkdir(parents=True)
    for i in range(20):
        write_look(settings.prepared_folder / f"volumes/{i:020x}.npz", look | {"measures": look["measures"] * (1 + i / 100)})
    assert load_look(settings, f"{0:020x}")["picture"].shape[1] > 250
    told = [{"cut_mm": 0.0, "extent_mm": [150, 180, 150], "around_zero": False, "notes": []}] * len(table)
    page = write_preparation(settings, Prepared(table, told, [], 400, 0, table.iloc[:0].assign(reason=""), 1.0))
    assert page.read_text().count("<img") >= 400 and 1e6 < page.stat().st_size < 30e6 / 5
