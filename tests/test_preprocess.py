"""Preparation: the Grid holds what it should, nothing is done twice, and no bad scan stops the others."""

import json
import os
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from ldm3d.config.read import load_config
from ldm3d.data import preparing as preprocess
from ldm3d.data.nifti import read_volume, write_volume
from ldm3d.data.oddities import warn_of_oddities
from ldm3d.data.people import people_of
from ldm3d.data.placing import restore, to_grid
from ldm3d.data.preparing import fingerprint, load_info, load_prepared, prepare, read_scan_table
from ldm3d.errors import InputError
from ldm3d.geometry import Grid

CONFIG = """
name: test
output: {folder}/run
seed: 7
data:
  bids: {folder}/bids
  grid: {{shape: [24, 28, 24], spacing_mm: 2}}
covariates:
  - {{name: age_years, column: age, kind: continuous, unit: years, range: [0, 110]}}
  - {{name: sex, kind: categorical, categories: [F, M]}}
autoencoder:
  network: {{latent_channels: 2, downsampling: 4, channels: [8, 8]}}
  training: {{steps: 1, batch_size: 1, learning_rate: 0.001}}
diffusion:
  network: {{channels: [8], attention: [false]}}
  training: {{steps: 1, batch_size: 1, learning_rate: 0.001}}
"""
SHAPE = (30, 34, 28)
AFFINE = np.diag([2.0, 2.0, 2.0, 1])
GRID = Grid.centred((24, 28, 24), (2, 2, 2))


def head(seed=0, centre=(15, 17, 14), radii=(9, 11, 9), shape=SHAPE):
    """An ellipsoid of some texture in nothing, like a skull-stripped brain: (1, X, Y, Z)."""
    random = np.random.default_rng(seed)
    distance = sum(((x - c) / r) ** 2 for x, c, r in zip(np.indices(shape), centre, radii))
    return np.where(distance < 1, random.uniform(300, 900, shape), 0).astype(np.float32)[None]


@pytest.fixture
def dataset(tmp_path):
    """Six scans of five subjects; call it for the config, with overrides."""
    rows = []
    for i, (subject, session) in enumerate([("01", "a"), ("01", "b"), ("02", ""), ("03", ""), ("04", ""), ("05", "")]):
        stem = f"sub-{subject}" + (f"_ses-{session}" if session else "")
        folder = tmp_path / "bids" / f"sub-{subject}" / (f"ses-{session}" if session else "") / "anat"
        write_volume(folder / f"{stem}_T1w.nii.gz", head(i), AFFINE)
        rows.append(f"sub-{subject}\t{'n/a' if i == 3 else 50.1 + i}\t{'FM'[i % 2]}\n")
    (tmp_path / "bids/participants.tsv").write_text("participant_id\tage\tsex\n" + "".join(rows[1:]))
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return lambda *overrides: load_config(tmp_path / "config.yaml", overrides)


def scan_path(config, subject):
    return next(config.data.bids.glob(f"sub-{subject}/**/*_T1w.nii.gz"))


# One volume


def test_aligned_scan_keeps_its_voxels_in_0_to_1():
    volume = head()
    on_grid, info = to_grid(volume, AFFINE, Grid.centred((24, 28, 24), (2, 2, 2)), (0, 100))
    assert on_grid.shape == (1, 24, 28, 24) and on_grid.dtype == np.float32
    inside = on_grid[on_grid > 0]
    np.testing.assert_allclose(np.sort(inside) * volume.max(), np.sort(volume[volume > 0]), rtol=1e-6)
    assert on_grid.max() == 1 and on_grid.min() == 0 and info["cut_mm"] == 0
    np.testing.assert_allclose(ndimage.center_of_mass(on_grid[0] > 0), (11.5, 13.5, 11.5), atol=0.51)


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_restore_puts_a_bright_voxel_back(flips):
    volume = head()
    volume[0, 12, 20, 10] = 2000
    affine = np.array([[0, 0, 2.0, 4], [2.0, 0, 0, 5], [0, 2.0, 0, 6], [0, 0, 0, 1]]) @ np.diag([*flips, 1])
    on_grid, info = to_grid(volume, affine, Grid.centred((24, 28, 24), (2, 2, 2)), (0, 100))
    back, back_affine = restore(on_grid, json.loads(json.dumps(info)))
    np.testing.assert_array_equal(back_affine, affine)
    np.testing.assert_allclose(back, volume, rtol=1e-5, atol=1e-3)
    assert np.unravel_index(back.argmax(), back.shape) == (0, 12, 20, 10)


