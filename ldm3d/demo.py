"""The full workflow on toy brains: phantoms, both training stages, generation, evaluation; compared with goals."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np

from ldm3d.account import read_account
from ldm3d.config.read import load_config
from ldm3d.config.sections import Config
from ldm3d.data.marked import are_synthetic
from ldm3d.data.preparing import load_prepared
from ldm3d.demo_clock import Clock, drawing_seconds, expected_seconds
from ldm3d.evaluation import sweeps
from ldm3d.evaluation.assess import evaluate
from ldm3d.evaluation.results import Evaluation
from ldm3d.experiment import scans_by_use
from ldm3d.metrics.features import RandomFeatures
from ldm3d.pipeline import Pipeline
from ldm3d.preemption import REQUEUE
from ldm3d.report.page import Goal
from ldm3d.report.sections.evaluation import summary
from ldm3d.report.write import write_report
from ldm3d.rulers.volumetry import measure_volumes
from ldm3d.shipped import shipped

AGES, VENTRICLES_ML = (25, 45, 65, 85), (15, 35, 55, 75)
SHIPPED, DRAWN = "generate with a shipped model", 3


@dataclass(frozen=True)
class Size:
    """How much a demo does.

    Attributes:
        subjects: toy brains.
        generated: volumes that are evaluated.
        settings: KEY=VALUE, over those of the config.
        learns: whether that is enough for goals to be reached, and long enough for its time to be announced.
    """

    subjects: int
    generated: int
    settings: tuple[str, ...] = ()
    learns: bool = True


FULL = Size(1000, 64)
QUICK = Size(
    subjects=40,
    generated=12,  # as many as realism is measured on, and are held out
    settings=(
        "data.grid={shape: [24, 32, 24], spacing_mm: 7.5}",  # holds any toy head
        "data.splits={validation: 0.1, test: 0.3, seed: 4}",  # nobody held out is, say, older than all in training
        "autoencoder.network.channels=[16, 32]",
        "autoencoder.training.steps=20",
        "diffusion.network.channels=[16, 32, 64]",
        "diffusion.training.steps=60",
        "generation.steps=4",
    ),
    learns=False,
)


def run_demo(out: Path, config_path: Path, size: Size = FULL) -> None:
    """Write everything below `out`; an interrupted demo continues where it stopped."""
    data, output = out / "data", out / "run"
    settings = [*size.settings, f"data.bids={data}", f"output={output}"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    config = load_config(config_path, settings)
    clock = start_clock(config, out, size)
    experiment = [config_path, *overrides]
    launch = ["accelerate.commands.launch", "--quiet", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "-m"]
    shape = [str(n) for n in config.data.grid.shape]
    steps = {
        "toy brains": ["ldm3d", "phantoms", data, "--subjects", size.subjects, "--shape", *shape],
        "prepare": ["ldm3d", "prepare", *experiment],
        "train the autoencoder": [*launch, "ldm3d.training.autoencoder", *experiment],
        "encode": ["ldm3d", "encode", *experiment],
        "train the diffusion model": [*launch, "ldm3d.training.diffusion", *experiment],
    }
    for title, command in steps.items():
        if title != "toy brains" or not (data / "participants.tsv").is_file():
            with clock.part(title):
                _step(title, *command)

    pipeline = Pipeline.from_pretrained(config.model_folder)
    sweep = out / "generated"
    if not (sweep / "participants.tsv").is_file():
        with clock.part("generate a sweep"):
            _headline("generate a sweep of ages and ventricular volumes")
            rows = pipeline.parse([{"age": a, "ventricular_volume_ml": v} for a in AGES for v in VENTRICLES_ML])
            numbers = [0] * len(rows)  # the same noise for all, so that only the covariates differ
            volumes = pipeline.volumes(rows, pipeline.sampling, numbers=numbers)
            pipeline.write(sweep, volumes, rows, pipeline.sampling, numbers=numbers)
    with clock.part("evaluate"):
        goals, page = _evaluate(pipeline, data, out, size)
    beside = _draw_shipped(out / "shipped", clock)
    for goal in goals:
        verdict = "reached" if goal.reached else "NOT REACHED"
        print(f"{verdict:12} {goal.name}: {goal.found:.3f} {goal.unit} (goal: {goal.wanted})")
    if size.learns:
        print("realism and gaps, further above, are no goals of so short a training; docs/realism.md explains them")
    else:
        print("every part ran; so short a training learns next to nothing, and its volumes and figures say so")
    print(f"\n{clock.summary()}\nvolumes and mosaic: {sweep}\npage: {page}{beside}")


def start_clock(config: Config, out: Path, size: Size = FULL) -> Clock:
    """Measure and print how long the demo's parts will take here; finished parts take no time."""
    if not size.learns:
        print("every part of the demo in small, in about a minute", flush=True)
        return Clock({})
    print("measuring for about a minute how long the demo will take on this machine", flush=True)
    swept = sweeps.VALUES * sweeps.REPEATS * sum(c.kind == "continuous" for c in config.covariates)
    held_out = round(size.subjects * config.data.splits.test)
    drawn = len(AGES) * len(VENTRICLES_ML)
    expected = expected_seconds(config, size.subjects, held_out, size.generated, swept, drawn)
    finished = {
        "toy brains": out / "data/participants.tsv",
        "train the autoencoder": config.autoencoder_folder,
        "train the diffusion model": config.model_folder,
        "generate a sweep": out / "generated/participants.tsv",
    }
    if models := list(shipped()):
        expected[SHIPPED] = drawing_seconds(models[0], DRAWN)
        finished[SHIPPED] = out / "shipped/participants.tsv"
    clock = Clock({name: 0.0 if name in finished and finished[name].exists() else s for name, s in expected.items()})
    print(clock.announce(), flush=True)
    return clock


