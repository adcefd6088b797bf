"""A source distribution holds all that a wheel is built from, and the wheel made of it runs with its shipped model."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def built(folder: Path, call: str) -> Path:
    """What setuptools, asked as pip asks it, writes into folder/dist; no network."""
    code = f"from setuptools import build_meta; build_meta.{call}('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return next((folder / "dist").iterdir())


def test_a_wheel_from_a_source_distribution_runs(tmp_path):
    clone = tmp_path / "clone"
    for name in ("ldm3d", "models"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    with tarfile.open(built(clone, "build_sdist")) as file:
        file.extractall(tmp_path / "sources")  # our own; older releases of Python 3.11 know no filter
    (sources,) = (tmp_path / "sources").iterdir()
    with zipfile.ZipFile(built(sources, "build_wheel")) as file:
        file.extractall(tmp_path / "installed")
        (metadata,) = (name for name in file.namelist() if name.endswith("/METADATA"))
        described = file.read(metadata).decode()
    for needed in ("License-Expression: Apache-2.0", "Description-Content-Type: text/markdown", "Requires-Python: >=3.11"):
        assert needed in described
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "ldm3d", "generate", "brains-4.5mm", "--age", "72", "--steps", "1", "--out", "synthetic"],
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "here/synthetic").rglob("*_T1w.nii.gz"))
