"""Bias fields: a known one is found, taken from the scan, recorded, and multiplied again on the way back."""

import sys

import nibabel as nib
import numpy as np
import pytest
import yaml
from conftest import command_line, tiny_settings

from ldm3d.config.read import load_config
from ldm3d.data.bias import estimate_field
from ldm3d.data.nifti import read_volume
from ldm3d.data.preparing import load_info, load_prepared, read_scan_table, restore_scan
from ldm3d.errors import InputError

SHAPE, SPACING = (40, 48, 40), 4.5
AFFINE = np.diag([SPACING] * 3 + [1.0])


def brain() -> np.ndarray:
    """Three tissues without a field, (1, 40, 48, 40)."""
    x, y, z = (np.linspace(-1, 1, n) for n in SHAPE)
    x, y, z = np.meshgrid(x, y, z, indexing="ij")
    radius = np.sqrt((x / 0.8) ** 2 + (y / 0.85) ** 2 + (z / 0.8) ** 2)
    folds = 0.08 * np.sin(9 * x) * np.sin(9 * y + 1) * np.sin(9 * z)
    volume = np.where(radius < 1, 500.0, 0) + np.where(radius + folds < 0.75, 300, 0)
    volume = np.where(radius < 0.25, 250, volume)
    noise = np.random.default_rng(0).normal(0, 10, SHAPE) * (volume > 0)
    return (volume + noise)[None].astype(np.float32)


def field() -> np.ndarray:
    """From 0.7 to 1.5 along a diagonal, with a bow, (1, 40, 48, 40)."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    return np.exp(0.25 * x + 0.15 * z - 0.2 * y**2)[None].astype(np.float32)


def spread(volume: np.ndarray) -> float:
    """Standard deviation within the bright tissue of `brain`, as a share of its mean."""
    white = volume[brain() > 750]
    return white.std() / white.mean()


def test_a_known_field_is_found():
    found = estimate_field(brain() * field(), AFFINE).on(AFFINE, SHAPE)
    inside = brain() > 0
    assert np.corrcoef(np.log(found[inside]), np.log(field()[inside]))[0, 1] > 0.97
    assert np.log(found[inside]).mean() == pytest.approx(0, abs=0.03)  # intensities stay where they were
    assert spread(brain() * field() / found) < 0.4 * spread(brain() * field())


def test_without_a_field_little_changes():
    found = estimate_field(brain(), AFFINE).on(AFFINE, SHAPE)[brain() > 0]
    assert np.abs(np.log(found)).max() < 0.12


def test_standardised_scans_are_refused():
    volume = np.where(brain() > 0, (brain() - 650) / 150, 0)
    with pytest.raises(InputError, match="standardised"):
        estimate_field(volume.astype(np.float32), AFFINE)


def test_prepared_scans_are_corrected_and_find_their_way_back(tmp_path, fails, monkeypatch):
    """With an oblique affine, so that the field's grid is not the scan's."""
    oblique = AFFINE.copy()
    oblique[:3, :3] = [[0, -4.4, 0.9], [4.5, 0, 0], [0, 0.9, 4.4]]
    (tmp_path / "data/sub-0/anat").mkdir(parents=True)
    nib.save(nib.Nifti1Image((brain() * field())[0], oblique), tmp_path / "data/sub-0/anat/sub-0_T1w.nii.gz")
    table = "participant_id\tage\tsex\tventricular_volume_ml\nsub-0\t30\tF\t20\n"
    (tmp_path / "data/participants.tsv").write_text(table)
    settings = tiny_settings(tmp_path)
    settings["data"] |= {
        "bias_correction": "n4",
        "splits": {"validation": 0, "test": 0},
        "grid": {"shape": [48, 40, 40], "spacing_mm": 4.5},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command_line("prepare", tmp_path / "config.yaml", "--workers", 1)
    config = load_config(tmp_path / "config.yaml")
    row = next(read_scan_table(config).itertuples())
    told = load_info(config, row.key)["bias_correction"]
    assert told["method"] == "N4" and told["simpleitk"] and told["field"][0] < 0.85 < 1.15 < told["field"][1]
    scan, affine = read_volume(row.path)
    back, own = restore_scan(config, row.key, load_prepared(config, row.key))
    np.testing.assert_allclose(own, affine, atol=1e-4)
    white = brain() > 750
    assert np.corrcoef(back[white], scan[white])[0, 1] > 0.95  # the field is there again

    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    assert "data.bias_correction needs SimpleITK; install it with: pip install 'ldm3d[prepare]'" in fails(
        "prepare", tmp_path / "config.yaml"
    )
