"""The demo's clock: what it expects, and what it says of parts that took other times."""

from pathlib import Path

import numpy as np
import pytest

from ldm3d import demo, demo_clock
from ldm3d.config.read import load_config
from ldm3d.data.phantoms import default_spacing, draw_person
from ldm3d.data.splits import MIN_TEST_SUBJECTS, assign_splits
from ldm3d.demo_clock import Clock, expected_seconds, minutes

TOY = Path(__file__).parents[1] / "configs/toy.yaml"
SMALL = ["data.grid.shape=[16, 16, 16]", "autoencoder.network.channels=[8, 8]", "diffusion.network.channels=[32, 32, 32]"]


class Now:
    """A time that passes when it is told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def test_parts_that_take_known_times():
    now = Now()
    clock = Clock({"one": 60.0, "two": 100.0, "not run": 9.0}, now)
    for part, seconds in (("one", 75.0), ("two", 90.0)):
        with clock.part(part):
            now.seconds += seconds
    assert clock.took == {"one": 75.0, "two": 90.0}
    assert "about 3 minutes here: one 60 s, two 100 s, not run 9 s" in clock.announce()
    assert clock.summary().splitlines()[-1].split() == ["together", "165", "s", "expected", "160", "s"]


def test_another_program_s_bursts_do_not_lengthen_the_estimate(monkeypatch):
    """The first time is for loading kernels; of the others most are disturbed."""
    times = iter([4.1, 0.2, 3.9, 0.9, 4.0])
    monkeypatch.setattr(demo_clock, "seconds_of", lambda work: next(times))
    done = []
    assert demo_clock.shortest_seconds_of(lambda: done.append(1)) == 0.2 and len(done) == 1


def test_minutes_are_said_by_halves():
    assert [minutes(seconds) for seconds in (4, 60, 80, 610)] == ["0.5 minutes", "1 minute", "1.5 minutes", "10 minutes"]


def test_the_estimate_is_the_sum_of_what_each_part_repeats(monkeypatch):
    """Seconds of every unit known: a tenth of what is expected would be wrong, and so would be twice."""
    config = load_config(TOY)
    monkeypatch.setattr(demo_clock, "seconds_of", lambda work: 5.0)
    monkeypatch.setattr(demo_clock, "_data_seconds", lambda config: (0.1, 0.2))
    monkeypatch.setattr(demo_clock, "training_seconds", lambda config: (0.01, 1.0, 0.5, 0.02))
    monkeypatch.setattr(demo_clock, "_evaluation_seconds", lambda config: ((1.0, 2.0), 0.5, 0.25))
    found = expected_seconds(config, 100, 10, 20, 30, 4)
    start, launch = 5.0 * demo_clock.START, 5.0 * demo_clock.LAUNCH
    one, two, share = config.autoencoder, config.diffusion, config.data.splits
    scored = round(100 * share.validation) * -(-one.training.steps // one.training.validate_every)
    encoded = round(100 * (1 - share.validation - share.test))
    stage_1 = 0.01 * one.linear_path_steps + one.training.steps + 2 * scored * 0.5 + encoded * 0.02
    assert found == pytest.approx(
        {
            "toy brains": start + 10,
            "prepare": start + 20,
            "train the autoencoder": launch + stage_1,
            "encode": start + 2,
            "train the diffusion model": launch + 0.5 * two.training.steps,
            "generate a sweep": start + 8,
            "evaluate": demo_clock.STATISTICS * 5 + 10 * (0.5 + 2 * 0.25) + 50 * 1.25,
        }
    )


def test_every_part_is_measured_on_this_machine(monkeypatch, tmp_path, capsys):
    """On a small grid; a demo whose data is there expects no time for it."""
    monkeypatch.setattr(demo_clock.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(demo, "shipped", dict)  # none, see test_shipped.py
    config = load_config(TOY, [*SMALL, f"output={tmp_path / 'run'}"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/participants.tsv").touch()
    clock = demo.start_clock(config, tmp_path)
    assert clock.expected.pop("toy brains") == 0
    assert len(clock.expected) == 6 and all(seconds > 0 for seconds in clock.expected.values())
    assert "this will take about" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # it leaves nothing behind


@pytest.mark.parametrize("size", [demo.FULL, demo.QUICK], ids=["full", "quick"])
def test_the_demo_has_nothing_to_warn_of_in_its_own_toys(size):
    """Heads fit into the Grid, and what is asked for lies in the range that training sees."""
    config = load_config(TOY, list(size.settings))
    shape, spacing = config.data.grid.shape, config.data.grid.spacing_mm
    assert default_spacing(shape) == pytest.approx(spacing[0] if isinstance(spacing, tuple | list) else spacing)
    labels = [f"{i + 1:04d}" for i in range(size.subjects)]
    split = assign_splits(labels, config.data.splits)
    assert min(list(split.values()).count("test"), size.generated) >= max(MIN_TEST_SUBJECTS, 12)  # 12: for realism
    rng = np.random.default_rng
    people = {label: draw_person(rng([0, i, 0])) for i, label in enumerate(labels)}
    ages = {name: [people[s].age_years for s in labels if split[s] == name] for name in ("train", "test")}
    volumes = [people[s].ventricles_ml for s in labels if split[s] == "train"]
    assert min(ages["train"]) <= min(*ages["test"], *demo.AGES) and max(ages["train"]) >= max(*ages["test"], *demo.AGES)
    assert min(volumes) < min(demo.VENTRICLES_ML) and max(volumes) > max(demo.VENTRICLES_ML)