def test_restore_over_other_spacings_keeps_the_place():
    volume = ndimage.gaussian_filter(head(), (0, 1, 1, 1)) + 3000 * (head(radii=(3, 3, 3), centre=(11, 20, 12)) > 0)
    affine = np.array([[-1.5, 0, 0, 4], [0, 1.44, -0.42, 5], [0, 0.42, 1.44, 6], [0, 0, 0, 1]])
    on_grid, info = to_grid(volume, affine, Grid.centred((28, 32, 28), (2, 2, 2)), (0, 100))
    back, _ = restore(on_grid, info)
    assert back.shape == (1, *SHAPE)
    np.testing.assert_allclose(ndimage.center_of_mass(back[0] > 2000), (11, 20, 12), atol=0.3)


def test_percentiles_clip_and_are_undone():
    on_grid, info = to_grid(head(), AFFINE, Grid.centred((24, 28, 24), (2, 2, 2)), (0, 50))
    assert info["low"] == 0 and info["high"] == pytest.approx(600, abs=15)  # median of 300 to 900
    assert (on_grid[on_grid > 0] == 1).mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(restore(on_grid, info)[0], np.minimum(head(), info["high"]), atol=1e-3)


def test_brightness_does_not_depend_on_the_size_of_the_brain():
    grid = Grid.centred((24, 28, 24), (2, 2, 2))
    high = [to_grid(head(radii=(r, r, r)), AFFINE, grid, (0, 99))[1]["high"] for r in (5, 10)]
    assert high[0] == pytest.approx(high[1], rel=0.01)


@pytest.mark.parametrize("background", [-1000.0, 0.0, 40.0])
def test_background_becomes_0_within_and_beyond_the_scan(background):
    on_grid, _ = to_grid(head() + background, AFFINE, Grid.centred((40, 40, 40), (2, 2, 2)), (0, 99.8))
    assert on_grid[0, 0, 0, 0] == 0 and on_grid[0, 6, 4, 7] == 0  # outside of the scan; inside, outside of the head
    assert (on_grid > 0).sum() == (head() > 0).sum()


def test_background_amid_the_intensities_of_a_standardised_brain_becomes_0():
    volume = head()
    brain = volume > 0
    volume[brain] = (volume[brain] - volume[brain].mean()) / volume[brain].std()
    on_grid, info = to_grid(volume, AFFINE, Grid.centred(SHAPE, (2, 2, 2)), (0, 100))
    assert np.corrcoef(restore(on_grid, info)[0][brain], volume[brain])[0, 1] > 0.999
    assert (restore(on_grid, info)[0][~brain] == np.float32(info["low"])).all()
    assert on_grid.min() == 0 and (on_grid == 0).sum() == pytest.approx((~brain).sum(), rel=0.01)


def test_noisy_air_neither_moves_the_box_nor_becomes_bright():
    shape, random = (60, 60, 60), np.random.default_rng(0)
    clean = head(shape=shape, centre=(20, 25, 33), radii=(15, 18, 15))
    noisy = np.hypot(clean + random.normal(0, 25, shape), random.normal(0, 25, shape)).astype(np.float32)
    noisy[0, 55, 55, 55] = 5000  # a spike
    on_grid, info = to_grid(noisy, np.diag([1.0, 1, 1, 1]), Grid.centred((24, 24, 24), (2, 2, 2)), (0, 99.8))
    middle = np.array(info["grid_affine"]) @ [11.5, 11.5, 11.5, 1]
    np.testing.assert_allclose(middle[:3], (20, 25, 33), atol=1.5)
    assert np.median(on_grid[:, :3]) < 0.05 and info["cut_mm"] == 0


