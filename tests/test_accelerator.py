"""How a training starts: what makes a GPU fast."""

import torch

from ldm3d.training import parallel

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


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
