"""`ldm3d measure`: a table of the prepared scans' volumes that the same config then joins as covariates."""

import numpy as np
import pandas as pd
import pytest
from conftest import command_line
from test_preprocess import AFFINE, dataset, head, scan_path  # noqa: F401 (a fixture)

from ldm3d.data.nifti import write_volume
from ldm3d.data.preparing import prepare, read_scan_table

pytestmark = [  # of phantoms
    pytest.mark.filterwarnings("ignore:.* the size of no human head"),
    pytest.mark.filterwarnings("ignore:.* is the same at all visits"),
]


def brightness(volume, spacing_mm):
    """Stands for a ruler."""
    return {"bright_ml": float((volume > 0).sum()) * np.prod(spacing_mm) / 1000, "nothing_ml": float("nan")}


def test_the_table_of_a_ruler_is_joined_again(dataset, tmp_path, capsys):  # noqa: F811
    config = dataset()
    prepare(config, workers=1)
    out = tmp_path / "tables/volumes.tsv"
    command_line("measure", tmp_path / "config.yaml", "--out", out, "--measure", "test_measure:brightness", "--workers", 1)
    assert "6 rows with bright_ml, nothing_ml written to" in (said := capsys.readouterr().out) and "6 of them have" in said
    table = pd.read_csv(out, sep="\t")
    assert list(table["participant_id"]) == [f"sub-0{i}" for i in (1, 1, 2, 3, 4, 5)]
    assert list(table["session_id"][:2]) == ["ses-a", "ses-b"] and table["session_id"][2:].isna().all()
    expected = (head() > 0).sum() * 8 / 1000
    np.testing.assert_allclose(table["bright_ml"], expected, atol=1e-3)

    text = (tmp_path / "config.yaml").read_text()
    text = text.replace("  grid:", f"  covariates_tables: [{out}]\n  grid:")
    text = text.replace("covariates:\n", "covariates:\n  - {name: bright_ml, kind: continuous, unit: ml}\n")
    (tmp_path / "config.yaml").write_text(text)
    again = dataset()
    assert prepare(again, workers=1).cached == 6
    np.testing.assert_allclose(read_scan_table(again)["bright_ml"], expected, atol=1e-3)


def test_label_maps_are_counted_on_their_own_voxels(dataset, tmp_path, capsys):  # noqa: F811
    config = dataset()
    prepare(config, workers=1)
    for i, (subject, session) in enumerate([("01", "a"), ("01", "b"), ("02", ""), ("03", ""), ("04", "")]):
        labels = np.zeros((1, 20, 20, 20), np.int16)
        labels[0, 2:4, 2:4, : i + 1], labels[0, 10:14, 10:14, 10:14], labels[0, 0, 0, 0] = 4, 43, 99
        stem = f"sub-{subject}" + (f"_ses-{session}" if session else "")
        write_volume(tmp_path / f"labels/{stem}_dseg.nii.gz", labels, np.diag([1.0, 2, 5, 1]))
    sums = "--volume", "left_ml=4", "--volume", "right_ml=43", "--total", "both_ml=left_ml+right_ml"
    arguments = "--out", tmp_path / "v.tsv", "--labels", tmp_path / "labels", *sums
    command_line("measure", tmp_path / "config.yaml", *arguments)
    said = capsys.readouterr().out
    assert "warning: 1 of 6 scans have no row, such as: " in said and "sub-05" in said
    table = pd.read_csv(tmp_path / "v.tsv", sep="\t")
    np.testing.assert_allclose(table["left_ml"], [0.04, 0.08, 0.12, 0.16, 0.2])
    np.testing.assert_allclose(table["both_ml"], table["left_ml"] + 0.64)


def test_bad_requests_are_one_message(dataset, tmp_path, fails):  # noqa: F811
    config = tmp_path / "config.yaml"
    assert "no prepared scans in" in fails("measure", config, "--out", tmp_path / "v.tsv")
    prepare(dataset(), workers=1)
    assert "must end in .tsv" in fails("measure", config, "--out", tmp_path / "v.csv")
    assert "goes with at least one --volume" in fails("measure", config, "--out", tmp_path / "v.tsv", "--labels", tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    asked = "--labels", empty, "--volume", "a_ml=4"
    assert "none of 6 scans has one label map" in fails("measure", config, "--out", tmp_path / "v.tsv", *asked)
    assert "no --volume names" in fails("measure", config, "--out", tmp_path / "v.tsv", *asked, "--total", "b_ml=a_ml+x_ml")
    assert not (tmp_path / "v.tsv").exists()
