"""Which precision is fast: asked of hardware that is there, that is not, and that the environment hides."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState

from ldm3d import precision
from ldm3d.config.training import TrainingConfig
from ldm3d.errors import InputError
from ldm3d.precision import bf16_is_fast, dtype
from ldm3d.rulers.segmenter import Segmenter
from ldm3d.rulers.volumetry import load_measure
from ldm3d.training import parallel

HIDING = [
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
]


@pytest.fixture
def cpu(monkeypatch):
    """(machine, capability of ATen, oneDNN's word, AVX512-BF16, AMX) -> a CPU of that kind, without limits."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)

    def pretend(machine="x86_64", capability="AVX512", onednn=True, avx512_bf16=True, amx=False):
        monkeypatch.setattr(precision.platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    return pretend


@pytest.mark.parametrize(
    "kind, fast",
    [
        ({}, True),
        ({"avx512_bf16": False, "amx": True}, True),
        ({"avx512_bf16": False}, False),  # AVX512 of before: oneDNN takes bfloat16, and turns it into float32
        ({"capability": "AVX2", "onednn": False, "avx512_bf16": False}, False),
        ({"capability": "AVX2"}, False),  # ATEN_CPU_CAPABILITY
        ({"onednn": False}, False),  # ONEDNN_MAX_CPU_ISA
        ({"machine": "aarch64", "capability": "SVE256", "avx512_bf16": False}, True),
        ({"machine": "arm64", "capability": "DEFAULT", "onednn": False, "avx512_bf16": False}, False),
    ],
)
def test_cpus(kind, fast, cpu):
    cpu(**kind)
    assert bf16_is_fast("cpu") is fast
    assert dtype("auto", "cpu") == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize("limit, fast", [("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True), ("typo", True)])
def test_limits_of_onednn(limit, fast, cpu, monkeypatch):
    cpu()
    for name in ("DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.setenv(name, limit)
        assert bf16_is_fast("cpu") is fast
        monkeypatch.delenv(name)


@pytest.mark.parametrize("environment", HIDING)
def test_environment_that_hides_what_the_cpu_has(environment):
    """As PyTorch reads it at its start, in a process of its own."""
    code = "from ldm3d.precision import bf16_is_fast; print(bf16_is_fast('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("gpu", [True, False])
def test_each_device_is_asked_itself(gpu, cpu, monkeypatch):
    """A GPU and a CPU of one machine need not agree."""
    cpu(avx512_bf16=not gpu)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device.index) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu and not including_emulation)
    assert bf16_is_fast("cuda:3") is gpu
    assert asked == [3]
    assert bf16_is_fast(torch.device("cpu")) is not gpu
    assert not bf16_is_fast("mps")
    assert not bf16_is_fast("no such device")


def test_names():
    assert dtype("float32", "cpu") == torch.float32
    assert dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(InputError, match="precision half: use auto, float32 or bfloat16"):
        dtype("half", "cpu")


@pytest.mark.parametrize("fast, expected", [(True, "bf16"), (False, "no")])
def test_training_asks_of_the_device_it_takes(fast, expected, tmp_path, monkeypatch):
    """A run that is told to use the CPU of a machine with a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    asked = []
    monkeypatch.setattr(parallel, "bf16_is_fast", lambda device: asked.append(device.type) or fast)
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    try:
        settings = TrainingConfig(steps=1, batch_size=1, learning_rate=1e-3)
        found = parallel.start_accelerator(settings, tmp_path, seed=0).mixed_precision
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert (asked, found) == (["cpu"], expected)


def test_segmenter_computes_where_it_is_told(monkeypatch):
    seen = []
    monkeypatch.setattr(Segmenter, "from_pretrained", lambda folder, device: seen.append((folder, device)))
    load_measure("segmenter:somewhere", "cuda:1")
    assert seen == [("somewhere", "cuda:1")]
