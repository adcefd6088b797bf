"""Downstream utility for segmentation, of made-up trainings whose answers are known."""

import json

import numpy as np
import pytest
import torch
import yaml

from ldm3d.conditions import ImageChannels
from ldm3d.config.read import load_config
from ldm3d.data.preparing import read_scan_table
from ldm3d.description import Sampling
from ldm3d.errors import InputError
from ldm3d.evaluation.segmentation_utility import (
    ALL,
    COPIES,
    DRAWN,
    MOVED,
    REAL,
    labels_of,
    moved,
    segmentation_utility,
    utility_of_model,
)
from ldm3d.models.segmentation import SegmentationUNet
from ldm3d.pipeline import Pipeline
from ldm3d.report.sections.regression import segmentation_section

GROUPS = {"left": [1], "right": [2]}
SHAPE = (12, 6, 6)


def person(i: int):
    """A block at the left and one at the right, whose intensity names the person."""
    shares = np.zeros((3, *SHAPE), np.float32)
    shares[1, 2:5, 2:4, 2:4], shares[2, 7:10, 2:4, 2:4] = 1, 1
    shares[0] = 1 - shares[1:].sum(axis=0)
    return (shares[1:] * (i + 1) / 100).sum(axis=0)[None], shares


class Network(torch.nn.Module):
    """Finds the right block always, and the left one for as many tested people as it was told."""

    groups = GROUPS

    def __init__(self, knows: int):
        super().__init__()
        self.knows, self.any = knows, torch.nn.Parameter(torch.zeros(1))

    def forward(self, volumes):
        found = torch.zeros(1, 3, *volumes.shape[2:])
        found[:, 0] = 0.5
        found[0, 2, 7:10, 2:4, 2:4] = 1
        number = round(100 * float(volumes.max())) - 1
        found[0, 1, 2:5, 2:4, 2:4] = float(number < self.knows)
        return found


def run(knows, **options):
    """`knows`: (people, whether every second volume is given) -> of the network."""
    seen, asked = [], {}

    def train(load, count, groups, *, seed, paint):
        volumes = [round(100 * float(load(i)[0].max())) - 1 for i in range(count)]
        random = np.random.default_rng(seed)
        seconds = [paint(i, random) for i in range(count) for _ in range(8)] if paint else []
        seen.append((seed, volumes, seconds))
        return Network(knows(count, seconds))

    def draw(i, shares, number):
        asked[number] = shares.copy()
        return np.full((1, *SHAPE), (number + 1) / 1000, np.float32)

    people = [f"sub-{i}" for i in range(8)]
    found = segmentation_utility(train, person, 30, draw, person, people, GROUPS, sizes=(4, 10, 99), seeds=range(3), **options)
    return found, seen, asked


def test_differences_are_those_of_the_networks():
    is_drawn = lambda seconds: bool(seconds) and seconds[0][0].min() > 0  # noqa: E731
    steps = []
    found, _, _ = run(
        lambda count, seconds: 8 if is_drawn(seconds) or count == 30 else 4, progress=lambda *at: steps.append(at)
    )
    assert {size for size, _ in found.scores} == {4, 10, 30}  # of 99 there are too few
    assert found.mean(4, REAL)[0] == pytest.approx(0.75)  # the right block, and the left one of half of the people
    assert found.mean(10, DRAWN)[0] == 1 and found.mean(30, ALL) == (1, (1, 1))
    difference, (low, high) = found.mean(10, DRAWN, MOVED)
    assert difference == pytest.approx(0.25) and 0 < low < difference < high < 0.5
    assert steps == [(n + 1, 21) for n in range(21)]
    row = next(row for row in found.to_dict() if (row["people"], row["trained_on"]) == (4, DRAWN))
    assert row["beyond real"][0] == pytest.approx(0.25) and row["seeds"] == [1, 1, 1]
    section = segmentation_section(found)
    assert section.table["rows"][2][:2] == ["4", DRAWN] and section.table["rows"][2][3].startswith("0.250\n")
    assert len(section.table["rows"]) == 7 and section.table["rows"][-1][3:] == ["", ""]


