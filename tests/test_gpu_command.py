"""`make gpu`: what a part does with its time, and every part with tiny sizes on this machine."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_end_to_end import another_run

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "benchmarks/gpu.py")]
WHERE = {"device": "a card", "dry": True}


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("gpu_parts.part")


def state(folder: Path) -> dict:
    return json.loads((folder / "part-1-checks.json").read_text())


def test_a_part_goes_on_where_it_was_and_does_nothing_twice(parts, tmp_path):
    done = []

    def item(name, fails=False):
        def run():
            done.append(name)
            if fails:
                raise ValueError("no kernel")
            return {"seconds_a_volume": float("nan") if name == "b" else 0.5}

        return run

    part = parts.Part(1, "checks", tmp_path, 60, True, where=WHERE)
    assert part.do("a", item("a"))["seconds_a_volume"] == 0.5
    assert part.do("b", item("b"), needs=100) is None  # there is less time
    assert part.do("c", item("c", fails=True)) is None
    part.close()
    found = state(tmp_path)
    assert (list(found["items"]), list(found["left_out"]), found["complete"]) == (["a"], ["b"], False)
    assert "no kernel" in found["failed"]["c"]

    part = parts.Part(1, "checks", tmp_path, 200, True, where=WHERE)
    for name in "abc":
        part.do(name, item(name), needs=100)
    part.close()
    assert done == ["a", "c", "b", "c"]
    assert state(tmp_path)["complete"] and parts.is_complete(tmp_path / "part-1-checks.json")
    assert state(tmp_path)["items"]["b"]["seconds_a_volume"] is None  # JSON has no NaN


def test_an_item_that_ends_the_process_is_noted_and_the_rest_done(parts, tmp_path):
    def dies():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    part = parts.Part(1, "checks", tmp_path, 60, True, where=WHERE)
    with pytest.raises(SystemExit) as ended:
        part.do("a", dies)
    assert ended.value.code == parts.RESTART
    part.state["running"] = "b"  # and this one is killed
    part.write()
    part = parts.Part(1, "checks", tmp_path, 60, True, retry=False, where=WHERE)
    assert part.do("a", dies) is None and part.do("b", dies) is None
    assert part.do("c", lambda: {}) is not None
    assert part.state["failed"].keys() == {"a", "b"}


def test_results_of_another_machine_are_not_mixed(parts, tmp_path):
    parts.Part(1, "checks", tmp_path, 60, True, where=WHERE).do("a", dict)
    with pytest.raises(parts.InputError, match="name another OUT"):
        parts.Part(1, "checks", tmp_path, 60, True, where=WHERE | {"device": "another card"})


def test_missing_packages_are_named(parts):
    gpu = importlib.import_module("gpu")
    assert list(gpu.missing_modules(("json", "a_package_that_is_not_there"))) == ["a_package_that_is_not_there"]
    assert gpu.missing_modules(gpu.MODULES) == {}


def test_the_time_limits(parts):
    gpu = importlib.import_module("gpu")
    assert max(gpu.SECONDS.values()) + gpu.GRACE <= 9 * 60
    assert sum(gpu.SECONDS.values()) + len(gpu.SECONDS) * 5 <= 25 * 60  # imports


def test_without_a_gpu_it_says_what_can_be_done():
    done = subprocess.run(COMMAND, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT)
    assert done.returncode == 1 and "make gpu DRY=1" in done.stderr


@pytest.mark.parametrize("number, first", [pytest.param(2, "matrix rate", marks=pytest.mark.slow), (3, "data"), (4, "data")])
def test_a_part_without_time_leaves_out_all(parts, tmp_path, number, first):
    gpu = importlib.import_module("gpu")
    out = tmp_path / "results"
    gpu.work(argparse.Namespace(part=[number], out=out, data=None, here=0.0, dry=True, leave_failed=False))
    found = json.loads((out / f"part-{number}-{gpu.TITLES[number]}.json").read_text())
    assert next(iter(found["left_out"])) == first
    assert (found["items"], found["failed"], found["complete"]) == ({}, {}, False)


def test_a_training_takes_as_many_steps_as_fit(parts, experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    training = importlib.import_module("gpu_parts.training")
    config, part = another_run(experiment, tmp_path, "diffusion"), parts.Part(3, "brains", tmp_path, 600, True, where=WHERE)
    found, planned = part.do("diffusion", training.fit(part, "diffusion", config, -1)), part.items["steps of the diffusion"]
    assert (planned["measured"], planned["steps"], planned["asked"]) == (1, 2, 8)  # no time, so one more
    assert found["last"]["step"] == 2 and found["skipped_steps"] == 0
    del part.items["diffusion"]
    planned["steps"] = 8  # a later start, with too little time
    assert part.do("diffusion", training.fit(part, "diffusion", config, -1)) is None
    assert "1 more steps of 8" in part.state["left_out"]["diffusion"]
    assert part.do("diffusion", training.fit(part, "diffusion", config, 600))["last"]["step"] == 8
    assert (tmp_path / "part-3-diffusion-preview.png").is_file()


def dry(number: int, folder: Path, *options: str) -> dict:
    """A part with tiny sizes; its results."""
    out = folder / "results"
    command = [*COMMAND, "--dry", "--part", str(number), "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(next(out.glob(f"part-{number}-*.json")).read_text())
    assert found["failed"] == {} and found["left_out"] == {} and found["complete"], done.stdout[-4000:]
    assert options or f"## Part {number}" in (out / "summary.md").read_text()
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 16e6
    return found["items"]


@pytest.mark.slow
def test_checks(tmp_path):
    items = dry(1, tmp_path)
    passed = [name for name, item in items.items() if item.get("outcome") == "passed"]
    assert len(passed) > 20
    assert "test_fsdp2_on_one_process" in passed and items["test_convolutions[torch.bfloat16]"]["error"] < 0.01


@pytest.mark.slow
def test_speed(tmp_path):
    items = dry(2, tmp_path)
    assert items["profile of a step of the diffusion"]["milliseconds"]
    assert (tmp_path / "results/profile-diffusion.txt").stat().st_size > 1000
    assert 0 < items["toy, train-diffusion, ldm3d, batch 2"]["of_matmul_rate"] < 2


@pytest.mark.slow
def test_brains(tmp_path):
    items = dry(3, tmp_path)
    assert items["diffusion"]["finished"] and items["volumes in groups of 2"]["seconds_a_volume"] > 0
    assert (tmp_path / "results/part-3-generated.png").is_file()
    assert (tmp_path / "results/evaluation/metrics.json").is_file()


@pytest.mark.slow
def test_large(tmp_path):
    items = dry(4, tmp_path, "--here", "300")
    for stage in ("autoencoder", "diffusion"):
        planned = items[f"steps of the {stage}"]
        assert planned["measured"] < planned["steps"] <= planned["asked"] and planned["steps_per_second"] > 0
        assert items[stage]["skipped_steps"] == 0 and items[stage]["last"]["step"] == planned["steps"]
    assert items["pictures"]["volumes"] == 2
    pictures = "real", "reconstructed", "generated", "autoencoder-preview", "diffusion-curves"
    assert {f"part-4-{name}.png" for name in pictures} <= {path.name for path in (tmp_path / "results").iterdir()}
