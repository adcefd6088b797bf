"""Everything that is read from outside, damaged: each input must end in success or in one clear message and exit code 2.

Every input starts from a valid one and goes through mutations of its structure, which have names, and of its bytes. It is read
as the commands read it, in a process of its own that has SECONDS and BYTES; no pickle may be loaded there and no file opened
that lies outside of the input's folder.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hypothesis
import yaml
from torture.hostile.case import CONFIG, GRID, TABLE_OF_ONE, Case
from torture.hostile.configs import configs
from torture.hostile.models import models
from torture.hostile.names import names
from torture.hostile.reading import Reader
from torture.hostile.scans import scans
from torture.hostile.tables import tabular
from torture.outcome import Outcome

COMMANDS = 30  # inputs that go through the command line
COMMANDS_OF = {
    "model": "generate model --out out --steps 1",
    "explain": "explain model --from age=40 --to age=60 --seeds 6 --steps 1 --out out",
    "compare": "compare . --labels labels --volume age=1 --out out",
}
LONGEST_START = 300  # seconds for a command, most of them its imports on a busy machine
FAMILIES = {"NIfTI": scans(), "tables": tabular(), "configs": configs(), "models": models(), "names": names()}
SHARES = {"NIfTI": 0.35, "tables": 0.25, "configs": 0.2, "models": 0.15, "names": 0.05}


def cases_of(family: str, examples: int, seed: int, do: Callable[[Case], None]) -> None:
    """Call `do` with so many inputs of a family, the same ones for the same seed."""
    settings = hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    hypothesis.seed(seed)(settings(hypothesis.given(FAMILIES[family])(do)))()


def try_family(family: str, examples: int, seed: int, reader: Reader) -> Outcome:
    """Read so many inputs of a family; those that break the rule are kept in a folder that the outcome names."""
    started, tried, lost = time.monotonic(), [], []

    def do(case: Case) -> None:
        problem = reader.problem_of(case)
        tried.append(case.mutations)
        if problem:
            lost.append(f"{case.reader} of {', '.join(case.mutations)}: {problem}; kept in {_keep(case)}")

    cases_of(family, examples, seed, do)
    return Outcome(f"hostile {family}", len(tried), len(lost), time.monotonic() - started, "; ".join(lost[:5]))


def try_commands(examples: int, seed: int) -> Outcome:
    """The same through the command line, each in a fresh process: exit code 0 or 2."""
    started, tried, lost = time.monotonic(), [], []

    def do(case: Case) -> None:
        settings = {"config.yaml": yaml.safe_dump(CONFIG).encode(), "scans.csv": TABLE_OF_ONE.format(scan=case.scan).encode()}
        if case.reader == "BIDS":
            values = {**CONFIG, "data": {"bids": ".", "grid": GRID}}
            settings = {"config.yaml": yaml.safe_dump(values).encode()}
        arguments = COMMANDS_OF.get(case.reader, "prepare config.yaml").split()
        case = replace(case, files={**settings, **case.files})
        with tempfile.TemporaryDirectory() as name:
            case.write(Path(name))
            command = [sys.executable, "-m", "ldm3d", *arguments]
            limits = {"timeout": LONGEST_START, "capture_output": True, "text": True, "errors": "replace"}
            try:
                done = subprocess.run(command, cwd=Path(name) / "input", env={**os.environ, "OMP_NUM_THREADS": "1"}, **limits)
            except subprocess.TimeoutExpired as late:
                done = subprocess.CompletedProcess(command, "no end", stderr=str(late))
        tried.append(case.mutations)
        if done.returncode not in (0, 2) or "Traceback" in done.stderr:
            lost.append(
                f"{' '.join(arguments)} of {case.mutations}: {done.returncode}, {done.stderr[-300:]}; kept in {_keep(case)}"
            )

    for family in FAMILIES:
        cases_of(family, -(-examples // len(FAMILIES)), seed + 1, do)
    return Outcome("the same by commands", len(tried), len(lost), time.monotonic() - started, "; ".join(lost[:5]))


def run(examples: int = 2000, seed: int = 0) -> list[Outcome]:
    """Read `examples` inputs of all families in-process, and COMMANDS by the command line."""
    reader = Reader()
    try:
        found = [try_family(family, round(share * examples), seed, reader) for family, share in SHARES.items()]
    finally:
        reader.close()
    return [*found, try_commands(COMMANDS, seed)]


def _keep(case: Case) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzzing-"))
    case.write(folder)
    return folder


if __name__ == "__main__":
    for outcome in run(int(sys.argv[1]) if len(sys.argv) > 1 else 2000):
        print(f"{outcome.what}: {outcome.tried} tried, {outcome.lost} lost, {outcome.seconds:.0f} s\n{outcome.detail}")
