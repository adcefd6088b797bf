"""Trainings killed, stopped, and robbed of their last checkpoint: the same command ends where an uninterrupted run ends."""

import functools
import itertools
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from torture.outcome import Outcome
from torture.runs import STEPS, differences, finish, make_experiment, send, start, step_of, train, wait_for

from ldm3d.preemption import REQUEUE

VARIANTS = list(itertools.product(("autoencoder", "diffusion"), (1, 2), ("no", "bf16")))
PRECISIONS = {"no": "float32", "bf16": "bfloat16"}


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "with a bit flipped": _flip_a_bit,
    "missing": Path.unlink,
}


def run(kills: int = 20, seed: int = 0) -> list[Outcome]:
    """Kill each variant of training (stage, processes, precision) in its turn, at `kills` random moments in all.

    A third of the moments are while a checkpoint is being written, a third in the midst of a random step, a third at any time
    after the start.
    """
    rng, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_experiment(folder)
        shares = [kills // len(VARIANTS) + (i < kills % len(VARIANTS)) for i in range(len(VARIANTS))]
        for (stage, processes, precision), share in zip(VARIANTS, shares):
            started = time.monotonic()
            whole = _uninterrupted(folder, config, stage, processes, precision)
            again = _copy(folder, whole, stage, "killed")
            for _ in range(share):
                launch = functools.partial(train, stage, config, again, precision, processes)
                _kill_once(rng, launch, again / f"{stage}-training")
            finish(train(stage, config, again, precision, processes))
            lost = differences(whole, again, stage)
            what = f"kill -9, {stage}, {processes} process{'es' if processes > 1 else ''}, {PRECISIONS[precision]}"
            found.append(Outcome(what, share, share if lost else 0, time.monotonic() - started, "; ".join(lost)))
        found += [_signals(folder, config), _damaged(folder, config)]
    return found


def _uninterrupted(folder: Path, config: Path, stage: str, processes: int, precision: str) -> Path:
    """Output of a run from start to end; stage 2 starts from what stage 1 left on one process in float32."""
    output = folder / f"{stage}-{processes}-{precision}"
    if stage == "diffusion":
        base = folder / "autoencoder-1-no"
        if not (base / "latents").is_dir():
            finish(start("ldm3d", "encode", config, "--set", f"output={base}"))
        shutil.copytree(base / "autoencoder", output / "autoencoder")
        shutil.copytree(base / "latents", output / "latents")
        shutil.copytree(base / "prepared", output / "prepared")
    else:
        shutil.copytree(folder / "run/prepared", output / "prepared")
    finish(train(stage, config, output, precision, processes))
    return output


def _copy(folder: Path, whole: Path, stage: str, name: str) -> Path:
    """Another output that a training of this stage can start from, with nothing of the training itself."""
    output = folder / f"{whole.name}-{name}"
    made = {"autoencoder": ("autoencoder", "latents"), "diffusion": ("model",)}[stage]
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns(f"{stage}-training"))
    for part in made:
        shutil.rmtree(output / part, ignore_errors=True)
    return output


def _kill_once(rng: random.Random, launch, run: Path) -> None:
    """Start a training and kill it before it ends."""

    def half_written() -> set[tuple]:
        return {(path.name, path.stat().st_ctime_ns) for path in (run / "checkpoints").glob("partial-*")}

    while True:
        before, done = half_written(), step_of(run)
        target = rng.randint(min(done + 1, STEPS - 1), STEPS - 1)
        process, kind = launch(), rng.randrange(3)
        if kind == 0:
            hit = wait_for(process, lambda before=before: half_written() - before)
        elif kind == 1:
            hit = wait_for(process, lambda target=target: step_of(run) >= target)
            time.sleep(rng.random() * 0.1)
        else:
            until = time.monotonic() + rng.random() * 15
            hit = wait_for(process, lambda until=until: time.monotonic() > until)
        hit = hit and process.poll() is None
        send(process)
        process.communicate()
        if hit:
            return
        shutil.rmtree(run)  # it was done before the moment came: once more from the start


def _signals(folder: Path, config: Path) -> Outcome:
    """SIGTERM and SIGUSR1: a checkpoint at once, the exit code for requeueing, and the same end."""
    started, lost, details = time.monotonic(), 0, []
    cases = [(signal.SIGTERM, "autoencoder", 1), (signal.SIGUSR1, "diffusion", 1), (signal.SIGTERM, "diffusion", 2)]
    for number, stage, processes in cases:
        whole = folder / f"{stage}-{processes}-no"
        again = _copy(folder, whole, stage, f"signal-{number}")
        run = again / f"{stage}-training"
        process = train(stage, config, again, processes=processes)
        wait_for(process, lambda run=run: step_of(run) >= 5)
        send(process, number)
        output, _ = process.communicate()
        problems = [] if "run the same command to continue from there" in output else ["no word of it"]
        if processes == 1 and process.returncode != REQUEUE:  # torchrun turns any code into 1
            problems.append(f"exit code {process.returncode}")
        finish(train(stage, config, again, processes=processes))
        problems += differences(whole, again, stage)
        lost += bool(problems)
        details += problems
    return Outcome("SIGTERM and SIGUSR1", len(cases), lost, time.monotonic() - started, "; ".join(details))


def _damaged(folder: Path, config: Path) -> Outcome:
    """The last checkpoint cut, changed or partly gone: the one before is taken, and the end is the same."""
    started, lost, details, tried = time.monotonic(), 0, [], 0
    whole = folder / "diffusion-1-no"
    again = _copy(folder, whole, "diffusion", "damaged")
    checkpoints = again / "diffusion-training/checkpoints"
    finish(train("diffusion", config, again, steps=STEPS))
    for name, (what, damage) in itertools.product(("tensors.safetensors", "state.json", "SHA256SUMS"), DAMAGES.items()):
        damage(checkpoints / f"step-{STEPS:08d}" / name)
        output = finish(train("diffusion", config, again))
        problems = [] if "is damaged" in output else ["no word of it"]
        problems += differences(whole, again, "diffusion")
        tried, lost = tried + 1, lost + bool(problems)
        details += [f"{name} {what}: {problem}" for problem in problems]
        shutil.rmtree(checkpoints / f"damaged-step-{STEPS:08d}")
    return Outcome("last checkpoint damaged", tried, lost, time.monotonic() - started, "; ".join(details))