def test_high_head_loses_its_neck_not_its_crown():
    volume = head(shape=(30, 34, 60), centre=(15, 17, 44), radii=(9, 11, 9))
    volume[0, 12:18, 14:20, :40] = 500
    on_grid, info = to_grid(volume, AFFINE, Grid.centred((24, 28, 24), (2, 2, 2)), (0, 100))
    crown = np.array(info["grid_affine"]) @ [11.5, 13.5, 23.5, 1]
    assert crown[2] == pytest.approx(2 * 53 + 0, abs=2.1)
    assert on_grid[..., 0].any() and info["cut_mm"] == pytest.approx(2 * (53 - 24), abs=2.1)


def test_no_contrast_is_an_input_error():
    volume = np.zeros((1, *SHAPE), np.float32)
    volume[:, 5:20, 5:20, 5:20] = 100
    with pytest.raises(InputError, match=r"percentiles 99 and 100 .* both 100; .* move data.percentiles apart"):
        to_grid(volume, AFFINE, Grid.centred((8, 8, 8), (2, 2, 2)), (99, 100))


# A dataset


def test_prepare_that_finds_no_scans_leaves_no_folder(dataset):
    config = dataset("data.suffix=T2w")
    with pytest.raises(InputError, match="no scan found"):
        prepare(config, workers=1)
    assert not config.output.exists()


def test_prepare_leaves_tables_and_volumes(dataset):
    config = dataset()
    done = prepare(config, workers=1)
    assert (done.prepared, done.cached, len(done.failed)) == (6, 0, 0)
    table = read_scan_table(config)
    assert list(table["subject"]) == ["01", "01", "02", "03", "04", "05"]
    assert list(table["session"]) == ["a", "b", "", "", "", ""]
    np.testing.assert_array_equal(table["age_years"], [51.1, 51.1, 52.1, np.nan, 54.1, 55.1])
    assert table["age_years"].equals(done.table["age_years"]) and table["sex"].equals(done.table["sex"])
    assert table.groupby("subject")["split"].nunique().max() == 1
    assert set(table["split"]) == {"train", "validation", "test"}
    volume = load_prepared(config, table["key"][0])
    assert volume.shape == (1, 24, 28, 24) and volume.dtype == np.float32 and volume.max() == 1
    back, affine = restore(volume, load_info(config, table["key"][0]))
    original, original_affine = read_volume(table["path"][0])
    np.testing.assert_array_equal(affine, original_affine)
    seen = original <= load_info(config, table["key"][0])["high"]
    np.testing.assert_allclose(back[seen], original[seen], atol=1)
    splits = (config.prepared_folder / "splits.tsv").read_text().splitlines()
    assert splits[0] == "subject\tsplit" and len(splits) == 6
    assert not list(config.prepared_folder.rglob(".*"))  # no half-written file


def test_only_what_changed_is_prepared_again(dataset):
    config = dataset()
    prepare(config, workers=1)
    first = fingerprint(config)
    again = prepare(config, workers=1)
    assert (again.prepared, again.cached) == (0, 6) and fingerprint(config) == first

    path = scan_path(config, "03")
    os.utime(path)  # a new date alone is no change
    assert prepare(config, workers=1).prepared == 0
    write_volume(path, head(99), AFFINE)
    again = prepare(config, workers=1)
    assert (again.prepared, again.cached) == (1, 5) and fingerprint(config) != first

    changed = dataset("data.percentiles=[1, 99]")
    again = prepare(changed, workers=1)
    assert (again.prepared, again.cached) == (6, 0)
    assert prepare(config, workers=1).cached == 6  # the older volumes are still there


def test_half_written_volume_is_prepared_again(dataset):
    config = dataset()
    key = prepare(config, workers=1).table["key"][0]
    (config.prepared_folder / "volumes" / f"{key}.json").unlink()  # is written last
    assert prepare(config, workers=1).prepared == 1


def test_fingerprint_follows_the_table_not_the_place(dataset, tmp_path):
    config = dataset()
    prepare(config, workers=1)
    first = fingerprint(config)
    shutil.move(tmp_path / "bids", tmp_path / "moved")
    moved = dataset(f"data.bids={tmp_path / 'moved'}")
    assert prepare(moved, workers=1).cached == 6 and fingerprint(moved) == first
    table = tmp_path / "moved/participants.tsv"
    table.write_text(table.read_text().replace("54.1", "54.2"))
    prepare(moved, workers=1)
    assert fingerprint(moved) != first


