"""Masks: each scan's own, applied before anything else; derivatives beside the raw dataset that has the tables."""

import numpy as np
import pytest
from test_preprocess import AFFINE, CONFIG, SHAPE, head

from ldm3d import experiment
from ldm3d.config.read import load_config
from ldm3d.data.masks import apply_mask, find_masks
from ldm3d.data.nifti import write_volume
from ldm3d.data.placing import restore
from ldm3d.data.preparing import fingerprint, load_info, load_prepared, prepare, read_scan_table
from ldm3d.errors import InputError
from ldm3d.processes import ALONE

WHOLE = head(radii=(13, 15, 12))  # a head around the brain


def mask_of(radii=(9, 11, 9)):
    return (head(radii=radii) > 0).astype(np.uint8)


@pytest.fixture
def dataset(tmp_path):
    """Raw scans and tables, and a derivative with scans and masks of three people, one with two sessions."""
    rows = []
    for i, (subject, session) in enumerate([("01", "a"), ("01", "b"), ("02", ""), ("03", "")]):
        stem = f"sub-{subject}" + (f"_ses-{session}" if session else "")
        inside = f"sub-{subject}/" + (f"ses-{session}/" if session else "") + "anat"
        write_volume(tmp_path / "bids" / inside / f"{stem}_T1w.nii.gz", 7 + WHOLE, AFFINE)
        write_volume(tmp_path / "prep" / inside / f"{stem}_desc-preproc_T1w.nii.gz", WHOLE + i, AFFINE)
        write_volume(tmp_path / "prep" / inside / f"{stem}_desc-brain_mask.nii.gz", mask_of(), AFFINE)
        rows.append(f"sub-{subject}\t{50 + i}\t{'FM'[i % 2]}\n")
    (tmp_path / "bids/participants.tsv").write_text("participant_id\tage\tsex\n" + "".join(rows[1:]))
    (tmp_path / "bids/sub-01/sub-01_sessions.tsv").write_text("session_id\tage\nses-a\t61\nses-b\t63.5\n")
    mask = f"\n  derivatives: {tmp_path}/prep\n  mask: {{desc: brain, suffix: mask}}"
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path).replace("\n  grid", f"{mask}\n  grid"))
    return lambda *overrides: load_config(tmp_path / "config.yaml", overrides)


def test_scans_and_masks_of_a_derivative_with_the_tables_of_the_raw_dataset(dataset, tmp_path):
    config = dataset()
    done = prepare(config, workers=1)
    table = read_scan_table(config)
    assert list(table["age_years"]) == [61, 63.5, 52, 53] and list(table["sex"]) == ["M", "M", "F", "M"]
    assert all(path.startswith(str(tmp_path / "prep")) for path in table["path"])
    assert (done.prepared, len(done.failed)) == (4, 0) and config.data.skull_stripped
    volume, info = load_prepared(config, table["key"][0]), load_info(config, table["key"][0])
    back, _ = restore(volume, info)
    np.testing.assert_array_equal(back > 0, mask_of() > 0)  # the brain alone, every voxel of it
    assert info["mask"].endswith("sub-01_ses-a_desc-brain_mask.nii.gz")
    assert info["mask_keeps"] == pytest.approx(mask_of().mean(), abs=1e-4)
    assert prepare(config, workers=1).cached == 4


def test_a_changed_mask_is_another_volume_of_the_same_scan(dataset, tmp_path):
    config = dataset()
    before, first = prepare(config, workers=1).table["key"], fingerprint(config)
    mask = tmp_path / "prep/sub-02/anat/sub-02_desc-brain_mask.nii.gz"
    write_volume(mask, mask_of((9, 10, 9)), AFFINE)
    done = prepare(config, workers=1)
    after = done.table["key"]
    assert (done.prepared, done.cached) == (1, 3) and fingerprint(config) != first
    assert [key[:20] for key in before] == [key[:20] for key in after]
    assert [a == b for a, b in zip(before, after)] == [True, True, False, True]
    write_volume(mask, mask_of() * 255, AFFINE, dtype=np.int16)  # the same voxels, written otherwise
    assert list(prepare(config, workers=1).table["key"]) == list(before)


