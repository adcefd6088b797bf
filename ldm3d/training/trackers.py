"""Trackers that other programs provide, through Accelerate: Weights & Biases, MLflow.

They get the numbers of metrics.jsonl and the settings of the training: no picture, no path and no subject, because many of
them send what they get to a server. TensorBoard's files are written in `ldm3d.training.metrics`, from metrics.jsonl.
"""

import importlib.util
import json
import secrets
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ldm3d.config.training import TrainingConfig
from ldm3d.errors import InputError
from ldm3d.files import write_atomic
from ldm3d.models.pretrained import read_json

PROJECT, RECORD = "ldm3d", "trackers.json"  # the record: the tracker's own name of a run, under which it goes on
TENSORBOARD = "tensorboard"


def external(training: TrainingConfig) -> list[str]:
    """The trackers beside TensorBoard, as Accelerate calls them.

    Raises:
        InputError: the package of one is not installed.
    """
    names = [name for name in training.tracker if name != TENSORBOARD]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"training.tracker: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; run "
            f"`pip install {' '.join(missing)}`, or leave {'it' if len(missing) == 1 else 'them'} out"
        )
    return names


def writes_tensorboard(training: TrainingConfig) -> bool:
    """Whether its files are wanted: where the config names it, or by default where the package is installed."""
    named = "tracker" in training.model_fields_set
    return TENSORBOARD in training.tracker and (named or importlib.util.find_spec(TENSORBOARD) is not None)


def start_trackers(accelerator: Accelerator, training: TrainingConfig, run: Path) -> None:
    """Start them for a run, or let them go on where it goes on; nothing where there are none."""
    if not external(training) or not accelerator.is_main_process:
        return
    known = read_json(run / RECORD) if (run / RECORD).is_file() else {}
    known.setdefault("wandb", secrets.token_hex(8))
    write_atomic(run / RECORD, json.dumps(known) + "\n")  # before it starts: it may, and another of them may not
    name = f"{run.parent.name}/{run.name}"
    options: dict[str, dict[str, Any]] = {
        "wandb": {"name": name, "id": known["wandb"], "resume": "allow", "dir": str(run)},
        "mlflow": {"run_name": name, "run_id": known.get("mlflow")},
    }
    settings = {key: value if isinstance(value, int | float | str) else str(value) for key, value in training}
    try:
        accelerator.init_trackers(PROJECT, None, options)
        for tracker in accelerator.trackers:
            begun: dict[str, str] = {}
            if tracker.name == "mlflow":  # a run keeps the settings that it began with, and refuses others, such as more steps
                known["mlflow"], begun = tracker.tracker.info.run_id, tracker.tracker.data.params
                write_atomic(run / RECORD, json.dumps(known) + "\n")
            tracker.store_init_configuration({key: value for key, value in settings.items() if key not in begun})
    except Exception as error:  # of any kind: no login, no server, a run that was deleted there
        reason = " ".join(str(error).split())[:700]  # MLflow's way out stands at the end
        raise InputError(
            f"training.tracker: {' or '.join(external(training))} does not start ({type(error).__name__}: {reason}); log in, "
            f"or set it to {TENSORBOARD}. If the run was deleted there, delete {run / RECORD}"
        ) from None
