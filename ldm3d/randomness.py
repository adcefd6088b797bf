"""Random numbers that follow from a position in the experiment, and from nothing else.

Row r of step s of a run draws from `generator(seed, s, r)`, volume i of a series from `generator("sample", seed, i)`: they
depend neither on the number of processes nor on the size of a batch.
"""

import hashlib

import torch


def generator(*position: int | str) -> torch.Generator:
    """A CPU generator for a position in the experiment, for example (seed, step, row); different positions are independent."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
