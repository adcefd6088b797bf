"""Generation by two processes, killed with all they hold at random moments, against one that was left alone."""

import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torture.outcome import Outcome

from ldm3d import cli
from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.description import Sampling
from ldm3d.diffusion.schedules import make_process
from ldm3d.generation.run import generate
from ldm3d.geometry import Grid
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.unet import UNet
from ldm3d.pipeline import Pipeline

PROCESSES = 2
LONGEST_START = 120  # seconds until a process has written its first volume, on a busy machine


def make_pipeline(channels: int = 4, side: int = 16) -> Pipeline:
    """A model with random weights: of no use, but as exact as any."""
    torch.manual_seed(0)
    schema = CovariateSchema(
        (
            Covariate("age", "continuous", unit="years", mean=50, std=20),
            Covariate("sex", "categorical", categories=("F", "M")),
        )
    )
    autoencoder = Autoencoder(2, 4, (channels, 2 * channels), blocks=1)
    unet = UNet(2, 2, schema.num_categories, (4 * channels, 8 * channels), 1, (False, True), head_channels=16, context_dim=16)
    for network in (autoencoder, unet):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        network.eval().requires_grad_(False)
    sampling = Sampling(sampler="euler", steps=2, guidance=1.5)
    return Pipeline(autoencoder, unet, schema, Grid.centred((side,) * 3, (10.0,) * 3), make_process("flow"), "v", sampling)


def run(volumes: int = 1000, kills: int = 10, seed: int = 0) -> list[Outcome]:
    """Generate `volumes` with two processes, kill both (-9) at `kills` random moments, and let them finish."""
    started, rng = time.monotonic(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pipeline().save_pretrained(folder / "model")
        lines = [f"{rng.uniform(20, 90):.1f}\t{rng.choice('FM')}" for _ in range(volumes)]
        (folder / "requests.tsv").write_text("\n".join(["age\tsex", *lines]) + "\n")
        killed = folder / "killed"
        moments = [_kill_once(rng, folder, killed, volumes, last=k + 1 == kills) for k in range(kills)]
        _finish(folder, killed)
        seconds = time.monotonic() - started

        whole, pipeline = folder / "whole", Pipeline.from_pretrained(folder / "model", device="cpu")
        rows = pipeline.parse([dict(zip(("age", "sex"), line.split("\t"))) for line in lines])
        generate(pipeline, whole, rows, pipeline.sampling, batch_size=1)
        lost = differences(whole, killed, volumes)
        what = f"kill -9, {volumes:,} volumes on {PROCESSES} processes"
        detail = "; ".join(lost[:5]) or f"killed with {', '.join(map(str, moments))} volumes there"
        errors = bids_errors(killed)
        return [
            Outcome(what, kills, min(kills, len(lost)), seconds, detail),
            Outcome("their BIDS dataset", 1, int(bool(errors)), time.monotonic() - started - seconds, "; ".join(errors[:5])),
        ]


def differences(whole: Path, other: Path, volumes: int) -> list[str]:
    """What is missing, too much or not the same to the last bit in `other`, beside a series that was left alone."""
    expected, found = digests(whole), digests(other)
    lost = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    lost += [f"{name} should not be there" for name in sorted(found.keys() - expected.keys())]
    lost += [f"{name} differs" for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
    contents = {digest for name, digest in found.items() if name.endswith(".nii.gz")}
    if len(contents) != volumes:
        lost.append(f"{len(contents)} different volumes instead of {volumes}")
    rows = (other / "participants.tsv").read_text().splitlines() if (other / "participants.tsv").is_file() else []
    if len(set(rows)) != volumes + 1:
        lost.append(f"participants.tsv has {len(set(rows))} lines instead of {volumes + 1}")
    return lost


def digests(folder: Path) -> dict[str, str]:
    """The checksum of every file, hidden ones too, by its path; empty folders as well."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() or not any(path.iterdir()):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
    return found


def bids_errors(folder: Path) -> list[str]:
    """What the BIDS validator calls errors."""
    validator = Path(sys.executable).with_name("bids-validator-deno")
    done = subprocess.run([validator, folder, "--json"], capture_output=True, text=True)
    issues = json.loads(done.stdout)["issues"]["issues"]
    return [f"{issue['code']} {issue.get('location', '')}" for issue in issues if issue["severity"] == "error"]


def _start(folder: Path, out: Path, batch_size: int) -> list[BaseProcess]:
    """The command as torchrun would start it, but from a server that has imported everything: seconds less for each start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ldm3d.cli", "ldm3d.generation.run", "ldm3d.pipeline"])
    arguments = [(_command(folder, out, batch_size), rank, folder / f"log-{rank}.txt") for rank in range(PROCESSES)]
    processes = [context.Process(target=_work, args=some) for some in arguments]
    for process in processes:
        process.start()
    return processes


def _work(command: list[str], rank: int, log: Path) -> None:
    """What one process does; it says it in a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    sys.argv = command[1:]
    with open(log, "w") as sys.stdout:
        sys.stderr = sys.stdout
        cli.main()


def _command(folder: Path, out: Path, batch_size: int) -> list[str]:
    command = ["-m", "ldm3d", "generate", folder / "model", "--table", folder / "requests.tsv", "--out", out]
    return [*map(str, command), "--batch-size", str(batch_size), "--device", "cpu"]


def _kill_once(rng: random.Random, folder: Path, out: Path, volumes: int, last: bool) -> int:
    """Kill all processes after a random number of new volumes, sometimes before the first; how many are there then."""
    before = _written(out)
    wanted = before + rng.randint(0, max(1, (volumes - before) // (1 if last else 4)))
    processes, until = _start(folder, out, rng.choice((1, 4, 16))), time.monotonic() + LONGEST_START
    while _written(out) < wanted and any(p.is_alive() for p in processes) and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    for rank, process in enumerate(processes):
        assert process.exitcode in (None, 0), (folder / f"log-{rank}.txt").read_text()[-3000:]
        process.kill()
    for process in processes:
        process.join()
    return _written(out)


def _written(out: Path) -> int:
    """Volumes that are there or being written."""
    return sum(name.startswith("sub-") for name in os.listdir(out)) if out.is_dir() else 0


def _finish(folder: Path, out: Path) -> None:
    """As a user would on one machine: by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    done = subprocess.run([*launcher, *_command(folder, out, 8)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