def _draw_shipped(folder: Path, clock: Clock) -> str:
    """Generate brains with the first shipped model; a line about them, or nothing where no model is shipped."""
    if not (models := list(shipped())):
        return ""
    if not (folder / "participants.tsv").is_file():
        with clock.part(SHIPPED):
            _headline(f"generate {DRAWN} volumes with {models[0]}, which comes with ldm3d")
            pipeline = Pipeline.from_pretrained(models[0])
            rows = pipeline.parse([{}] * DRAWN)
            pipeline.write(folder, pipeline.volumes(rows, pipeline.sampling), rows, pipeline.sampling)
    return f"\nbeside these toys, {DRAWN} volumes of the shipped model {models[0]}: {folder}"


def _evaluate(pipeline: Pipeline, data: Path, out: Path, size: Size) -> tuple[list[Goal], Path]:
    """Evaluate the model on held-out toy brains; returns the demo's goals, if it has any, and the page."""
    _headline("evaluate")
    pipeline.threads = None  # all of them: the measures do not depend on the last bits
    config, _, scans = scans_by_use(out / "run/model", data, out / "work")
    subjects = scans[pipeline.schema.names].to_dict("records")

    def load(i: int):
        return load_prepared(config, scans["key"][i])

    found = evaluate(pipeline, subjects, load, measure_volumes, pipeline.sampling, size.generated, extractor=RandomFeatures())
    found.synthetic = are_synthetic(scans, pipeline.schema.covariates)
    found.analyse_subgroups(pipeline.schema)
    goals = demo_goals(found) if size.learns else []
    account = read_account(out / "run/model")
    page = write_report(
        out / "evaluation", "ldm3d demo: toy brains", pipeline, found, pipeline.sampling, goals, account=account
    )
    print(summary(found) + "\n")
    return goals, page


def demo_goals(found: Evaluation) -> list[Goal]:
    """Goals of the toy experiment."""
    ventricles = found.find("ventricular_volume_ml", "generated").agreement
    brain = found.find("brain_volume_ml", "generated").agreement
    kept = found.find("ventricular_volume_ml", "reconstructed").agreement
    by_age = next(s for s in found.sweeps if s.covariate == "age").rank_correlation["ventricular_volume_ml"]
    return [
        Goal(
            "Reconstruction of held-out phantoms, PSNR over the whole grid", float(np.mean(found.psnr_db)), low=28, unit="dB"
        ),
        Goal("Ventricular volume, reconstructed against true, r", kept.r, low=0.95),
        Goal("Ventricular volume, generated against asked, r", ventricles.r, low=0.95),
        Goal("Ventricular volume, generated against asked, slope", ventricles.slope, low=0.8, high=1.2),
        Goal("Brain volume, generated against asked, r", brain.r, low=0.9),
        Goal("Ventricles ordered by age where only age is asked, rank correlation", by_age, low=1.0),
    ]


def _headline(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _step(title: str, *command) -> None:
    """Run a module as a user would, and show its output. A signal to the demo ends all of its processes."""
    _headline(title)
    process = subprocess.Popen([sys.executable, "-m", *map(str, command)], start_new_session=True)
    stopped = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        stopped.append(signal.Signals(number).name)
        os.killpg(process.pid, signal.SIGTERM)  # training then writes a checkpoint

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        while _exists(process.pid):  # a launcher ends at once, its training after the checkpoint
            time.sleep(0.1)
        print(f"stopped by {stopped[0]}; run the same command to continue", flush=True)
        raise SystemExit(REQUEUE)
    if code:
        raise SystemExit(code)


def _exists(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
