"""Write what each dependency takes on disk into docs/installation.md, measured in this environment.

    python docs/sizes.py

Two figures for each: the package itself, and what its removal would free, which is nothing where another one needs it, too.
"""

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PAGE, BEGIN, END = HERE / "installation.md", "<!-- sizes: made by docs/sizes.py -->\n", "<!-- end of sizes -->"
# Extras that are not installed beside the others; their rows are from `pip download --no-deps` and `unzip -l`
APART = {"xformers": "12.5 | xformers; and PyTorch 2.10 for CUDA, several GB, in place of any other"}
ABOUT = {
    "torch": "networks; the build for CPUs (one for CUDA takes several GB)",
    "monai": "networks and losses of MONAI",
    "monai-generative": "networks of its older generative package",
    "einops": "MONAI's attention needs it",
    "nibabel": "NIfTI files",
    "accelerate": "training on any number of devices",
    "safetensors": "weights",
    "psutil": "free memory",
    "numpy": "arrays",
    "scipy": "statistics, image moments",
    "pydantic": "checking the config",
    "pyyaml": "reading the config",
    "pandas": "tables",
    "openpyxl": "tables in Excel's format",
    "pybids": "scans of a BIDS dataset",
    "typer": "command line",
    "tqdm": "progress bars",
    "matplotlib": "pictures",
    "pillow": "small pictures on pages",
    "jinja2": "pages",
    "huggingface-hub": "models at a hub",
}


def asked(texts: Iterable[str], extras: Iterable[str] = ()) -> set[tuple[str, frozenset[str]]]:
    """Packages that these requirements name, each with its extras."""
    found = set()
    for text in texts:
        requirement = Requirement(text)
        if any(requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found.add((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def closure(waiting: set[tuple[str, frozenset[str]]]) -> set[str]:
    """Installed packages that these need, themselves included."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = set(waiting)
    while waiting:
        package = waiting.pop()
        if package in seen:
            continue
        seen.add(package)
        try:
            waiting |= asked(distribution(package[0]).requires or (), package[1])
        except PackageNotFoundError:
            raise SystemExit(f"{package[0]} is not installed: pip install '.[test]'") from None
    return {name for name, _ in seen}


def megabytes(names: Iterable[str]) -> float:
    """On disk, compiled Python files included."""
    files = (file for name in names for file in distribution(name).files or ())
    paths = {Path(str(file.locate())) for file in files}
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def told(extra: str, extras: dict[str, list[str]]) -> list[str]:
    """Requirements of an extra, with those of the extras that it names."""
    found = []
    for text in extras[extra]:
        requirement = Requirement(text)
        own = requirement.name == "ldm3d"
        found += [line for name in sorted(requirement.extras) for line in told(name, extras)] if own else [text]
    return found


def tables() -> str:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = asked(project["dependencies"])
    everything = closure(direct)
    rows = [
        (megabytes([name]), megabytes(everything - closure(direct - {(name, extras)})), name)
        for name, extras in sorted(direct)
    ]
    others = megabytes(everything - {name for name, _ in direct})
    lines = [f"All that `pip install ldm3d` brings takes {megabytes(everything):,.0f} MB.\n"]
    lines += ["| dependency | itself, MB | its removal frees, MB | what for |", "|---|---|---|---|"]
    lines += [f"| {name} | {own:.1f} | {freed:.1f} | {ABOUT[name]} |" for own, freed, name in sorted(rows, reverse=True)]
    lines.append(f"| what these need | {others:.1f} | | |")
    lines += ["", "| extra | MB on top | brings |", "|---|---|---|"]
    extras = project["optional-dependencies"]
    for extra in extras:
        if extra in APART:
            lines.append(f"| `{extra}` | {APART[extra]} |")
            continue
        brings = asked(told(extra, extras))
        own = [text for text in extras[extra] if Requirement(text).name != "ldm3d"]
        names = sorted(name for name, _ in asked(own) - direct) + ["all extras but xformers"] * (len(own) < len(extras[extra]))
        lines.append(f"| `{extra}` | {megabytes(closure(brings) - everything):.1f} | {', '.join(names)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    PAGE.write_text(pattern.sub(lambda _: BEGIN + tables() + END, text), encoding="utf-8")


if __name__ == "__main__":
    main()
