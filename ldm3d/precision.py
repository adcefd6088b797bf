"""Which precision is fast on a device.

bfloat16 halves memory and time where the hardware multiplies it. Elsewhere every product needs conversions, and convolutions
take 7 to 20 times as long as in float32.
"""

import os
import platform

import torch

from ldm3d.errors import InputError

NAMES = ("auto", "float32", "bfloat16")

# Values of ONEDNN_MAX_CPU_ISA, in any case of letters, that exclude products of bfloat16
_ONEDNN_WITHOUT_BF16 = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}


def bf16_is_fast(device: str | torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware, as PyTorch uses it.

    CUDA: from Ampere on, and ROCm. x86 CPUs: AVX512-BF16 or AMX, unless ONEDNN_MAX_CPU_ISA (DNNL_MAX_CPU_ISA of old) or
    ATEN_CPU_CAPABILITY keep PyTorch from using them. ARM CPUs: the BF16 extension, where PyTorch comes with oneDNN (Linux).
    Anything else, Apple's CPUs and GPUs included: no, since PyTorch is not known to have faster kernels there.
    """
    try:
        device = torch.device(device)
    except RuntimeError:  # no such device, which is reported where it is used
        return False
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return False
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_multiplies_bf16()


def cpu_multiplies_bf16() -> bool:
    """`bf16_is_fast` of the CPU."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # there oneDNN's answer is about the products
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if limit.lower() in _ONEDNN_WITHOUT_BF16 or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def dtype(name: str, device: str | torch.device) -> torch.dtype:
    """The type that "auto", "float32" or "bfloat16" means on a device.

    Raises:
        InputError: another name.
    """
    if name not in NAMES:
        raise InputError(f"precision {name}: use {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if name == "auto":
        name = "bfloat16" if bf16_is_fast(device) else "float32"
    return getattr(torch, name)