def test_reading_before_preparing_or_with_other_settings_says_what_to_do(dataset):
    config = dataset()
    for read in (read_scan_table, fingerprint):
        with pytest.raises(InputError, match="run `ldm3d prepare` with this config first"):
            read(config)
    prepare(config, workers=1)
    with pytest.raises(InputError, match=r"no prepared volume .*run `ldm3d prepare`"):
        load_prepared(config, "0" * 20)
    with pytest.raises(InputError, match=r"data.grid.shape was \[24, 28, 24\], is now \[32, 32, 32\]; run `ldm3d prep"):
        read_scan_table(dataset("data.grid.shape=[32, 32, 32]"))
    read_scan_table(dataset("seed=8"))  # a seed has other uses than the split


def test_bad_scans_are_named_and_the_rest_goes_on(dataset, capsys):
    config = dataset()
    scan_path(config, "02").write_bytes(b"not a scan")
    write_volume(scan_path(config, "04"), head() * np.nan, AFFINE)
    done = prepare(config, workers=2)  # in other processes, as users have it
    assert done.prepared == 4 and list(done.failed["subject"]) == ["02", "04"]
    assert list(read_scan_table(config)["subject"]) == ["01", "01", "03", "05"]
    printed = capsys.readouterr().out
    assert "2 of 6 scans could not be prepared" in printed
    assert "sub-02: " in printed and "cannot be read as NIfTI" in printed and "voxels are NaN" in printed
    assert (config.prepared_folder / "failed.tsv").read_text().count("\n") == 3

    for subject in ("02", "04"):
        write_volume(scan_path(config, subject), head(50 + int(subject)), AFFINE)
    assert prepare(config, workers=1).prepared == 2
    assert not (config.prepared_folder / "failed.tsv").exists()


def test_strict_and_nothing_good_are_errors(dataset):
    config = dataset()
    scan_path(config, "02").write_bytes(b"not a scan")
    with pytest.raises(InputError, match="1 of 6 scans could not be prepared:\n  sub-02: "):
        prepare(config, workers=1, strict=True)
    assert not (config.prepared_folder / "scans.tsv").exists()
    for path in config.data.bids.rglob("*.nii.gz"):
        path.write_bytes(b"not a scan")
    with pytest.raises(InputError, match="6 of 6 scans"):
        prepare(config, workers=1)


