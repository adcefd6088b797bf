"""All that a GPU has to show, within 25 minutes: `make gpu`, or `make gpu DRY=1` with tiny sizes on any machine.

    python benchmarks/gpu.py [--part 1 2 3 4] [--dry] [--out gpu-results] [--data BIDS_FOLDER]

1 checks    tests marked `gpu`: precision, kernels, compilation, resumption, sharding
2 speed     full_size, attention, memory, share of the card's matrix rate, profiles of a training step
3 brains    configs/brains-3mm.yaml, wider and with ten times the samples: pictures, evaluation, samplers
4 large     configs/brain-1mm.yaml, as far as the time goes: steps and volumes a second, memory, pictures

Each part has at most nine minutes, stops by itself, and says what it left out. Started again, it goes on with that, and with
what failed; a complete part is not run again. JSON and PNG go to OUT, and a summary, OUT/summary.md; data and models to
OUT-work. Without --data, parts 3 and 4 make phantoms. Nothing is downloaded, and nothing has to be installed: packages may
be in any folder on PYTHONPATH.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TITLES = {1: "checks", 2: "speed", 3: "brains", 4: "large"}
SECONDS = {1: 240, 2: 390, 3: 510, 4: 340}
DRY_SECONDS = 300  # of each part, on a busy machine
GRACE = 20  # seconds after which a part that does not stop is ended
MODULES = (
    *("torch", "numpy", "scipy", "pandas", "pydantic", "yaml", "nibabel", "bids", "monai", "generative", "einops"),
    *("accelerate", "safetensors", "psutil", "typer", "tqdm", "matplotlib", "jinja2", "pytest", "ldm3d"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, nargs="*", choices=TITLES, help="all if not given")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU, too")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--data", type=Path, help="BIDS folder for parts 3 and 4; phantoms if not given")
    parser.add_argument("--here", type=float, help=argparse.SUPPRESS)  # seconds: work on the part in this process
    parser.add_argument("--leave-failed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here is not None:
        work(arguments)
        return
    if missing := missing_modules(MODULES):
        names = "\n".join(f"  {name}: {why}" for name, why in missing.items())
        sys.exit(f"{sys.executable} cannot import\n{names}\nPut their folder, and {ROOT}, on PYTHONPATH, or set PYTHON=...")
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA GPU; `make gpu DRY=1` walks through the same parts with tiny sizes")
    for number in arguments.part or TITLES:
        run(number, arguments)
    from gpu_parts.summary import write_summary

    print(write_summary(arguments.out, TITLES))


def missing_modules(names: tuple[str, ...]) -> dict[str, str]:
    """Those that cannot be imported, and why."""
    missing = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # an old package may raise anything
            missing[name] = f"{type(error).__name__}: {error}"
    return missing


def run(number: int, arguments: argparse.Namespace) -> None:
    """A part in a process of its own; in a new one where an error of CUDA ended it."""
    from gpu_parts.part import RESTART, is_complete

    title = TITLES[number]
    print(f"\n== part {number}, {title}", flush=True)
    if is_complete(arguments.out / f"part-{number}-{title}.json"):
        print("complete")
        return
    end = time.monotonic() + (DRY_SECONDS if arguments.dry else SECONDS[number])
    command = [sys.executable, __file__, "--part", str(number), "--out", str(arguments.out)]
    command += ["--dry"] * arguments.dry + (["--data", str(arguments.data)] if arguments.data else [])
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    more: list[str] = []
    while (left := end - time.monotonic()) > 0:
        try:
            code = subprocess.run([*command, "--here", str(left), *more], env=environment, timeout=left + GRACE).returncode
        except subprocess.TimeoutExpired:
            print(f"part {number} did not stop in time and was ended")
            return
        if code == 0 or (code > 0 and code != RESTART):  # below 0: killed by a signal
            return
        more = ["--leave-failed"]


def work(arguments: argparse.Namespace) -> None:
    """The part itself."""
    from gpu_parts.part import Part

    (number,) = arguments.part
    out = arguments.out
    part = Part(number, TITLES[number], out, arguments.here, arguments.dry, retry=not arguments.leave_failed)
    module = importlib.import_module(f"gpu_parts.{TITLES[number]}")
    module.work(part, out.with_name(out.name + "-work"), arguments.data)
    part.close()


if __name__ == "__main__":
    main()
