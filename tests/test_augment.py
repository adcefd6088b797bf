"""Volumes painted from label maps: mixtures at borders, contrasts of all kinds, labels that stay on their tissues."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ldm3d.data import augment
from ldm3d.data.augment import paint, random_place, vary
from ldm3d.data.labels import at_points, shares_on_grid
from ldm3d.geometry import resample
from ldm3d.rulers.segmenter import dice
from ldm3d.training.segmenter import train_segmenter

SHAPE = (20, 22, 20)
FINE, COARSE = np.diag([1.0, 1, 1, 1]), np.diag([2.0, 2, 2, 1])
GROUPS = {"core": [4, 43], "shell": [2]}


def label_map(i: int = 0):
    """A core (label 4; 43 on its right side) within a shell (2) within fluid (24), (1, 40, 44, 40) at 1 mm."""
    rng = np.random.default_rng(i)
    shape = tuple(2 * n for n in SHAPE)
    centre = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
    distance = np.sqrt(sum((x - c) ** 2 for x, c in zip(np.ix_(*(np.arange(n) for n in shape)), centre)))[None]
    radius = rng.uniform(6, 9)
    labels = np.select([distance < radius, distance < radius + 5, distance < radius + 7], [4, 2, 24], 0)
    labels[:, labels.shape[1] // 2 :][labels[:, labels.shape[1] // 2 :] == 4] = 43
    return labels.astype(np.int32)


def painted_with_labels(seed: int):
    """A painted volume, and the labels of the nearest voxels, both (1, *SHAPE)."""
    random = np.random.default_rng(seed)
    placed = random_place(COARSE, SHAPE, random)
    volume = paint(at_points(label_map(), FINE, placed, SHAPE), random)
    return volume, resample(label_map(), FINE, placed, SHAPE, "nearest")


def test_labels_lie_on_what_was_painted_wherever_the_grid_was_moved(monkeypatch):
    monkeypatch.setattr(augment, "DEVIATION", 0.0)
    places = set()
    for seed in range(6):
        volume, labels = painted_with_labels(seed)
        assert volume.shape == labels.shape == (1, *SHAPE) and volume.dtype == np.float32
        assert volume.min() >= 0 and volume.max() <= 1 and (volume[labels == 0] < 0.1).mean() > 0.8
        for group in ((2,), (4, 43)):  # away from borders a tissue has one intensity, both sides of a structure too
            inside = torch.from_numpy(np.isin(labels, group)).float()[None]
            whole = F.avg_pool3d(inside, 3, 1, 1)[0].numpy() > 0.999
            if whole.sum() > 5:
                assert volume[whole].std() < 0.01, (seed, group)
        places.add(tuple(np.round(np.argwhere(labels[0] > 0).mean(axis=0), 1)))
    assert len(places) == 6


def test_contrasts_are_of_all_kinds():
    brighter = 0
    for seed in range(30):
        volume, labels = painted_with_labels(seed)
        brighter += volume[np.isin(labels, (4, 43))].mean() > volume[labels == 2].mean()
    assert 8 <= brighter <= 22


def test_voxels_at_a_border_are_mixtures(monkeypatch):
    """A plane that cuts voxels in two: half of the intensity, where picking one label a voxel would give all or nothing."""
    monkeypatch.setattr(augment, "DEVIATION", 0.0)
    labels = np.zeros((1, 40, 44, 40), np.int32)
    labels[:, 20:] = 2
    half_a_voxel_on = COARSE.copy()
    half_a_voxel_on[0, 3] = -0.5
    volume = paint(at_points(labels, FINE, half_a_voxel_on, SHAPE), np.random.default_rng(0))
    row = volume[0, :, 11, 10]
    assert 0.15 < row[10] < 0.85 and row[8] < 0.02 and row[12] == pytest.approx(1, abs=0.02)


def test_varied_volumes_stay_in_range_and_follow_from_their_random_numbers():
    volume = paint(at_points(label_map(), FINE, COARSE, SHAPE), np.random.default_rng(0))
    varied = [vary(volume, np.random.default_rng(seed)) for seed in (0, 0, *range(1, 8))]
    assert all(v.shape == volume.shape and v.dtype == np.float32 and v.min() >= 0 and v.max() <= 1 for v in varied)
    assert np.array_equal(varied[0], varied[1])
    assert len({round(float(v.mean()), 5) for v in varied}) == 8
    assert 0.01 < np.mean([abs(v - volume).mean() for v in varied]) < 0.2


@pytest.mark.slow
def test_a_segmenter_trained_on_painted_volumes_reads_a_contrast_that_no_scan_has():
    """Scans have a dark core in a bright shell; the test inverts them."""
    maps = [label_map(i) for i in range(12)]

    def load(i: int, inverted: bool = False):
        labels = maps[i][:, ::2, ::2, ::2]
        shares = shares_on_grid(labels, COARSE, COARSE, SHAPE, GROUPS)
        means = np.zeros(44)
        means[[2, 4, 43, 24]] = (0.4, 0.9, 0.9, 0.15) if inverted else (0.9, 0.35, 0.35, 0.15)
        return means[labels].astype(np.float32), shares

    def painted(i: int, random: np.random.Generator):
        placed = random_place(COARSE, SHAPE, random)
        points = at_points(maps[i], FINE, placed, SHAPE)
        return paint(points, random), shares_on_grid(maps[i], FINE, placed, SHAPE, GROUPS)

    own, other = (train_segmenter(load, 9, GROUPS, steps=300, paint=each) for each in (None, painted))
    on_inverted = [np.mean(dice(network, lambda i: load(i, True), (9, 10, 11))["core"]) for network in (own, other)]
    assert on_inverted[1] > 0.65 and on_inverted[1] > on_inverted[0] + 0.3, on_inverted
