"""What parts 3 and 4 share: an experiment from data to a model, each training as long as the time allows."""

import gc
import importlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from accelerate.state import AcceleratorState

from gpu_parts.part import OutOfTime, Part
from ldm3d import figures
from ldm3d.cli.data import encode
from ldm3d.config.read import load_config
from ldm3d.config.sections import Config
from ldm3d.covariates import describe
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.data.preparing import load_prepared, prepare, read_scan_table
from ldm3d.pipeline import Pipeline
from ldm3d.preemption import REQUEUE, Stop
from ldm3d.training.metrics import read_metrics

MEASURED_STEPS, FEW_STEPS = 60, 3  # before the number of steps is chosen
SHARE = 0.8  # of the time that is left, by these steps: checkpoints, validations and a preview take some, too


@dataclass
class Clock(Stop):
    """Asks a training to stop at `end` (monotonic), or after `most` steps, and notes when each step was done."""

    end: float = float("inf")
    most: int | None = None
    moments: list[float] = field(default_factory=list)

    @property
    def asked(self) -> bool:
        self.moments.append(time.monotonic())
        if self.moments[-1] > self.end or len(self.moments) == self.most:
            self.signal = "the time limit"
        return self.signal is not None

    def steps_per_second(self) -> float:
        """Over the second half, as cuDNN chooses kernels in the first steps."""
        half = self.moments[len(self.moments) // 2 :]
        return (len(half) - 1) / (half[-1] - half[0]) if len(half) > 1 else 0.0


def write_config(source: Path, folder: Path, data: Path | None, changes: dict[str, Any]) -> Path:
    """A config of the repository with changes, below `folder`; without the covariates that the data's table lacks."""
    settings = yaml.safe_load(source.read_text())
    settings |= {"output": str(folder / "run")}
    settings["data"] |= {"bids": str(data or folder / "data"), "skull_stripped": data is not None}
    if data is None:  # phantoms lie in no template's space
        settings["data"] = {name: value for name, value in settings["data"].items() if name != "registration"}
        settings["data"]["grid"] = {name: settings["data"]["grid"][name] for name in ("shape", "spacing_mm")}
    else:
        columns = pd.read_csv(data / "participants.tsv", sep="\t", nrows=1).columns
        settings["covariates"] = [c for c in settings["covariates"] if c.get("column", c["name"]) in columns]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(merged(settings, changes), sort_keys=False))
    return folder / "config.yaml"


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes, section by section."""
    both = dict(settings)
    for key, value in changes.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and key in both else value
    return both


def make_data(config: Config, subjects: int, workers: int | None = None) -> dict[str, Any]:
    """Phantoms on the config's grid, unless the data is there; and what is prepared of it, by so many processes."""
    folder = Path(config.data.bids)
    if not (folder / "participants.tsv").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
        write_dataset(folder, subjects, config.data.grid.shape, spacing_mm=config.data.grid.spacing_mm[0], workers=workers)
    done = prepare(config, workers=workers)
    return {"scans": len(done.table), "failed": len(done.failed), "splits": done.table["split"].value_counts().to_dict()}


def fit(part: Part, stage: str, config: Path, seconds: float) -> Callable[[], dict[str, Any]]:
    """A training for at most so many seconds: some steps to measure, then as many as fit, up to those of the config.

    The number of steps is kept as an item of the part, so that a training which was stopped goes on as it began.
    """

    def run() -> dict[str, Any]:
        end = min(part.end, time.monotonic() + seconds)
        planned = f"steps of the {stage}"
        if planned not in part.items:
            probe = train(stage, config, Clock(end=end, most=FEW_STEPS if part.dry else MEASURED_STEPS))
            asked = getattr(load_config(config), stage).training.steps
            left = end - time.monotonic() - probe["seconds_before"]
            fitting = probe["steps"] + max(1, int(SHARE * left * probe["steps_per_second"]))
            steps = asked if probe["finished"] else min(asked, fitting)
            part.add(planned, {**probe, "measured": probe["steps"], "steps": steps, "asked": asked})
        steps = part.items[planned]["steps"]
        done = train(stage, config, Clock(end=end), f"training.steps={steps}")
        folder = getattr(load_config(config), f"{stage}_run")
        if not done["finished"]:
            raise OutOfTime(f"{done['steps']} more steps of {steps} were done; a checkpoint has them")
        for name, source in (("curves", folder / "curves.png"), ("preview", folder / f"preview-{steps:08d}.png")):
            if source.is_file():
                shutil.copy(source, part.folder / f"part-{part.state['part']}-{stage}-{name}.png")
        values: dict[str, float] = {}
        for row in read_metrics(folder / "metrics.jsonl"):
            values |= row
        return {"of_steps": part.items[planned]["asked"], **done, "skipped_steps": values.get("skipped_steps"), "last": values}

    return run


def train(stage: str, config: Path, clock: Clock, *settings: str) -> dict[str, Any]:
    """A training in this process, until its end or until the clock stops it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    cuda = torch.cuda.is_available()
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    finished, started = True, time.monotonic()
    try:
        importlib.import_module(f"ldm3d.training.{stage}").train(load_config(config, settings, stage), clock)
    except SystemExit as done:
        if done.code != REQUEUE:
            raise
        finished = False
    found = {"finished": finished, "steps": len(clock.moments), "steps_per_second": clock.steps_per_second()}
    found["seconds_before"] = clock.moments[0] - started if clock.moments else 0.0  # the first step
    return found | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if cuda else {})


def encode_all(config: Path) -> dict[str, Any]:
    """The latents of all scans."""
    encode(config)
    return {}


def throughput(pipeline: Pipeline, group: int) -> dict[str, Any]:
    """Seconds a volume in groups of one size, from request to array; the first group chooses kernels and plans the decode."""
    pipeline.group, pipeline.threads = group, None
    rows = pipeline.parse([{}] * group)
    list(pipeline.volumes(rows, pipeline.sampling, batch_size=group))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    list(pipeline.volumes(rows, pipeline.sampling, batch_size=group))
    seconds = time.perf_counter() - started
    found = {"group": group, "seconds_a_volume": seconds / group, "decode": pipeline.computing["decode"]}
    return found | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if torch.cuda.is_available() else {})


def pictures(part: Part, config: Config, count: int) -> dict[str, Any]:
    """Held-out volumes, and generated ones for the same covariates, as two PNG files; NaN covariates are left open."""
    pipeline = Pipeline.from_pretrained(config.model_folder)
    scans = read_scan_table(config)
    held_out = scans[scans["split"] == "test"].reset_index(drop=True).head(count)
    rows = pipeline.parse(held_out[pipeline.schema.names].to_dict("records"))
    real = [load_prepared(config, key) for key in held_out["key"]]
    generated = [volume.copy() for volume in pipeline.volumes(rows, pipeline.sampling)]
    reconstructed = [pipeline.reconstruct(torch.from_numpy(volume)[None])[0].cpu().numpy() for volume in real]
    for name, volumes in (("real", real), ("reconstructed", reconstructed), ("generated", generated)):
        figure = figures.mosaic(volumes, [describe(row) for row in rows], pipeline.grid.spacing_mm, columns=3, heading=name)
        figures.save(figure, part.folder / f"part-{part.state['part']}-{name}.png")
    psnr = [-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(real, reconstructed)]
    return {"psnr_db": float(np.mean(psnr)), "volumes": len(rows)}