def test_without_a_mask_the_keys_are_those_of_before(dataset):
    plain = dataset("data.mask=null")
    keys = prepare(plain, workers=1).table["key"]
    masked = prepare(dataset(), workers=1).table["key"]
    assert not set(keys) & set(masked) and [k[:20] for k in keys] == [k[:20] for k in masked]
    dumped = plain.data.model_dump(mode="json")
    assert not {"mask", "sessions"} & set(dumped)  # what a run compares has no new key


def test_a_mask_on_another_grid_is_resampled():
    turned = np.array([[0, 0, 4.0, 1], [-4.0, 0, 0, 65], [0, 4.0, 0, 1], [0, 0, 0, 1]])
    coarse = np.zeros((1, 17, 14, 15), np.uint8)
    coarse[0, 4:12, 3:9, 3:11] = 1  # faces in the world: x 11 to 43, y 19 to 51, z 11 to 35 mm
    masked, kept = apply_mask(np.ones((1, *SHAPE), np.float32), AFFINE, coarse, turned)
    world = {name: np.flatnonzero(kept[0].any(axis=axes)) * 2 for name, axes in zip("xyz", [(1, 2), (0, 2), (0, 1)])}
    assert {name: (found[0], found[-1]) for name, found in world.items()} == {"x": (12, 42), "y": (20, 50), "z": (12, 34)}
    np.testing.assert_array_equal(masked > 0, kept)


def test_bad_masks_fail_one_scan_with_a_reason_and_the_others_go_on(dataset, tmp_path, capsys):
    folder = tmp_path / "prep"
    (folder / "sub-02/anat/sub-02_desc-brain_mask.nii.gz").unlink()
    write_volume(folder / "sub-03/anat/sub-03_desc-brain_mask.nii.gz", 0 * mask_of(), AFFINE)
    far = AFFINE + np.array([[0, 0, 0, 500], [0] * 4, [0] * 4, [0] * 4])
    write_volume(folder / "sub-01/ses-a/anat/sub-01_ses-a_desc-brain_mask.nii.gz", mask_of(), far)
    done = prepare(dataset(), workers=1)
    reasons = dict(zip(zip(done.failed["subject"], done.failed["session"]), done.failed["reason"]))
    assert list(zip(done.table["subject"], done.table["session"])) == [("01", "b")]
    assert "has no mask in" in reasons["02", ""] and "no ses, no space, no run" in reasons["02", ""]
    assert "brain_mask.nii.gz: every voxel is 0" in reasons["03", ""]
    assert "ses-a_desc-brain_mask.nii.gz: keeps no voxel of its scan" in reasons["01", "a"]


