"""A description of this machine: versions, devices, the fast precision, and the attention kernels that work."""

import importlib.metadata
import os
import platform

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ldm3d
from ldm3d.models.attention import why_xformers_fails
from ldm3d.precision import bf16_is_fast
from ldm3d.processes import cores, own_device

PACKAGES = (
    "monai",
    "monai-generative",
    "nibabel",
    "accelerate",
    "xformers",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "pybids",
)
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS")
KERNELS = {
    "FlashAttention (SDPA)": SDPBackend.FLASH_ATTENTION,
    "memory-efficient (SDPA)": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN (SDPA)": SDPBackend.CUDNN_ATTENTION,
    "matrix products (SDPA)": SDPBackend.MATH,
}
HEAD_CHANNELS = 64  # of the heads that kernels are tried on


def describe_environment() -> str:
    """Lines for a bug report; they name neither the user nor the machine."""
    device = torch.device(own_device())
    rows = [
        ("ldm3d", ldm3d.__version__),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}"),
        ("device", _device_name(device)),
        ("CPU", processor()),
        ("cores", f"{cores()} for this process, {torch.get_num_threads()} threads"),
        *((name, os.environ[name]) for name in LIMITS if name in os.environ),
    ]
    for where in dict.fromkeys((device.type, "cpu")):
        kind = "bfloat16" if bf16_is_fast(device if where == device.type else where) else "float32"
        rows.append((f"precision on {where}", f"auto is {kind}"))
    rows += [(package, _version(package)) for package in PACKAGES]
    lines = [f"{name:22} {value}" for name, value in rows]
    lines += ["", f"attention kernels on {device.type}, forward and backward, heads of {HEAD_CHANNELS} channels"]
    for dtype in (torch.bfloat16, torch.float32):
        for name, reason in probe_attention(device, dtype).items():
            word = "works" if reason is None else f"does not: {reason}"
            lines.append(f"{str(dtype).removeprefix('torch.'):9} {name:24} {word}")
    return "\n".join(lines)


def probe_attention(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Kernel -> None if a trial computes attention, else the reason."""
    found = {name: _why_sdpa_fails(kernel, device, dtype) for name, kernel in KERNELS.items()}
    return found | {"xformers": why_xformers_fails(device, dtype, HEAD_CHANNELS)}


def _why_sdpa_fails(kernel: SDPBackend, device: torch.device, dtype: torch.dtype) -> str | None:
    q = torch.zeros(1, 1, 8, HEAD_CHANNELS, device=device, dtype=dtype, requires_grad=True)
    try:
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(q, q, q).sum().backward()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return "PyTorch has none for this device and type" if reason.startswith("No viable backend") else reason
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"


def processor() -> str:
    """The CPU's name where the system says it, and the instructions that PyTorch uses on it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or "unknown"
    return f"{name}; PyTorch uses {torch.backends.cpu.get_cpu_capability()}"
