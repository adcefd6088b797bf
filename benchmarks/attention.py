"""Attention backends against the number of keys: seconds, forward and backward, in bfloat16 and float32."""

import torch
from protocol import device, spread, time_in_turns, write

from ldm3d.errors import InputError
from ldm3d.models.attention import attention, xformers_works

HEADS, HEAD_CHANNELS, TOKENS_IN_ALL = 3, 32, 8192


def main() -> None:
    rows, where = [], device()
    print(f"{'keys':>6} {'dtype':>9} {'backend':>9} {'ms':>8} {'ratio to sdpa':>14}")
    for keys in (4, 64, 150, 256, 512, 1024, 2048):
        for dtype in (torch.bfloat16, torch.float32):
            samples, queries = max(1, TOKENS_IN_ALL // max(keys, 150)), max(keys, 150)
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
                found = spread(values)
                ratio = found["median"] / spread(seconds["sdpa"])["median"]
                name = str(dtype).removeprefix("torch.")
                print(f"{keys:6} {name:>9} {backend:>9} {1000 * found['median']:8.1f} {ratio:14.2f}")
                rows.append({"keys": keys, "queries": queries, "samples": samples, "dtype": name, "backend": backend, **found})
    print(write("attention", rows))


if __name__ == "__main__":
    main()
