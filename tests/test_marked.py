"""Held-out scans that are synthetic themselves are not called real."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ldm3d.covariates import Covariate
from ldm3d.data.marked import are_synthetic, is_marked
from ldm3d.data.nifti import write_volume
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.report.pictures import held_out
from ldm3d.report.write import _own


def scan(folder, description=""):
    folder.mkdir(parents=True, exist_ok=True)
    write_volume(folder / "sub-1_T1w.nii.gz", np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2), np.eye(4), description)
    return folder / "sub-1_T1w.nii.gz"


def test_phantoms_mark_themselves(tmp_path):
    write_dataset(tmp_path / "toys", 1, (16, 16, 16), workers=1)
    (phantom,) = (tmp_path / "toys").glob("sub-*/anat/*_T1w.nii.gz")
    assert is_marked(phantom)
    (tmp_path / "toys/dataset_description.json").unlink()
    assert is_marked(phantom)  # by its header


@pytest.mark.parametrize(
    "name, synthetic", [("Rendered T1w brains", True), ("A study of rendering, surrendered", False), ("", False)]
)
def test_a_dataset_says_what_it_is(tmp_path, name, synthetic):
    path = scan(tmp_path / "data/sub-1/anat")
    (tmp_path / "data/dataset_description.json").write_text(json.dumps({"Name": name}))
    assert is_marked(path) is synthetic


def test_a_header_a_sidecar_and_a_category_say_so_too(tmp_path):
    real, marked, beside = (scan(tmp_path / name, text) for name, text in (("a", "TE=3"), ("b", "SYNTHETIC ldm3d"), ("c", "")))
    (tmp_path / "c/sub-1_T1w.json").write_text('{"synthetic": true}')
    assert [is_marked(path) for path in (real, marked, beside, tmp_path / "gone.nii.gz")] == [False, True, True, False]
    source = Covariate("source", "categorical", categories=("rendered", "real"))
    table = pd.DataFrame({"path": [str(real)] * 3, "source": ["real", "rendered", None], "age": [1.0, 2.0, 3.0]})
    assert are_synthetic(table, [source, Covariate("age", "continuous", "years")]) == [False, True, False]


def test_pictures_and_the_page_say_it():
    some = SimpleNamespace(synthetic=[True, False], is_synthetic=lambda i: [True, False][i])
    assert [held_out(some, i) for i in (0, 1)] == ["HELD-OUT (itself synthetic)", "REAL (held-out)"]
    assert "1 of the 2 held-out volumes are themselves synthetic" in _own(some) and "among those" in _own(some)
    assert "for no real person" in _own(SimpleNamespace(synthetic=[True] * 3))
    assert _own(SimpleNamespace(synthetic=[False])) == _own(SimpleNamespace(synthetic=[])) == ""
