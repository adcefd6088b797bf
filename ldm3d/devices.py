"""Devices: their names, settings for reproducible computation, copies to the host, and a test of their convolutions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.errors import InputError

# Relative to the largest value. Rounding to bfloat16 causes up to 0.004, to TF32 up to 0.0005
CONVOLUTION_ERROR = 0.02


def described(device: torch.device) -> str:
    """The type of a device, and the model of a GPU, since another one rounds sums in another way."""
    return f"cuda, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


@contextmanager
def computing_alike(device: torch.device, threads: int | None) -> Iterator[None]:
    """Within it, PyTorch is set to compute fast, and the same bits in every process on such a device.

    On CUDA, float32 matrices are multiplied in TF32 (10 bits of mantissa), as PyTorch's convolutions are by default. cuDNN
    does not choose its kernels by timing them (`torch.backends.cudnn.benchmark`), because the choice, and with it the last
    bits of a volume, would differ between processes.

    Args:
        device: of the networks.
        threads: of a CPU; None for as many as PyTorch uses.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = False
    elif threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if torch.get_num_threads() != before[0]:
            torch.set_num_threads(before[0])
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before[1])
            torch.backends.cudnn.benchmark = before[2]


class HostCopy:
    """An asynchronous copy of a tensor to the host; on a CPU, the tensor itself."""

    def __init__(self, tensor: Tensor):
        self._tensor, self._done = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def numpy(self) -> NDArray:
        """The array, once it has arrived."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor.numpy()


def check_convolutions(device: torch.device, dtype: torch.dtype) -> None:
    """Test a GPU's 3D convolutions; on a CPU nothing is tested.

    Some releases of cuDNN compute large ones in half precision wrongly (pytorch issue 163539).

    Args:
        device: of the networks.
        dtype: in which they compute.

    Raises:
        InputError: they are wrong.
    """
    if device.type == "cuda":
        error = convolution_error(device, dtype)
        if not error < CONVOLUTION_ERROR:
            raise InputError(
                f"3D convolutions in {str(dtype).removeprefix('torch.')} are wrong on {described(device)} with PyTorch "
                f"{torch.__version__} and cuDNN {torch.backends.cudnn.version()}: off by {error:.2g} of the largest value. "
                "Install another PyTorch, or compute in float32 or on the CPU"
            )


@torch.no_grad()
def convolution_error(device: torch.device, dtype: torch.dtype, convolve=F.conv3d) -> float:
    """Largest difference between a 3D convolution and the same sum as 27 matrix products on the CPU, over the largest value.

    Args:
        device, dtype: of the convolution.
        convolve: (x, weight, padding=1) -> the convolution under test.
    """
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 20, 24, 20, generator=rng).to(dtype)  # (N, C, X, Y, Z)
    weight = (torch.randn(32, 32, 3, 3, 3, generator=rng) / 30).to(dtype)
    expected, around = 0.0, F.pad(x.float(), (1,) * 6)
    for i, j, k in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
        part = around[:, :, i : i + 20, j : j + 24, k : k + 20]
        expected = expected + torch.einsum("oc,ncxyz->noxyz", weight[:, :, i, j, k].float(), part)
    x, weight = (value.to(device, memory_format=torch.channels_last_3d) for value in (x, weight))
    found = convolve(x, weight, padding=1).float().cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item()
