"""A disk that fills up: training and generation say so, keep what they have, and go on once there is room."""

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torture.outcome import Outcome
from torture.runs import STEPS, TRAINING, differences, finish, make_experiment, start, train, wait_for

from ldm3d.training.checkpoint import newest_intact

SIZE_MIB = 64


def run(seed: int = 0) -> list[Outcome]:
    """Fill a small file system while each stage trains and while volumes are generated."""
    started, problems = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name, _small_disk(Path(name) / "small") as disk:
        if disk is None:
            return [Outcome("disk full", 0, 0, 0.0, "not tried: a file system in memory cannot be mounted here")]
        folder = Path(name) / "large"
        folder.mkdir()
        config = make_experiment(folder)
        whole, small = folder / "run", disk / "run"
        shutil.copytree(whole / "prepared", small / "prepared")
        tried = 0
        for stage in ("autoencoder", "diffusion"):
            finish(train(stage, config, whole))
            lost = _fill_while_training(stage, config, small, disk / "ballast")
            problems += [f"{stage}: {each}" for each in (lost or differences(whole, small, stage))]
            tried += 1
            if stage == "autoencoder":
                for output in (whole, small):
                    finish(start("ldm3d", "encode", config, "--set", f"output={output}"))
        problems += _fill_while_generating(whole / "model", disk)
        tried += 1
    return [Outcome("disk full", tried, len(problems), time.monotonic() - started, "; ".join(problems))]


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of `SIZE_MIB`; None where it cannot be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(ballast: Path, room: int) -> None:
    """Leave about `room` bytes of the disk, or what others leave meanwhile."""
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while shutil.disk_usage(ballast.parent).free > room:
            file.write(bytes(4096))


def _fill_while_training(stage: str, config: Path, output: Path, ballast: Path) -> list[str]:
    """What goes wrong when there is no room for another checkpoint from some moment of a training on."""
    problems, run = [], output / f"{stage}-training"
    process = train(stage, config, output)
    wait_for(process, lambda: any((run / "checkpoints").glob("step-*")))
    _fill(ballast, room=50_000)
    said, _ = process.communicate()
    if process.returncode != 2 or "free some space" not in said or "Traceback" in said:
        problems.append(f"exit code {process.returncode}: {said[-300:]}")
    step = newest_intact(run)
    if not step or step % TRAINING["checkpoint_every"] or step == STEPS:
        problems.append(f"the checkpoint that is left is of step {step}")
    ballast.unlink()
    finish(train(stage, config, output))
    return problems


def _fill_while_generating(model: Path, disk: Path) -> list[str]:
    problems, out, ballast = [], disk / "synthetic", disk / "ballast"
    command = ("ldm3d", "generate", model, "--num", 40, "--out", out, "--seed", 3)
    process = start(*command)
    wait_for(process, lambda: len(list(out.rglob("*.nii.gz"))) > 3)
    _fill(ballast, room=20_000)
    said, _ = process.communicate()
    if process.returncode != 2 or "Traceback" in said:
        problems.append(f"generate: exit code {process.returncode}: {said[-300:]}")
    ballast.unlink()
    finish(start(*command))
    elsewhere = disk / "again"
    finish(start("ldm3d", "generate", model, "--num", 40, "--out", elsewhere, "--seed", 3))
    for path in elsewhere.rglob("*.nii.gz"):
        if path.read_bytes() != (out / path.relative_to(elsewhere)).read_bytes():
            problems.append(f"generate: {path.name} differs")
    return problems