def test_unexpected_failure_is_named_too(dataset, monkeypatch):
    def fail(volume, *_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("ldm3d.data.registration.to_grid", fail)
    with pytest.raises(InputError, match="unexpected ZeroDivisionError: a bug"):
        prepare(dataset(), workers=1)


def test_full_disk_stops_the_run(dataset, monkeypatch):
    def fail(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("ldm3d.data.one_scan.write_atomic", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(dataset(), workers=1)


def die_over_even_numbers(number, *_):
    """Stands for a scan that crashes its process."""
    if number in (2, 4):
        os._exit(1)
    return {"key": number}


@pytest.mark.slow
def test_dying_workers_are_found_out(monkeypatch):
    monkeypatch.setattr(preprocess, "prepare_scan", die_over_even_numbers)
    results = dict(preprocess._run([(i,) for i in range(1, 6)], workers=2))
    assert sorted(results) == [0, 1, 2, 3, 4]
    assert [i for i in results if "its worker process died" in results[i].get("reason", "")] == [1, 3]


def test_oddities_are_warned_of_once(dataset):
    config = dataset()
    shutil.copy(scan_path(config, "02"), scan_path(config, "03"))
    with pytest.warns(UserWarning) as caught:
        prepare(dataset("data.grid.shape=[16, 16, 16]"), workers=1)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 4
    assert "age_years is the same at all visits of 1 of 1 people" in messages[0]
    assert "6 scans lose foreground" in messages[1] and "and 1 more" in messages[1]
    assert "6 scans have the size of no human head" in messages[2] and "sub-02: 34 x 42 x 34 mm" in messages[2]
    assert "1 scans are of several subjects" in messages[3] and "sub-02, sub-03" in messages[3]


def test_one_scan_under_two_names_is_in_one_split(dataset):
    config = dataset("data.splits={validation: 0.3, test: 0.3}")
    for seed in range(4):
        for one, other in (("02", "03"), ("03", "05")):  # each pair in turn; the second through the first's copy
            shutil.copy(scan_path(config, one), scan_path(config, other))
        with pytest.warns(UserWarning, match="sub-02, sub-03, sub-05"):
            table = prepare(dataset(f"data.splits={{validation: 0.3, test: 0.3, seed: {seed}}}"), workers=1).table
        split = table.set_index("subject")["split"]
        assert len({split["02"], split["03"], split["05"]}) == 1 and len(set(table["split"])) == 3


def test_people_are_joined_over_scans_between_them():
    table = pd.DataFrame({"subject": ["d", "b", "b", "a", "a", "c"], "key": ["1", "1", "2", "2", "3", "4"]})
    assert people_of(table) == {"a": "a", "b": "a", "c": "c", "d": "a"}


def _odd(extents=((180, 200, 170),), around_zero=(False,)):
    """Warnings of scans of these sizes."""
    count = max(len(extents), len(around_zero))
    table = pd.DataFrame({"subject": [f"{i}" for i in range(count)], "session": "", "path": "x"})
    table["key"] = table["subject"]
    results = [
        {"cut_mm": 0, "notes": [], "extent_mm": extents[i % len(extents)], "around_zero": around_zero[i % len(around_zero)]}
        for i in range(count)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_oddities(table, results, 2.0)
    return [str(warning.message) for warning in caught]


def test_sizes_of_no_human_head_are_named():
    newborn, whole_head = (100, 120, 80), (180, 250, 320)
    assert _odd([newborn, whole_head, (140, 175, 120)]) == []
    (message,) = _odd([whole_head, (28, 36, 26), (1400, 1750, 1200)])
    assert message.startswith("2 scans have the size of no human head (40 to 350 mm")
    assert "sub-1: 28 x 36 x 26 mm" in message and "sub-2: 1400 x" in message


def test_standardised_scans_among_raw_ones_are_named():
    assert _odd(around_zero=[True, True]) == _odd(around_zero=[False, False]) == []
    (message,) = _odd(around_zero=[False, True, False])
    assert "1 scans have intensities around 0" in message and message.endswith("sub-1")
    (message,) = _odd(around_zero=[True, True, False])
    assert "1 scans have no intensities below 0" in message and message.endswith("sub-2")


def test_info_tells_standardised_scans_and_the_size_of_the_head():
    raw = ndimage.gaussian_filter(head(), (0, 0.7, 0.7, 0.7))
    inside = raw > 100
    standardised = np.where(inside, (raw - raw[inside].mean()) / raw[inside].std(), 0).astype(np.float32)
    everywhere = (raw - raw.mean()) / raw.std()  # with its air
    ringing = raw + np.where(inside, 0, np.random.default_rng(0).normal(0, 5, raw.shape)).astype(np.float32)
    told = [to_grid(volume, AFFINE, GRID, (0, 100))[1] for volume in (raw, standardised, everywhere, ringing)]
    assert [info["around_zero"] for info in told] == [False, True, True, False]
    np.testing.assert_allclose(told[0]["extent_mm"], (36, 44, 36), atol=4.1)


def test_nan_around_the_brain_is_prepared_and_counted(dataset):
    config = dataset()
    write_volume(scan_path(config, "02"), np.where(head(2) > 0, head(2), np.nan), AFFINE)
    with pytest.warns(UserWarning, match="1 scans were read with a guess:\n.*NaN in .* of its voxels"):
        done = prepare(config, workers=1)
    key = done.table.set_index("subject")["key"]["02"]
    assert len(done.failed) == 0
    np.testing.assert_allclose(load_prepared(config, key), to_grid(head(2), AFFINE, GRID, (0, 99.8))[0], atol=1e-3)