def test_which_mask_is_a_scan_s(dataset, tmp_path):
    """As fMRIPrep names them, with its masks of functional runs."""
    data, root = dataset().data, tmp_path / "prep"
    mni = "space-MNI152NLin2009cAsym"
    for name in (
        *(f"sub-09/anat/sub-09_{rest}_desc-brain_mask.nii.gz" for rest in ("run-1", "run-02", f"run-1_{mni}_res-2")),
        f"sub-09/anat/sub-09_run-1_{mni}_desc-brain_mask.nii.gz",
        f"sub-09/func/sub-09_task-rest_run-1_{mni}_desc-brain_mask.nii.gz",
        f"sub-09/anat/sub-09_task-rest_run-2_{mni}_desc-brain_mask.nii.gz",
        "sub-09/anat/sub-09_run-1_label-GM_probseg.nii.gz",
        "sub-08/anat/sub-08_acq-a_desc-brain_mask.nii.gz",
        "sub-08/anat/sub-08_acq-b_desc-brain_mask.nii.gz",
        "sub-08/anat/sub-08_rec-x_desc-brain_mask.nii.gz",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    found = {
        "sub-09_run-01_desc-preproc_T1w": "sub-09_run-1_desc-brain_mask",
        "sub-09_run-2_desc-preproc_T1w": "sub-09_run-02_desc-brain_mask",
        f"sub-09_run-1_{mni}_res-2_desc-preproc_T1w": f"sub-09_run-1_{mni}_res-2_desc-brain_mask",
        f"sub-09_run-1_{mni}_desc-preproc_T1w": f"sub-09_run-1_{mni}_desc-brain_mask",
        f"sub-09_run-2_{mni}_desc-preproc_T1w": "has no mask in",
        "sub-09_desc-preproc_T1w": "has no mask in",
        "sub-08_acq-b_T1w": "sub-08_acq-b_desc-brain_mask",
        "sub-08_acq-c_T1w": "sub-08_rec-x_desc-brain_mask",
        "sub-08_T1w": "has 3 masks (sub-08/anat/sub-08_acq-a_desc-brain_mask.nii.gz, ",
    }
    masks = find_masks(data, [str(root / f"{name[:6]}/anat/{name}.nii.gz") for name in found])
    for (scan, expected), mask in zip(found.items(), masks):
        assert expected in str(mask), scan
    assert [isinstance(mask, InputError) for mask in masks] == [text.startswith("has") for text in found.values()]


def test_masks_may_lie_in_a_folder_of_their_own(dataset, tmp_path):
    config = dataset("data.derivatives=null", f"data.mask={{desc: brain, root: {tmp_path}/prep}}")
    done = prepare(config, workers=1)
    assert (len(done.table), len(done.failed)) == (4, 0) and "/bids/" in done.table["path"][0]
    assert "/prep/" in load_info(config, done.table["key"][0])["mask"]


def test_sessions_tables_may_lie_elsewhere(dataset, tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/sub-01_sessions.tsv").write_text("session_id\tage\nses-a\t71\nses-b\t73\n")
    done = prepare(dataset(f"data.sessions={tmp_path}/tables"), workers=1)
    assert list(done.table["age_years"])[:2] == [71, 73]


def test_bad_settings_are_one_message(dataset, tmp_path, fails):
    def message(*overrides):
        return fails("prepare", tmp_path / "config.yaml", *(part for each in overrides for part in ("--set", each)))

    assert "looked for sub-*_brainmask.nii.gz" in message("data.mask={suffix: brainmask}")
    assert "did you mean 'desc'" in message("data.mask={desk: brain}")
    assert "mask is empty" in message("data.mask={}")
    assert "no folder" in message(f"data.derivatives={tmp_path}/nowhere") and "(data.mask)" in message(
        f"data.mask={{desc: brain, root: {tmp_path}/nowhere}}"
    )
    assert "`mask` goes with `bids`" in message("data.bids=null", "data.derivatives=null", "data.table=x.csv")
    assert not (tmp_path / "run/prepared/scans.tsv").exists()


def test_masks_outside_of_the_dataset_are_not_read(dataset, tmp_path):
    mask = tmp_path / "prep/sub-02/anat/sub-02_desc-brain_mask.nii.gz"
    mask.rename(tmp_path / "secret.nii.gz")
    mask.symlink_to(tmp_path / "secret.nii.gz")
    (reason,) = prepare(dataset(), workers=1).failed["reason"]
    assert "outside of" in reason


def test_evaluation_finds_derivatives_and_masks_of_its_own_data_and_the_masks_of_others(dataset, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(experiment, "prepare", lambda config, processes: asked.update(data=config.data))
    monkeypatch.setattr(experiment, "read_scan_table", lambda config: [each.name for each in config.covariates])
    settings = "data.derivatives=prep", "data.mask={desc: brain, root: masks}", "data.covariates_tables=[t.csv]"
    trained = dataset(*settings, "data.exclude=qc")
    known = experiment.Experiment(trained, base=tmp_path)

    def data_of(data, own):
        experiment._prepared(known, data, tmp_path / "work", None, own, ALONE, ())
        return asked["data"]

    own = data_of(tmp_path / "bids", own=True)
    assert own.derivatives == tmp_path / "prep" and own.mask == {"desc": "brain", "root": str(tmp_path / "masks")}
    assert own.covariates_tables == (str(tmp_path / "t.csv"),) and own.exclude == "qc"
    other = data_of(tmp_path / "prep", own=False)
    assert (other.derivatives, other.mask, other.covariates_tables, other.exclude) == (None, {"desc": "brain"}, (), None)
    (tmp_path / "others.csv").touch()
    assert data_of(tmp_path / "others.csv", own=False).mask is None  # taken as they are
