"""Recipes of containers: what they copy is there, and what they install is what pyproject.toml allows."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKER, APPTAINER, CONDA = (ROOT / "containers" / name for name in ("Dockerfile", "ldm3d.def", "environment.yml"))
INSTRUCTIONS = {"FROM", "ARG", "WORKDIR", "RUN", "COPY", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "CMD"}
SECTIONS = {"files", "post", "environment", "runscript", "help", "labels"}


def instructions() -> list[list[str]]:
    text = re.sub(r"\\\n", " ", DOCKER.read_text())
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def sections() -> dict[str, list[str]]:
    header, *parts = re.split(r"^%", APPTAINER.read_text(), flags=re.MULTILINE)
    assert "Bootstrap: docker" in header and "From: python" in header
    return {part.split("\n", 1)[0].strip(): part.splitlines()[1:] for part in parts}


def test_the_dockerfile_knows_its_instructions_and_files():
    lines = instructions()
    assert lines[0][0] == "FROM" and {word for word, _ in lines} <= INSTRUCTIONS
    ignored = (ROOT / ".dockerignore").read_text().split()
    for word, rest in lines:
        if word == "COPY":
            for source in shlex.split(rest)[:-1]:
                assert (ROOT / source).exists() and source not in ignored, source
    assert ["USER", "ldm3d"] in lines  # not root


def test_a_linter_finds_nothing_in_the_dockerfile():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("there is no hadolint for this system")
    done = subprocess.run([hadolint, "--failure-threshold", "warning", DOCKER], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_apptainer_recipe_knows_its_sections_and_files():
    found = sections()
    assert set(found) <= SECTIONS
    for line in filter(None, map(str.strip, found["files"])):
        assert (ROOT / line.split()[0]).exists(), line
    for script in ("post", "environment", "runscript"):  # there is no linter of these recipes: at least they parse as shell
        done = subprocess.run(["sh", "-n"], input="\n".join(found[script]), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_both_copy_what_the_wheel_is_built_from():
    docker = {source for word, rest in instructions() if word == "COPY" for source in shlex.split(rest)[:-1]}
    apptainer = {line.split()[0] for line in map(str.strip, sections()["files"]) if line}
    assert docker == apptainer >= {"pyproject.toml", "setup.py", "ldm3d", "models", "configs"}


@pytest.mark.parametrize("path", [DOCKER, APPTAINER, CONDA], ids=lambda path: path.name)
def test_versions_and_extras_are_allowed(path):
    text = path.read_text()
    (allowed,) = [Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch>")]
    for version in re.findall(r"torch==([\d.]+)", text):
        assert allowed.specifier.contains(version), version
    extras = set(re.findall(r"(?:\.\[|EXTRAS=)([a-z,]+)", text.replace("${EXTRAS}", "")).pop().split(","))
    assert extras <= set(PROJECT["optional-dependencies"])


def test_the_conda_environment_asks_for_what_the_project_asks_for():
    environment = yaml.safe_load(CONDA.read_text())
    python, _, pip = environment["dependencies"]
    assert Requirement(PROJECT["dependencies"][0]) == Requirement(pip["pip"][0])
    assert PROJECT["requires-python"] in python
