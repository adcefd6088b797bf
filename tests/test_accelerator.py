"""How a training starts: the precision of the device that it runs on, and what makes a GPU fast."""

import pytest
import torch
from accelerate.state import AcceleratorState

from ldm3d.config import TrainingConfig
from ldm3d.training import parallel

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def fresh_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("fast, precision", [(True, "bf16"), (False, "no")])
def test_a_training_on_the_cpu_asks_the_cpu(monkeypatch, tmp_path, fresh_state, fast, precision):
    """Also where the machine has a GPU."""
    asked = []
    monkeypatch.setattr(parallel, "bf16_is_fast", lambda device: asked.append(device.type) or fast)
    threads = torch.get_num_threads()
    accelerator = parallel.start_accelerator(TrainingConfig(steps=1, batch_size=1, learning_rate=1), tmp_path / "run", 0)
    torch.set_num_threads(threads)
    assert asked == [accelerator.device.type] == ["cpu"] and accelerator.mixed_precision == precision


def test_fast_kernels_are_a_gpu_s(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.get_float32_matmul_precision()
    try:
        parallel.use_fast_kernels(CPU)
        assert torch.get_float32_matmul_precision() == before and not torch.backends.cudnn.benchmark
        parallel.use_fast_kernels(GPU)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision(before)
