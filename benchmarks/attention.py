"""Attention backends: seconds and memory against keys, tokens and head size.

    python benchmarks/attention.py [--quick]

First, few keys: forward and backward of all backends in bfloat16 and float32 (what `auto` goes by; on CPUs SDPA's backward in
bfloat16 is slow for few keys). Then self-attention of 512 to 32,768 tokens, and cross-attention of as many to 4, in heads of
32 to 512 channels, 512 in all: ldm3d's backends and each of SDPA's kernels by itself, forward alone and with backward. Memory
is the peak above the inputs. What would take more than --limit-gb or --limit-seconds, by the previous number of tokens, is
left out, with a note in the row; so is a kernel that does not exist for the machine or the shape.
"""

import argparse
import itertools
from collections.abc import Callable

import torch
from protocol import device, peak_memory, summarise, time_in_turns, write
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm3d.errors import InputError
from ldm3d.models.attention import attention, xformers_works
from ldm3d.precision import dtype as fast

HEADS, HEAD_CHANNELS, TOKENS_IN_ALL = 3, 32, 8192  # of the table of few keys
WIDTH, CONTEXT_TOKENS = 512, 4
KERNELS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 4,096 tokens, heads of 32 and 128 channels")
    parser.add_argument("--limit-seconds", type=float, default=20)
    parser.add_argument("--limit-gb", type=float, default=4)
    arguments = parser.parse_args()
    rows = few_keys()
    print(write("attention", rows))
    tokens = [2**k for k in range(9, 13 if arguments.quick else 16)]
    head_sizes = (32, 128) if arguments.quick else (32, 64, 128, 256, 512)
    rows += many_tokens(tokens, head_sizes, arguments.limit_seconds, arguments.limit_gb)
    print(write("attention", rows))


def few_keys(most: int = 2048, tokens_in_all: int = TOKENS_IN_ALL) -> list[dict]:
    """A row for each number of keys up to `most`, precision and backend."""
    rows, where = [], device()
    print(f"{'keys':>6} {'dtype':>9} {'backend':>9} {'ms':>8} {'ratio to sdpa':>14}")
    for keys in (keys for keys in (4, 64, 150, 256, 512, 1024, 2048) if keys <= most):
        for dtype in (torch.bfloat16, torch.float32):
            samples, queries = max(1, tokens_in_all // max(keys, 150)), max(keys, 150)
            q = torch.randn(samples, HEADS, queries, HEAD_CHANNELS, device=where, dtype=dtype, requires_grad=True)
            k, v = (
                torch.randn(samples, HEADS, keys, HEAD_CHANNELS, device=where, dtype=dtype, requires_grad=True)
                for _ in range(2)
            )
            backends = ["sdpa", "math"] + (["xformers"] if xformers_works(where, dtype, HEAD_CHANNELS) else [])
            sides = {b: lambda b=b, q=q, k=k, v=v: attention(q, k, v, b).sum().backward() for b in backends}
            try:
                seconds = time_in_turns(sides, repeats=7)
            except InputError as error:
                print(f"{keys:6} {error}")
                continue
            for backend, values in seconds.items():
                found = summarise(values)
                ratio = found["median"] / summarise(seconds["sdpa"])["median"]
                name = str(dtype).removeprefix("torch.")
                print(f"{keys:6} {name:>9} {backend:>9} {1000 * found['median']:8.1f} {ratio:14.2f}")
                rows.append({"keys": keys, "queries": queries, "samples": samples, "dtype": name, "backend": backend, **found})
    return rows


def many_tokens(all_tokens: list[int], head_sizes: tuple[int, ...], limit_seconds: float, limit_gb: float) -> list[dict]:
    """A row for each kind, head size, pass, number of tokens and backend; a backend that drops out of a series says why."""
    rows = []
    dtype = fast("auto", device())
    print(f"{'kind':>6} {'head':>4} {'pass':>8} {'tokens':>6} {'backend':>14} {'ms':>9} {'peak MB':>8}")
    for kind, head_channels, backward in itertools.product(("self", "cross"), head_sizes, (False, True)):
        before = {backend: {"median": 0.0, "peak_gb": 0.0} for backend in ("sdpa", "math", "xformers", *KERNELS)}
        for tokens in all_tokens:
            keys, growth = (tokens, 4) if kind == "self" else (CONTEXT_TOKENS, 2)
            heads = WIDTH // head_channels
            q, k, v = (
                torch.randn(1, heads, n, head_channels, device=device(), dtype=dtype, requires_grad=backward)
                for n in (tokens, keys, keys)
            )
            calls = {backend: call(backend, q, k, v, backward) for backend in before}
            found = {}
            for backend, row in before.items():
                if growth * row["median"] > limit_seconds:
                    found[backend] = {"not_measured": f"would take more than {limit_seconds:g} s"}
                elif growth * row["peak_gb"] > limit_gb:
                    found[backend] = {"not_measured": f"would take more than {limit_gb:g} GB"}
                else:
                    found[backend] = memory(calls[backend])
            running = {backend: calls[backend] for backend, row in found.items() if "peak_gb" in row}
            slow = max((growth * before[backend]["median"] for backend in running), default=0.0) > limit_seconds / 10
            for backend, seconds in time_in_turns(running, repeats=1 if slow else 5).items():
                found[backend] |= summarise(seconds)
            for backend, row in found.items():
                setting = {"kind": kind, "head_channels": head_channels, "pass": "both" if backward else "forward"}
                setting |= {"tokens": tokens, "keys": keys, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
                rows.append({**setting, **row})
                print(line(rows[-1]), flush=True)
            before = {backend: row for backend, row in found.items() if "median" in row}
    return rows


def memory(run: Callable[[], None]) -> dict:
    """Peak memory of a call, or why it has none."""
    try:
        return {"peak_gb": peak_memory(run)}
    except (InputError, RuntimeError) as error:  # out of memory is a RuntimeError, too
        full = "out of memory" in str(error) or "allocate" in str(error)
        return {"not_measured": "out of memory" if full else "no such kernel here"}


def call(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backward: bool) -> Callable[[], None]:
    def run() -> None:
        if backend in KERNELS:
            with sdpa_kernel(KERNELS[backend]):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = attention(q, k, v, backend)
        if backward:
            torch.autograd.grad(out.sum(), (q, k, v))

    return run


def line(row: dict) -> str:
    start = f"{row['kind']:>6} {row['head_channels']:4} {row['pass']:>8} {row['tokens']:6} {row['backend']:>14}"
    if "not_measured" in row:
        return f"{start} not measured from here on: {row['not_measured']}"
    return f"{start} {1000 * row['median']:9.2f} {1000 * row['peak_gb']:8.1f}"


if __name__ == "__main__":
    main()
