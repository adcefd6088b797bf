"""How long from an empty machine to a first brain? By uv, and by pip.

    python benchmarks/installing.py [--by uv pip pip-without-bytecode] [--torch torch==2.13.0]

Each installs this clone into an environment of its own, without a cache, and asks the shipped model for a brain twice: the
first start compiles what is imported, unless pip has compiled everything before. Packages come from where pip is told to
look for them (PIP_INDEX_URL, PIP_FIND_LINKS), so downloads are as fast as that. Needs uv: pip install uv.

    environment, install, first brain    seconds
    to a brain                           their sum
    second brain                         seconds, of another start
    MB                                   of the environment after installation
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from protocol import write

ROOT = Path(__file__).parents[1]
PARTS = {"ldm3d", "models", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE"}  # that a wheel is built from
BY = ("uv", "pip", "pip-without-bytecode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", nargs="+", choices=BY, default=BY)
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement; a build for CUDA takes several GB")
    arguments = parser.parse_args()
    rows = []
    for by in arguments.by:
        rows.append(measured(by, arguments.torch))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    write("installing", rows)


def measured(by: str, torch: str) -> dict[str, float | str]:
    """One way, in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "environment")
        python = place / "bin/python"
        if by == "uv":
            uv = [sys.executable, "-m", "uv"]
            make = [*uv, "venv", "--quiet", "--python", sys.executable]
            install = [*uv, "pip", "install", "--no-cache", "--python", python]
            install += [f"--find-links={links}" for links in os.environ.get("PIP_FIND_LINKS", "").split()]
        else:
            make, install = [sys.executable, "-m", "venv"], [python, "-m", "pip", "install", "--no-cache-dir"]
            install += ["--no-compile"] * (by == "pip-without-bytecode")
        clone = Path(folder, "clone")
        shutil.copytree(ROOT, clone, ignore=lambda inside, names: set(names) - PARTS if inside == str(ROOT) else ())
        steps = {"environment": [*make, place], "install": [*install, "--quiet", torch, clone]}
        seconds = {name: timed(command, folder) for name, command in steps.items()}
        megabytes = sum(path.lstat().st_size for path in place.rglob("*") if not path.is_dir()) / 1e6
        for name in ("first brain", "second brain"):
            ask = [place / "bin/ldm3d", "generate", "brains-4.5mm", "--age", "72", "--sex", "F", "--out", Path(folder, name)]
            seconds[name] = timed(ask, folder)
    to_a_brain = sum(seconds.values()) - seconds["second brain"]
    rounded = {name: round(value, 1) for name, value in {**seconds, "to a brain": to_a_brain}.items()}
    return {"by": by, **rounded, "MB": round(megabytes)}


def timed(command: list, folder: str) -> float:
    """Seconds of a command, as on a machine that keeps bytecode."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    began = time.perf_counter()
    subprocess.run([*map(str, command)], check=True, cwd=folder, env=kept, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
