"""How a latent is decoded: whole, or streamed if that saves memory.

The memory of a decode is measured in a dry run on tensors without data (PyTorch's meta device) that counts the bytes in use,
which works for any network, ours or MONAI's.
"""

import dataclasses
import functools
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm3d.errors import InputError
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.recomputing import decode_recomputed
from ldm3d.models.streaming import chunk_bytes_of, decode_streamed

MODES = ("auto", "whole", "streamed")
SAFETY = 1.1  # of an estimate
# glibc takes blocks up to 32 MiB from its heap, which fragments: the holes measure 0.6 to 0.8 of the bytes in use
HEAP_BLOCK, HOLES = 32 * 2**20, 0.8
SMALL = 2**29  # half a GiB, the memory of PyTorch itself
KEPT = 2**26  # a decode that takes less keeps all that its gradients need, some ten to twenty times as much
NOT_STREAMED = "this decoder cannot be streamed"
UNLIMITED = 2**60  # in cgroup v1, a limit above this means none


@dataclass(frozen=True)
class Plan:
    """How to decode.

    Args:
        mode: "whole" or "streamed".
        estimated_bytes: the peak, above the weights; the float32 volume is in it.
        reason: why, in words.
    """

    mode: str
    estimated_bytes: int
    reason: str

    def __str__(self) -> str:
        return f"decoding {self.mode}, {_gib(self.estimated_bytes)} at the peak: {self.reason}"


def plan_decode(
    autoencoder: nn.Module, latent_shape: Sequence[int], device: torch.device, mode: str = "auto", free: int | None = None
) -> Plan:
    """Choose between a whole and a streamed decode.

    A CPU decodes as fast either way, so the choice is by memory. A GPU is faster with few large steps, so it streams only what
    would not fit.

    Args:
        autoencoder: see `decode_streamed`.
        latent_shape: (N, c, x, y, z).
        device: where the network is.
        mode: "auto", or "whole" or "streamed" to force one of them.
        free: bytes of free memory; None: as found.

    Raises:
        InputError: another mode.
    """
    if mode not in MODES:
        raise InputError(f"decode {mode!r} is not one of {', '.join(MODES)}")
    if mode != "auto":
        return Plan(mode, decode_bytes(autoencoder, latent_shape, device, mode == "streamed"), "as asked")
    whole = decode_bytes(autoencoder, latent_shape, device, streamed=False)
    try:
        streamed = decode_bytes(autoencoder, latent_shape, device, streamed=True)
    except InputError:
        return Plan("whole", whole, NOT_STREAMED)
    if whole <= max(streamed, SMALL):
        return Plan("whole", whole, "a stream would save nothing to speak of")
    if device.type == "cpu":
        return Plan("streamed", streamed, f"whole it would be {_gib(whole)}, and no faster")
    free = free_bytes(device) if free is None else free
    if whole > free:
        return Plan("streamed", streamed, f"whole it would be {_gib(whole)}, and {_gib(free)} are free")
    return Plan("whole", whole, f"{_gib(free)} are free")


