"""Trackers through Accelerate: what they get, that a run goes on there, what is said where they are missing."""

import importlib.util
import json
import sys
import types
import warnings

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm3d.config.training import TrainingConfig
from ldm3d.errors import InputError
from ldm3d.training.metrics import Metrics
from ldm3d.training.trackers import RECORD, external, start_trackers, writes_tensorboard

TRAINING = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; what it was asked for, in its `calls`."""
    module = types.ModuleType("wandb")
    module.calls = []

    class Run:
        def log(self, values, step=None):
            module.calls.append(("log", step, values))

        def finish(self):
            module.calls.append(("finish",))

    def init(**options):
        module.calls.append(("init", options))
        return Run()

    module.init = init
    module.config = types.SimpleNamespace(update=lambda values, **_: module.calls.append(("settings", values)))
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.WANDB])
    return module


def run_of(training: TrainingConfig, folder, first: int) -> None:
    accelerator = Accelerator(cpu=True, log_with=external(training) or None)
    start_trackers(accelerator, training, folder)
    metrics = Metrics(folder, accelerator, first, writes_tensorboard(training))
    metrics.add(first + 1, {"loss": 0.25, "other": float("nan")})
    metrics.close()
    for tracker in accelerator.trackers:
        tracker.finish()


def test_a_tracker_gets_numbers_and_settings_and_a_run_goes_on(tmp_path, wandb):
    folder = tmp_path / "toy/diffusion-training"
    folder.mkdir(parents=True)
    training = TrainingConfig(tracker="wandb", **TRAINING)
    run_of(training, folder, 0)
    run_of(training, folder, 1)
    logged = [call[1:] for call in wandb.calls if call[0] == "log"]
    assert logged == [(1, {"loss": 0.25}), (2, {"loss": 0.25})]
    first, again = (call[1] for call in wandb.calls if call[0] == "init")
    assert first["name"] == "toy/diffusion-training" and first["id"] == again["id"] and again["resume"] == "allow"
    settings = next(call[1] for call in wandb.calls if call[0] == "settings")
    assert settings["steps"] == 4 and not any("/" in str(value) for value in settings.values())
    assert json.loads((folder / RECORD).read_text())["wandb"] == first["id"]
    assert not (folder / "tensorboard").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_does_not_start_ends_in_one_message(tmp_path, wandb):
    asked = []

    def init(id, **_):
        asked.append(id)
        raise RuntimeError("no API key\nconfigured")

    wandb.init = init
    training = TrainingConfig(tracker=["tensorboard", "wandb"], **TRAINING)
    for _ in range(2):
        with pytest.raises(InputError, match=r"wandb does not start \(RuntimeError: no API key configured\); log in"):
            start_trackers(Accelerator(cpu=True, log_with=external(training)), training, tmp_path)
    assert len(asked) == 2 and len(set(asked)) == 1  # no second run there for the next try


@pytest.fixture
def mlflow(monkeypatch):
    """A stand-in for the package that refuses other settings in a run that goes on; its runs by their id."""
    module = types.ModuleType("mlflow")
    module.runs, module.on = {}, []

    def start_run(run_id=None, **_):
        run_id = run_id or f"run-{len(module.runs)}"
        params = module.runs.setdefault(run_id, {})
        module.on.append(run_id)
        return types.SimpleNamespace(
            info=types.SimpleNamespace(run_id=run_id), data=types.SimpleNamespace(params=dict(params))
        )

    def log_params(values):
        params = module.runs[module.on[-1]]
        if changed := [name for name, value in values.items() if params.get(name, str(value)) != str(value)]:
            raise ValueError(f"Changing param values is not allowed: {changed}")
        params.update({name: str(value) for name, value in values.items()})

    module.start_run, module.log_params = start_run, log_params
    module.search_experiments, module.create_experiment = lambda **_: [], lambda **_: "0"
    module.log_metrics, module.end_run = lambda *_, **__: None, lambda: None
    module.utils = types.SimpleNamespace(
        validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    )
    module.__spec__ = importlib.util.spec_from_loader("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.MLFLOW])
    return module


def test_a_run_goes_on_in_mlflow_with_more_steps(tmp_path, mlflow):
    """The commonest way to go on; MLflow itself (3.17) refused it."""
    run_of(TrainingConfig(tracker="mlflow", **TRAINING), tmp_path, 0)
    run_of(TrainingConfig(tracker="mlflow", **TRAINING | {"steps": 8}), tmp_path, 1)
    assert mlflow.on == ["run-0", "run-0"] and mlflow.runs["run-0"]["steps"] == "4"


def test_the_way_out_of_a_tracker_is_not_cut_off(tmp_path, wandb):
    def init(**_):
        raise RuntimeError("The filesystem is in maintenance mode. " * 12 + "Set MLFLOW_ALLOW_FILE_STORE=true.")

    wandb.init = init
    with pytest.raises(InputError, match="Set MLFLOW_ALLOW_FILE_STORE=true"):
        start_trackers(Accelerator(cpu=True, log_with=["wandb"]), TrainingConfig(tracker="wandb", **TRAINING), tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="wandb and mlflow are not installed; run `pip install wandb mlflow`"):
        external(TrainingConfig(tracker=["wandb", "tensorboard", "mlflow"], **TRAINING))
    assert (
        external(TrainingConfig(tracker="tensorboard", **TRAINING)) == external(TrainingConfig(tracker=[], **TRAINING)) == []
    )


def test_without_tensorboard_a_training_goes_on_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(UserWarning, match=r"not installed.*pip install 'ldm3d\[tensorboard\]'"):
        run_of(TrainingConfig(tracker="tensorboard", **TRAINING), tmp_path, 0)
    (tmp_path / "by default").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_of(TrainingConfig(**TRAINING), tmp_path / "by default", 0)  # nobody asked for it
    assert not (tmp_path / "tensorboard").exists() and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    monkeypatch.undo()
    run_of(TrainingConfig(**TRAINING), tmp_path, 1)  # now it is installed
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2]


def test_the_default_is_not_written_so_that_older_runs_go_on():
    assert "tracker" not in TrainingConfig(**TRAINING).model_dump()
    assert TrainingConfig(**TRAINING).tracker == ("tensorboard",)
