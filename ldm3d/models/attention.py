"""Attention as one function over several kernels.

softmax(q k^T / sqrt(D)) v, with q (N, H, Q, D) and k, v (N, H, K, D): N samples, H heads, Q queries, K keys, D channels
a head. The only state is a cache of which kernels work.
"""

import functools
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm3d.errors import InputError

BACKENDS = ("auto", "sdpa", "xformers", "math")
FLASH_HEAD_CHANNELS = 256  # the widest head of SDPA's FlashAttention kernel
CPU_FEW_KEYS = 640


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    Args:
        q: queries, (N, H, Q, D).
        k, v: keys and values, (N, H, K, D).
        backend: "sdpa" PyTorch's kernels, "xformers" its memory-efficient ones, "math" plain matrix products (Q x K in
            memory), "auto" the best of them by device and shape.

    Returns:
        (N, H, Q, D), in q's dtype.

    Raises:
        InputError: unknown backend, or xformers asked for where it has no kernel.
    """
    if backend == "auto":
        backend = choose_backend(q, k)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if backend == "xformers":
        return _xformers(q, k, v)
    if backend == "math":
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        return weights @ v
    raise InputError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")


def choose_backend(q: Tensor, k: Tensor) -> str:
    """What "auto" means for queries and keys like these.

    SDPA runs everywhere and is FlashAttention on CUDA for half-precision heads of up to 256 channels. Beyond those it
    falls back to slower kernels or ones that need more memory; xformers is taken instead if a trial shows that it has a
    kernel. On a CPU, the backward pass of SDPA in half precision is slow for few keys: at 256 keys matrix products take half
    of its time, at 441 four fifths, and more than it from 1,024 on (one core, bfloat16; benchmarks/attention.py).
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cpu" and half and q.requires_grad and k.shape[-2] <= CPU_FEW_KEYS:
        return "math"
    if q.device.type != "cuda" or (half and q.shape[-1] <= FLASH_HEAD_CHANNELS) or torch.compiler.is_compiling():
        return "sdpa"
    return "xformers" if xformers_works(q.device, q.dtype, q.shape[-1]) else "sdpa"


@functools.cache
def xformers_works(device: torch.device, dtype: torch.dtype, head_channels: int) -> bool:
    """Whether xformers computes attention for such heads, forward and backward, by a trial."""
    return why_xformers_fails(device, dtype, head_channels) is None


def why_xformers_fails(device: torch.device, dtype: torch.dtype, head_channels: int) -> str | None:
    """Why a trial of xformers on such heads, forward and backward, fails; None if it works."""
    try:
        q = torch.zeros(1, 1, 8, head_channels, device=device, dtype=dtype, requires_grad=True)
        with torch.enable_grad(), quiet_xformers():
            _xformers(q, q, q).sum().backward()
    except (InputError, RuntimeError) as error:
        built_for_another = getattr(sys.modules.get("xformers._cpp_lib"), "_cpp_library_load_exception", None)
        reasons = [str(error).split("; use ")[0], *([" ".join(str(built_for_another).split())] if built_for_another else [])]
        return "; ".join(reasons)
    return None


@contextmanager
def quiet_xformers() -> Iterator[None]:
    """Within it, xformers does not warn of kernels that do not load, because the user has not asked for them."""
    logger = logging.getLogger("xformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    try:
        from xformers.ops import memory_efficient_attention
    except (ImportError, OSError) as error:  # the second: a library that its kernels need is missing
        raise InputError(
            f"attention backend xformers cannot be imported ({error}); use auto or sdpa, or install ldm3d[xformers]"
        ) from None
    try:
        # xformers has the heads behind the tokens: (N, tokens, H, D)
        out = memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    except NotImplementedError:
        raise InputError(
            f"xformers has no attention kernel for {q.dtype} heads of {q.shape[-1]} channels on {q.device.type}; "
            "use attention_backend auto or sdpa"
        ) from None
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves.

    Args:
        channels: of the tokens that give queries.
        context_channels: of the tokens that give keys and values; None for self-attention.
        head_channels: D; must divide `channels`.
        backend: see `attention`.
    """

    def __init__(self, channels: int, head_channels: int, context_channels: int | None = None, backend: str = "auto"):
        super().__init__()
        if channels % head_channels:
            raise InputError(
                f"attention over {channels} channels cannot have heads of {head_channels}; use a divisor of {channels}"
            )
        self.heads, self.backend = channels // head_channels, backend
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(context_channels or channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (N, Q, channels), context (N, K, context_channels) -> (N, Q, channels)."""
        q = self.query(x)  # (N, Q, H D)
        k, v = self.key_value(x if context is None else context).chunk(2, dim=-1)  # (N, K, H D) each
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (N, H, Q or K, D)
        out = attention(q, k, v, self.backend)
        return self.out(out.transpose(1, 2).flatten(2))
