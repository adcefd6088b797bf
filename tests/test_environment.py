"""What the machine is said to have: each kernel is tried, and says why it does not work."""

import importlib.metadata
import logging
import sys

import pytest
import torch
from conftest import command_line

from ldm3d import environment
from ldm3d.environment import probe_attention
from ldm3d.models import attention as module
from ldm3d.models.attention import why_xformers_fails

CPU = torch.device("cpu")


def test_info_of_the_environment(capsys):
    command_line("info", "--environment")
    said = capsys.readouterr().out
    for part in ("Python", torch.__version__, "cores", "precision on cpu", "nibabel", "FlashAttention", "xformers", "works"):
        assert part in said, part


def test_info_of_nothing(fails):
    assert "--environment" in fails("info")


def test_info_without_xformers(capsys, monkeypatch):
    """Neither the package nor its entry among those that are installed."""
    version = importlib.metadata.version

    def without(name):
        if name == "xformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.setattr(environment.importlib.metadata, "version", without)
    command_line("info", "--environment")
    said = capsys.readouterr()
    assert "not installed" in said.out
    assert "does not: attention backend xformers cannot be imported" in said.out
    assert "warning" not in (said.out + said.err).lower()


@pytest.mark.parametrize("fault", [None, "no such kernel"])
def test_kernels_are_tried(fault, monkeypatch):
    def kernel(q, k, v):
        if fault:
            raise RuntimeError(fault)
        return q + k + v

    monkeypatch.setattr(module, "_xformers", kernel)
    reason = probe_attention(CPU, torch.float32)["xformers"]
    assert reason is None if fault is None else reason.startswith(fault)
    assert probe_attention(CPU, torch.float32)["matrix products (SDPA)"] is None


def test_probing_prints_no_warning(monkeypatch, caplog):
    """xformers warns on its import where its kernels do not load."""

    def kernel(q, k, v):
        logging.getLogger("xformers").warning("kernels do not load")
        raise RuntimeError("no kernel")

    monkeypatch.setattr(module, "_xformers", kernel)
    assert why_xformers_fails(CPU, torch.float32, 8).startswith("no kernel")
    assert not caplog.records
    logging.getLogger("xformers").warning("somebody asked")
    assert len(caplog.records) == 1
