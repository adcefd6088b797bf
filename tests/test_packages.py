"""A source distribution holds all that a wheel is built from, and the wheel made of it runs with its model and configs."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from ldm3d.config import read, recipe

ROOT = Path(__file__).parents[1]


def built(folder: Path, call: str) -> Path:
    """What setuptools, asked as pip asks it, writes into folder/dist; no network."""
    code = f"from setuptools import build_meta; build_meta.{call}('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return next((folder / "dist").iterdir())


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    """A source distribution of a clone, and the wheel from it."""
    tmp_path = tmp_path_factory.mktemp("packages")
    clone = tmp_path / "clone"
    for name in ("ldm3d", "models", "configs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    sdist = built(clone, "build_sdist")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path / "sources")  # our own; older releases of Python 3.11 know no filter
    (sources,) = (tmp_path / "sources").iterdir()
    return {"sdist": sdist, "wheel": built(sources, "build_wheel")}


@pytest.fixture(scope="module")
def installed(packages, tmp_path_factory) -> Path:
    """The wheel unpacked: its files and no other of ldm3d."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(packages["wheel"]) as file:
        file.extractall(folder)
    return folder


def run(installed: Path, here: Path, *arguments: str) -> None:
    """`ldm3d ARGUMENTS` of the wheel, in an empty folder."""
    here.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "ldm3d", *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_its_metadata_are_complete(installed):
    described = next(installed.glob("ldm3d-*.dist-info/METADATA")).read_text()
    for needed in ("License-Expression: Apache-2.0", "Description-Content-Type: text/markdown", "Requires-Python: >=3.11"):
        assert needed in described


def test_a_wheel_generates(installed, tmp_path):
    run(installed, tmp_path / "here", "generate", "brains-4.5mm", "--age", "72", "--steps", "1", "--out", "synthetic")
    assert list((tmp_path / "here/synthetic").rglob("*_T1w.nii.gz"))


def test_a_wheel_has_the_configs(installed, monkeypatch):
    of_clone = read.shipped_configs()
    monkeypatch.setattr(recipe, "FOLDERS", (installed / "ldm3d/configs",))
    assert read.shipped_configs().keys() == of_clone.keys() and read.load_config("toy").name == "toy"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_the_quick_demo_runs_in_an_environment_of_its_own(packages, tmp_path, kind):
    """Installed with what it asks for and nothing else, from wherever pip is told to look."""
    uv, place, here = [sys.executable, "-m", "uv"], tmp_path / "environment", tmp_path / "here"
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    links = [f"--find-links={each}" for each in os.environ.get("PIP_FIND_LINKS", "").split()]
    torch = f"torch=={version('torch').partition('+')[0]}"
    here.mkdir()
    subprocess.run([*uv, "venv", "--python", sys.executable, place], check=True, capture_output=True)
    install = [*uv, "pip", "install", "--python", place / "bin/python", *links, torch, packages[kind]]
    done = subprocess.run(install, env=clean, capture_output=True, text=True)
    if "Failed to fetch" in done.stderr:
        pytest.skip("no registry of packages is reached")
    assert done.returncode == 0, done.stderr
    demo = subprocess.run([place / "bin/ldm3d", "demo", "--quick"], cwd=here, env=clean, capture_output=True, text=True)
    assert demo.returncode == 0, demo.stderr
    assert {"data", "run", "generated", "shipped", "evaluation"} <= {path.name for path in (here / "demo").iterdir()}
    page = (here / "demo/evaluation/report.html").read_text()
    assert "Synthetic" in page and "held-out volumes are themselves synthetic" in page and "for no real person" in page
    assert "warning" not in (demo.stdout + demo.stderr).lower(), demo.stderr  # nothing that nobody asked for
    shutil.rmtree(place)  # a gigabyte