@torch.no_grad()
def tried(plan: Plan, autoencoder: nn.Module, latent_shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Plan:
    """A plan that has been tried: streamed if a whole decode runs out of memory on a GPU.

    The estimate counts tensors, not the workspace of cuDNN, nor the memory of other processes.

    Args:
        plan: from `plan_decode` with mode "auto".
        autoencoder, latent_shape, device: as there.
        dtype: of the latents.
    """
    if plan.mode != "whole" or plan.estimated_bytes <= SMALL or plan.reason == NOT_STREAMED:
        return plan
    try:
        autoencoder.decode(torch.zeros(tuple(latent_shape), dtype=dtype, device=device))
        return plan
    except torch.OutOfMemoryError:
        pass  # the exception keeps the tensors of the decode: they are freed outside of this block
    if device.type == "cuda":
        torch.cuda.empty_cache()
    streamed = plan_decode(autoencoder, latent_shape, device, "streamed")
    return dataclasses.replace(
        streamed, reason=f"whole it ran out of memory, though {_gib(plan.estimated_bytes)} were counted"
    )


class PlannedDecoder:
    """Decodes by a plan that is made once for each shape and then holds, since the last bits of a volume follow from it."""

    def __init__(self):
        self._plans: dict[tuple, Plan] = {}

    def plan(
        self, autoencoder: LatentSpace, shape: Sequence[int], dtype: torch.dtype, device: torch.device, mode: str
    ) -> Plan:
        """How latents of a shape (N, c, x, y, z) are decoded; `mode` as in `plan_decode`."""
        case = tuple(shape), dtype, device, mode
        if case not in self._plans:
            plan = plan_decode(autoencoder, shape, device, mode)
            if mode == "auto" and device.type == "cuda":
                plan = tried(plan, autoencoder, shape, dtype, device)
            self._plans[case] = plan
            logging.getLogger("ldm3d").info("%s", plan)
        return self._plans[case]

    def decode(self, autoencoder: LatentSpace, z: Tensor, mode: str) -> Tensor:
        """Latents in their own scale to volumes (N, C, X, Y, Z), float32, clipped to [0, 1]; `mode` as in `plan_decode`.

        Where gradients are asked for, the decode is whole, and a large one keeps little of what they need: see
        `ldm3d.models.recomputing`.

        Raises:
            InputError: a whole decode runs out of a GPU's memory, and `mode` is not "auto".
        """
        if z.requires_grad:
            whole = self.plan(autoencoder, z.shape, z.dtype, z.device, "whole").estimated_bytes
            decode = autoencoder.decode if whole < KEPT else functools.partial(decode_recomputed, autoencoder)
            return decode(z).float().clamp(0, 1)
        plan = self.plan(autoencoder, z.shape, z.dtype, z.device, mode)
        if plan.mode == "whole":
            try:
                return autoencoder.decode(z).float().clamp(0, 1)
            except torch.OutOfMemoryError as error:
                if mode != "auto":  # as a series was begun: another way would give other last bits
                    raise InputError(
                        f"decoding a whole volume runs out of GPU memory, which it did not when this was begun ({error}); "
                        "end what else runs on this GPU, or name another folder: a new series is decoded in parts if need be"
                    ) from None
                logging.getLogger("ldm3d").warning(
                    "a whole decode ran out of memory: from here on volumes are decoded in parts"
                )
            # Outside of the handler, which holds on to the tensors of the decode
            self._plans[tuple(z.shape), z.dtype, z.device, mode] = plan_decode(autoencoder, z.shape, z.device, "streamed")
        return decode_streamed(autoencoder, z).clamp_(0, 1)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


# Memory of a decode


def decode_bytes(autoencoder: nn.Module, latent_shape: Sequence[int], device: torch.device, streamed: bool) -> int:
    """Estimated peak of a decode above the weights, with a margin; arguments as in `plan_decode`."""
    run = _Decode(autoencoder, chunk_bytes_of(device) if streamed else None)
    state = {**dict(run.named_parameters()), **dict(run.named_buffers())}
    blank = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    z = torch.empty(tuple(latent_shape), dtype=next(run.parameters()).dtype, device="meta")
    with torch.no_grad(), LiveBytes(device) as counter:
        torch.func.functional_call(run, blank, (z,))
    return int(SAFETY * counter.peak)


class _Decode(nn.Module):
    """A decode as a module, so that its weights can be replaced by empty ones."""

    def __init__(self, autoencoder: nn.Module, chunk_bytes: int | None):
        super().__init__()
        self.autoencoder, self.chunk_bytes = autoencoder, chunk_bytes

    def forward(self, z: Tensor) -> Tensor:
        if self.chunk_bytes:
            return decode_streamed(self.autoencoder, z, self.chunk_bytes)
        return self.autoencoder.decode(z)


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of new tensors that are in use; `peak` is the largest count.

    Args:
        device: on which they would be. A CPU needs more: the heap's holes, and copies for convolutions, because oneDNN works
            channels last and copies other inputs there and back.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.cpu = device.type == "cpu"
        self.bytes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.native_batch_norm.default:  # otherwise most of the time of a dry run
            x = arguments[0]
            result = torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
        else:
            result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        copied = 0
        if self.cpu and function is torch.ops.aten.convolution.default:
            x = arguments[0]
            if not x.is_contiguous(memory_format=torch.channels_last_3d):
                copied = x.nbytes + result.nbytes
        self.peak = max(self.peak, self.now + copied)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # views share it
        if key not in self.bytes:
            holes = HOLES if self.cpu and storage.nbytes() <= HEAP_BLOCK else 0.0
            self.bytes[key] = int((1 + holes) * storage.nbytes())
            self.now += self.bytes[key]
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


# Free memory


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that a process may still allocate: of the GPU, or of the machine within its cgroups (Slurm, containers).

    Args:
        device: whose memory.
        root: of the file system that describes cgroups.
    """
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, for reuse
        return torch.cuda.mem_get_info(device)[0] + idle
    return min([psutil.virtual_memory().available, *_cgroup_free(root)])


def _cgroup_free(root: Path) -> list[int]:
    """Free memory by the limits of the process's control groups and their parents, v2 and v1."""
    free = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return free
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # Inside a container the path is the host's, while the files are the container's own, at the base
        folder = base / path.lstrip("/")
        for group in [folder, *folder.parents]:
            if not group.is_relative_to(base):
                break
            try:
                allowed, used = (group / limit).read_text().strip(), int((group / usage).read_text())
                statistics = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if allowed != "max" and int(allowed) < UNLIMITED:
                free.append(max(0, int(allowed) - used + int(statistics.get(cache, 0))))  # cached files make room
    return free
