"""What a command says in its first seconds, while libraries load and before its first volume is there."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import command_line

from ldm3d.cli.generation import run_series
from ldm3d.generation import run
from ldm3d.processes import ALONE


@pytest.mark.parametrize("command", ["generate", "atlas"])
def test_help_loads_no_network_library(command):
    program = f"""
import sys
from ldm3d.cli import main
sys.argv = ["ldm3d", "{command}", "--help"]
try:
    main()
except SystemExit:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("rank, said", [(None, 1), (0, 1), (1, 0)])
def test_loading_is_said_once(monkeypatch, capsys, rank, said):
    monkeypatch.delitem(sys.modules, "torch")
    if rank is not None:
        monkeypatch.setattr("ldm3d.processes.work_alone", lambda command: None)
        monkeypatch.setenv("RANK", str(rank))
    command_line("config")
    assert capsys.readouterr().err.count("loading libraries") == said


def test_the_bar_is_there_before_the_first_volume(monkeypatch, capsys, tmp_path):
    shown = []

    def generate(*_):
        shown.append(capsys.readouterr().err)
        return SimpleNamespace(missing=0, withheld=0)

    monkeypatch.setattr(run, "generate", generate)
    pipeline = SimpleNamespace(threads=1, device=torch.device("cpu"), group_size=4)
    assert run_series(pipeline, None, [{}] * 3, tmp_path, 8, True, None, ALONE)
    assert "0/3" in shown[0]
