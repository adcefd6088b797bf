"""What a device computes with, and how volumes are computed on it: always in one way, for the last bits follow from it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.errors import InputError

# Of a convolution's largest value. Rounding to bfloat16 makes up to 0.004, to the TF32 of float32 convolutions 0.0005
CONVOLUTION_ERROR = 0.02


def described(device: torch.device) -> str:
    """The type of a device; of a GPU, its model as well: another one adds in another order."""
    return f"cuda, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


@contextmanager
def computing_alike(device: torch.device, threads: int | None) -> Iterator[None]:
    """Within it, PyTorch computes the same bits in every process on such a device, and fast; then it is as before.

    On CUDA, products of float32 matrices are made of TF32 numbers (10 bits of mantissa), as PyTorch's convolutions are anyway.
    cuDNN is not asked to choose its kernels by timing them (`torch.backends.cudnn.benchmark`): it would choose otherwise in
    another process, and a volume would have other last bits.

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
    """A tensor on its way to the host, while the GPU goes on; on a CPU it is there already."""

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
    """Look whether a GPU's three-dimensional convolutions are right; on a CPU there is nothing to look at.

    Releases of cuDNN have given wrong numbers for large ones in half precision (pytorch issue 163539).

    Args:
        device: where networks are to run.
        dtype: that they compute in.

    Raises:
        InputError: they are not.
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
