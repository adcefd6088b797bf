"""A segmenter learns balls of known volume; label maps go to the grid of their scans."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import command_line

from ldm3d.data.labels import LabelMaps, count_volumes, load_labels, parse_groups, parse_totals, shares_on_grid
from ldm3d.errors import InputError
from ldm3d.experiment import scans_by_use
from ldm3d.models.segmentation import SegmentationUNet
from ldm3d.rulers.segmenter import Segmenter, dice
from ldm3d.rulers.volumetry import apply_measure
from ldm3d.training.segmenter import loss_of_shares, train_segmenter

GROUPS = {"ball_ml": [7], "shell_ml": [2, 3]}


def ball(i: int, shape=(16, 16, 16)):
    """A dark ball within a bright shell, of another size in each volume; volume and shares."""
    rng = np.random.default_rng(i)
    centre = np.array(shape) / 2 + rng.uniform(-1, 1, 3)
    distance = np.sqrt(sum((x - c) ** 2 for x, c in zip(np.ix_(*(np.arange(n) for n in shape)), centre)))[None]
    radius = rng.uniform(2.5, 4.5)
    classes = np.where(distance < radius, 1, np.where(distance < radius + 2, 2, 0)).astype(np.uint8)
    volume = (np.array([0.1, 0.4, 0.9])[classes] + 0.03 * rng.standard_normal(classes.shape)).astype(np.float32)
    return volume, np.eye(3, dtype=np.float32)[classes[0]].transpose(3, 0, 1, 2)


def test_segmenter_measures_what_it_was_trained_on(tmp_path):
    network = train_segmenter(ball, 40, GROUPS, steps=200)
    overlap = dice(network, ball, range(100, 110))
    assert all(np.mean(values) > 0.9 for values in overlap.values()), overlap
    network.save_pretrained(tmp_path)
    again, first = Segmenter.from_pretrained(tmp_path), Segmenter(network)
    found, true = [], []
    for i in range(100, 110):
        volume, shares = ball(i)
        found.append(apply_measure(again, volume, (2, 2, 5))["ball_ml"])
        assert found[-1] == pytest.approx(apply_measure(first, volume, (2, 2, 5))["ball_ml"])
        true.append(shares[1].sum() * 0.02)
    assert np.corrcoef(found, true)[0, 1] > 0.95 and abs(np.mean(found) / np.mean(true) - 1) < 0.1


def test_training_follows_from_its_seed():
    one, same, other = (train_segmenter(ball, 4, GROUPS, steps=2, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_totals_are_sums_of_groups(tmp_path):
    network = SegmentationUNet(GROUPS, (4, 8), {"head_ml": ["ball_ml", "shell_ml"]})
    network.save_pretrained(tmp_path)
    found = Segmenter.from_pretrained(tmp_path)(ball(0)[0][0], (2, 2, 5))
    assert list(found) == ["ball_ml", "shell_ml", "head_ml"] and found["head_ml"] > 0
    assert found["head_ml"] == pytest.approx(found["ball_ml"] + found["shell_ml"])
    for wrong in ({"head_ml": ["ball_ml", "hair_ml"]}, {"ball_ml": ["shell_ml"]}, {"head_ml": []}):
        with pytest.raises(InputError, match="a total adds up groups, which are ball_ml, shell_ml"):
            SegmentationUNet(GROUPS, (4, 8), wrong)
    assert parse_totals(["a=b+c", "d = e"]) == {"a": ["b", "c"], "d": ["e"]}
    for text in ("a", "a=", "=b", "a=b+"):
        with pytest.raises(InputError, match="write NAME=GROUP"):
            parse_totals([text])


def test_any_shape_goes_through():
    network = SegmentationUNet(GROUPS).eval()
    assert network(torch.rand(1, 1, 17, 18, 20)).shape == (1, 3, 17, 18, 20)


def test_labels_that_are_nowhere_and_no_scans():
    def one_more(i: int):
        volume, shares = ball(i)
        return volume, np.concatenate([shares, 0 * shares[:1]])

    with pytest.raises(InputError, match=r"gone_ml: labels \[9\]"):
        train_segmenter(one_more, 3, {**GROUPS, "gone_ml": [9]})
    with pytest.raises(InputError, match="no scan"):
        train_segmenter(ball, 0, GROUPS)


def test_groups_in_words():
    assert parse_groups(["a=4,43", "b = 2"]) == {"a": [4, 43], "b": [2]}
    for bad, message in (("a", "write NAME"), ("a=x", "write NAME"), ("=3", "write NAME"), ("a=3,3", "twice|two places")):
        with pytest.raises(InputError, match=message):
            parse_groups([bad])
    with pytest.raises(InputError, match=r"\[4\]"):
        parse_groups(["a=4", "b=4"])


def test_volumes_are_counted_in_ml():
    labels = np.zeros((10, 10, 10))
    labels[:2], labels[5:8, :5] = 4, 43
    assert count_volumes(labels, (1, 2, 5), {"a": [4, 43], "b": [1]}) == {"a": pytest.approx(3.5), "b": 0}


def test_one_label_map_belongs_to_a_scan(tmp_path):
    for name in (
        "sub-1/sub-1_dseg.nii.gz",
        "sub-10/sub-10_dseg.nii.gz",
        "sub-2_ses-a_x.nii",
        "sub-2_ses-b_x.nii",
        "sub-1_dseg.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    maps = LabelMaps(tmp_path)
    assert maps.one("1").name == "sub-1_dseg.nii.gz"
    assert maps.one("2", "b").name == "sub-2_ses-b_x.nii"
    for subject, found in (("3", "found 0 .*right folder"), ("2", "found 2 .*sub-2_ses-b_x.nii.*--pattern")):
        with pytest.raises(InputError, match=found):
            maps.one(subject)


def test_pattern_chooses_among_label_maps_and_folders_may_name_the_subject(tmp_path):
    for name in (
        *("sub-1/anat/sub-1_dseg.nii.gz", "sub-1/anat/sub-1_desc-aseg_dseg.nii.gz", "sub-1/anat/sub-1_desc-aparc_dseg.nii.gz"),
        *("fs/sub-2/mri/aseg.mgz", "fs/sub-2/mri/T1.mgz", "fs/sub-20/mri/aseg.mgz", "fs/sub-3/ses-b/aseg.mgz"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"found 3 .*choose one kind with --pattern"):
        LabelMaps(tmp_path).one("1")
    assert LabelMaps(tmp_path, "*desc-aseg_dseg*").one("1").name == "sub-1_desc-aseg_dseg.nii.gz"
    aseg = LabelMaps(tmp_path, "*/mri/aseg.mgz")
    assert aseg.one("2") == tmp_path / "fs/sub-2/mri/aseg.mgz"
    assert LabelMaps(tmp_path).one("3", "b") == tmp_path / "fs/sub-3/ses-b/aseg.mgz"
    with pytest.raises(InputError, match=r"--pattern '.*aseg.mgz' may leave it out"):
        aseg.one("1")


def test_label_maps_of_many_subjects_take_one_walk(tmp_path, monkeypatch):
    subjects = [f"{i:03d}" for i in range(200)]
    for subject in subjects:
        (tmp_path / f"sub-{subject}").mkdir()
        (tmp_path / f"sub-{subject}/sub-{subject}_dseg.nii.gz").touch()
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    maps = LabelMaps(tmp_path)
    assert [maps.one(subject).parent.name for subject in subjects] == [f"sub-{subject}" for subject in subjects]
    assert len(listed) == 1 + len(subjects)


def test_label_maps_lie_on_the_grid_of_their_scans_and_evaluate_takes_a_segmenter(experiment, tmp_path, capsys):
    """Volumes are kept on average, and brains are bright."""
    labels = experiment / "data/derivatives/labels"
    groups = {"ventricular_volume_ml": [6, 7], "brain_volume_ml": [4, 5]}
    config, trained, _ = scans_by_use(experiment / "run/model", experiment / "data", tmp_path)
    counted, maps = [], LabelMaps(labels)
    for key, subject in zip(trained["key"], trained["subject"]):
        volume, shares = load_labels(config, key, maps.one(subject), groups)
        np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-5)
        counted.append(shares[1].sum() * 7.5**3 / 1000)
        assert volume[0][shares[2] > 0.9].mean() > 2 * volume[0][shares[0] > 0.9].mean()
    true = trained["ventricular_volume_ml"]
    assert np.mean(counted) == pytest.approx(true.mean(), rel=0.1) and np.corrcoef(counted, true)[0, 1] > 0.85
    options = [f"--volume={name}={','.join(map(str, group))}" for name, group in groups.items()]
    model, data = experiment / "run/model", experiment / "data"
    command_line("segmenter", model, "--data", data, "--labels", labels, *options, "--out", tmp_path / "seg", "--steps", 2)
    assert "Dice" in capsys.readouterr().out
    arguments = ["--measure", f"segmenter:{tmp_path / 'seg'}", "--out", tmp_path / "out", "--num", 4, "--steps", 1]
    command_line("evaluate", model, "--data", data, *arguments)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {row["covariate"] for row in metrics["fidelity"]} == {"ventricular_volume_ml"}


def test_shares_of_voxels_keep_volumes_where_one_label_would_not():
    """A sheet a third of a voxel wide: no voxel is mostly sheet, but its volume is there."""
    labels = np.zeros((1, 30, 30, 30), np.int32)
    labels[:, 10] = 4
    shares = shares_on_grid(labels, np.eye(4), np.diag([3.0, 3, 3, 1]), (10, 10, 10), {"sheet": [4]})
    assert shares.shape == (2, 10, 10, 10) and shares[1].max() < 0.5
    assert shares[1, :, 2:8, 2:8].sum() * 27 == pytest.approx(18 * 18, rel=0.1)
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-6)


def test_half_of_a_voxel_counts_as_half():
    class Half(torch.nn.Module):
        groups, totals = {"half_ml": [1]}, {}

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.zeros(1, 2, *x.shape[2:])

    assert Segmenter(Half())(np.zeros((4, 4, 4)), (10, 10, 10)) == {"half_ml": pytest.approx(32.0)}


def test_an_older_segmenter_without_a_finest_level_is_read(tmp_path):
    network = SegmentationUNet(GROUPS, (4, 8))
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["arguments"]["finest"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Segmenter.from_pretrained(tmp_path)(ball(0)[0][0], (2, 2, 5)).keys() == GROUPS.keys()
    with_finest = SegmentationUNet(GROUPS, (4, 8), finest=4)
    assert with_finest(torch.rand(1, 1, 17, 18, 20)).shape == (1, 3, 17, 18, 20)
    assert with_finest.features(torch.rand(1, 1, 17, 18, 20)).shape == (1, 8 + 3 * 27 + 8)


def test_the_loss_is_least_at_the_shares_themselves():
    """A thin sheet that fills 0.3 of its voxels: a soft Dice loss would rather see 0 or 1 there."""
    shares = torch.zeros(1, 2, 4, 4, 4)
    shares[:, 1, 1] = 0.3
    shares[:, 1, 2:] = 0.01
    shares[:, 0] = 1 - shares[:, 1]

    def loss(share: float) -> float:
        asked = shares.clone()
        asked[:, 1, 1], asked[:, 0, 1] = share, 1 - share
        return float(loss_of_shares(asked.clamp_min(1e-6).log(), shares))

    found = {share: loss(share) for share in (0.05, 0.2, 0.3, 0.4, 0.95)}
    assert min(found, key=found.__getitem__) == 0.3
