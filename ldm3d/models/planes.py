"""The planes of a volume as a stream of chunks, and what is done with them that no layer knows of: joined, cut, kept.

A chunk is a slab of whole planes along X. Chunks come and go in their order; their sizes differ.
"""

import ctypes
import sys
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Chunks = Iterator[Tensor]  # (N, C, planes, Y, Z) each, in the order of X

# PyTorch leaves float32 convolutions to oneDNN from N C X Y > 20480 on; its own are several times slower
ONEDNN_SIZE = 20480

# What is kept for long is kept in blocks larger than those that the C library takes from its heap (glibc: up to 32 MiB). In
# between the chunks that come and go they would leave holes, and a hole is memory, too.
SLAB_BYTES = 64 * 2**20


class Planes:
    """A queue that planes enter and leave in chunks of any size."""

    def __init__(self) -> None:
        self.chunks: deque[Tensor] = deque()
        self.count = 0

    def put(self, chunk: Tensor) -> None:
        self.chunks.append(chunk)
        self.count += chunk.shape[2]

    def take(self, planes: int, keep: int = 0) -> list[Tensor]:
        """The first planes, in one or more parts. The last `keep` of them stay in the queue."""
        parts, missing = [], planes
        while missing > 0:
            chunk = self.chunks.popleft()
            parts.append(chunk[:, :, :missing])
            missing -= chunk.shape[2]
        if missing < 0:
            self.chunks.appendleft(chunk[:, :, missing:])
        self.count -= planes
        for part in reversed(parts):
            if keep > 0:
                self.chunks.appendleft(part[:, :, -keep:])
                self.count += min(keep, part.shape[2])
                keep -= part.shape[2]
        return parts


def windows_of(chunks: Chunks, before: int, after: int, channels: int, limit: int) -> Chunks:
    """Every plane once, with the planes before and after it; zeros beyond both ends.

    Windows are as large as what comes and the limit allow, for as many as `channels` channels. What is less than a quarter of
    that, or too small for oneDNN, waits for more.
    """
    queue, border, around = Planes(), None, before + after
    for chunk in chunks:
        if border is None:
            border = torch.zeros_like(chunk[:, :, :1])
            n, c, _, y, _ = chunk.shape
            most = fitting(chunk, channels, limit)
            least = max(most // 4, min(ONEDNN_SIZE // (n * c * y) + 2 - around, 2 * most), 1)
            for _ in range(before):
                queue.put(border)
        queue.put(chunk)
        del chunk
        while queue.count >= least + around:
            yield joined(queue.take(min(queue.count, max(most, least) + around), keep=around))
    if border is not None:
        for _ in range(after):
            queue.put(border)
    if queue.count > around:
        yield joined(queue.take(queue.count))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Planes side by side, channels last in memory (where torch.cat would take several times as long)."""
    if len(parts) == 1:
        return parts[0]
    planes = [part.shape[2] for part in parts]
    whole = empty_like(parts[0], sum(planes))
    for place, part in zip(whole.split(planes, dim=2), parts):
        place.copy_(part)
    return whole


def empty_like(chunk: Tensor, planes: int) -> Tensor:
    """Room for planes like those of `chunk`, channels last in memory."""
    n, c, _, y, z = chunk.shape
    return chunk.new_empty((n, planes, y, z, c)).movedim(-1, 1)


def fitting(chunk: Tensor, channels: int, limit: int) -> int:
    """How many planes like those of `chunk`, of that many channels or its own, are within the limit; at least 1."""
    n, c, _, y, z = chunk.shape
    return max(1, limit // (n * max(c, channels) * y * z * chunk.element_size()))


def cut(chunks: Chunks, channels: int, limit: int) -> Chunks:
    """The same planes in chunks within the limit."""
    for chunk in chunks:
        yield from chunk.split(fitting(chunk, channels, limit), dim=2)


def slabs_of(chunks: Chunks) -> Chunks:
    """The same planes in chunks of SLAB_BYTES, each filled as its planes come."""
    slab, filled = None, 0
    for chunk in chunks:
        n = fitting(chunk, 1, SLAB_BYTES) + 1
        while chunk.shape[2]:
            if slab is None:
                if chunk.device.type == "cpu":
                    _return_holes()
                slab = empty_like(chunk, n)
            part = chunk[:, :, : n - filled]
            slab.narrow(2, filled, part.shape[2]).copy_(part)
            filled, chunk = filled + part.shape[2], chunk[:, :, part.shape[2] :]
            if filled == n:
                yield slab
                slab, filled = None, 0
    if slab is not None:
        yield slab.narrow(2, 0, filled)


def _return_holes() -> None:
    """Give the unused parts of the heap back to the system: up to a quarter of the peak (glibc has a call for it)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def placed(chunks: Chunks) -> Iterator[tuple[int, Tensor]]:
    """Every chunk with the number of its first plane."""
    start = 0
    for chunk in chunks:
        yield start, chunk
        start += chunk.shape[2]
