"""Examples of the documentation that need nothing but the shipped model run as they stand, with one sampling step."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import command_line
from documented import ROOT, blocks, commands

from ldm3d import shipped

MODEL = "brains-4.5mm"
PYTHON = ["README", "docs/tutorials/first-brains", "docs/tutorials/conditions", "docs/tutorials/restore-a-scan", "docs/serve"]
SHELL = ["README", "docs/tutorials/first-brains", "docs/tutorials/conditions"]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """The shipped model with one sampling step, under its name; the working folder is an empty one."""
    shutil.copytree(ROOT / "models" / MODEL, tmp_path / "models" / MODEL)
    path = tmp_path / "models" / MODEL / "pipeline.json"
    settings = json.loads(path.read_text())
    settings["sampling"]["steps"] = 1
    path.write_text(json.dumps(settings))
    monkeypatch.setattr(shipped, "FOLDERS", (tmp_path / "models",))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("name", [*PYTHON, "docs/gallery"])
def test_examples_in_python_run(quick, name):
    """The blocks of a page one after another, as a reader would; those for a model of the reader's own are left out."""
    texts = [text for text in blocks(ROOT / f"{name}.md", "python") if "runs/" not in text]
    assert texts
    names = {}
    for text in texts:
        exec(compile(text, f"{name}.md", "exec"), names)
    if name == "docs/gallery":
        pictures = {path.name for path in Path().glob("*.png")}
        assert pictures == {path.name for path in (ROOT / "docs/images").glob("gallery-*.png")}


@pytest.mark.parametrize("name", SHELL)
def test_commands_run(quick, monkeypatch, name):
    """`generate` and `info` of the shipped model; the table of requests is the one that the page shows."""
    page = ROOT / f"{name}.md"
    for table in blocks(page, ""):
        Path("requests.tsv").write_text(table)
    found = [command for text in blocks(page, "bash") for command in commands(text)]
    found = [command[1:] for command in found if command[0] == "ldm3d" and command[2:3] == [MODEL]]
    found = [command for command in found if command[0] in ("generate", "info")]
    assert found
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    for command in found:
        command_line(*command)
        if command[0] == "generate":
            assert list(Path(command[command.index("--out") + 1]).rglob("*_T1w.nii.gz")), command