def test_all_kinds_of_a_size_see_the_same_people_and_their_volumes():
    _, seen, asked = run(lambda count, seconds: 8)
    for seed in range(3):
        people = [volumes for own, volumes, _ in seen if own == seed]
        assert people[0] == people[1] == people[2] == people[3][:4] and sorted(people[-1]) == list(range(30))
        drawn = [seconds for own, volumes, seconds in seen if own == seed and seconds and seconds[0][0].min() > 0]
        for seconds in drawn:
            for n, (volume, shares) in enumerate(seconds):
                number = round(1000 * float(volume.max())) - 1
                assert number // COPIES % 30 == people[3][n // 8] and number // COPIES // 30 == seed
                assert shares.shape == (3, *SHAPE) and np.allclose(shares.sum(axis=0), 1)
                np.testing.assert_array_equal(asked[number], person(0)[1][1:])  # drawn of the label map as it is
        assert 10 < len({float(volume.max()) for volume, _ in drawn[1]}) <= COPIES * 10  # kept, and drawn again of nobody
        assert len({shares.tobytes() for _, shares in drawn[1]}) > 30  # and moved anew each time
    assert seen[0][1] != seen[7][1]  # other people with another seed


def test_a_moved_volume_has_its_labels():
    for seed in range(20):
        volume, shares = moved(person(49), np.random.default_rng(seed))
        np.testing.assert_allclose(volume[0], shares[1:].sum(axis=0) / 2)
    places = {moved(person(1), np.random.default_rng(seed))[1].tobytes() for seed in range(20)}
    assert len(places) > 15


@pytest.fixture
def of_labels(experiment, conditioned):
    """A pipeline that draws scans of label maps, of a network that was not trained, with the config of its data."""
    conditions = yaml.safe_load((conditioned / "config.yaml").read_text())["diffusion"]["conditions"]
    config = load_config(conditioned / "config.yaml", [f"diffusion.conditions={json.dumps(conditions[1:2])}"])
    pipe = Pipeline.from_pretrained(experiment / "run/model", "cpu", torch.float32)
    (labels,) = config.given_conditions
    channels = ImageChannels([labels], pipe.autoencoder).count
    torch.manual_seed(0)
    unet = type(pipe.unet)(**{**pipe.unet.arguments, "image_channels": channels}).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(pipe.autoencoder, unet, pipe.schema, pipe.grid, pipe.process, pipe.target, conditions=(labels,)), config


def test_of_a_model(of_labels):
    pipe, config = of_labels
    scans, seen = read_scan_table(config), {}

    def train(load, count, groups, *, seed, paint):
        if paint and "drawn" not in seen and count == 3:
            pairs = [paint(i % 3, np.random.default_rng(i)) for i in range(12)]
            seen["drawn" if "moved" in seen else "moved"] = [load(i) for i in range(3)], pairs
        return SegmentationUNet(groups, (2, 4))

    trained, others = (scans[scans["split"] == split].reset_index(drop=True) for split in ("train", "test"))
    sampling = Sampling(sampler="euler", steps=1)
    found = utility_of_model(pipe, config, trained, others, train, sampling, tested=1, sizes=(3,), seeds=[0])
    assert found.groups == ["inside", "rest"] and set(found.people) <= set(others["subject"])
    own, drawn = seen["drawn"]
    assert {np.shape(volume) for volume, _ in own + drawn} == {(1, *pipe.output_grid.shape)}
    for volume, shares in own:
        assert shares[1:, volume[0] > 0.9].sum(axis=0).min() > 0.5  # the labels are those of the scan
    own_sums = [shares.sum(axis=(1, 2, 3)) for _, shares in own]
    for i, (volume, shares) in enumerate(drawn):
        np.testing.assert_allclose(shares[1].sum(), own_sums[i % 3][1], rtol=1e-3)
        np.testing.assert_allclose(shares.sum(axis=(1, 2, 3)), own_sums[i % 3], rtol=0.08)  # the rest reaches to the border
        assert np.std(volume) > 0 and all(np.abs(volume - each).mean() > 1e-3 for each, _ in own)
    assert labels_of(pipe).name == "labels"
    pipe.conditions = ()
    with pytest.raises(InputError, match="draws scans of label maps alone"):
        utility_of_model(pipe, config, trained, others, train, sampling)


def test_too_few_people():
    with pytest.raises(InputError, match="2 people with label maps to train on and 1 to test on"):
        segmentation_utility(None, person, 2, None, person, ["a"], GROUPS)
