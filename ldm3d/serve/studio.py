"""The model at work: volumes as NIfTI files, one at a time in one thread; each can be cancelled between two steps."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from ldm3d.covariates import Value
from ldm3d.data.nifti import pack_volume
from ldm3d.description import Sampling
from ldm3d.diffusion.samplers import SAMPLERS
from ldm3d.errors import InputError
from ldm3d.generation.sampling import draw
from ldm3d.pipeline import Pipeline
from ldm3d.serve import PREVIEW_STEPS
from ldm3d.serve.asked import Asked, Limits
from ldm3d.serve.works import works_of


class Cancelled(Exception):
    """Nobody waits for the volume any more."""


class Job:
    """A volume in the making.

    Args:
        seconds: that it may take.
        total: steps that there will be, as far as it is known.

    Attributes:
        steps: that are done, of the sampler mostly.
    """

    def __init__(self, seconds: float, total: int = 1):
        self.steps, self.total, self._cancelled = 0, total, threading.Event()
        self._seconds, self._end = seconds, float("inf")

    def start(self) -> None:
        """The time runs from here."""
        self._end = time.monotonic() + self._seconds

    def cancel(self) -> None:
        self._cancelled.set()

    def step(self, done: int, total: int | None = None) -> None:
        """Note a step; raises Cancelled, or InputError where the time is over."""
        self.steps, self.total = done, total or self.total
        if self._cancelled.is_set():
            raise Cancelled
        if time.monotonic() > self._end:
            raise InputError(
                f"stopped after {self._seconds:g} seconds, in step {done}; ask for fewer steps, or start the page with "
                "more --seconds"
            )


class _Watched:
    """A pipeline whose sampling tells a job of its steps; `ldm3d.generation.sampling.draw` draws from it."""

    def __init__(self, pipeline: Pipeline, group_size: int, progress: Callable[[int], None]):
        self._pipeline, self.group_size, self._progress = pipeline, group_size, progress
        self.threads, self.device, self.decode = pipeline.threads, pipeline.device, pipeline.decode

    def latents(self, requests: Sequence[Mapping[str, Value]], sampling: Sampling, numbers: Sequence[int]) -> Tensor:
        return self._pipeline.latents(requests, sampling, numbers, self._progress)


class Studio:
    """Makes volumes of a pipeline.

    A full volume is the one that `pipeline(...)` makes for the same covariates, seed and sampling, to the last bit. A coarse
    one goes through the U-Net alone, not in a batch of `group_size`, so that it comes sooner; its last bits may differ.

    Args:
        pipeline: the model.
        name: what the page calls it.
        limits: of requests.
        preview_steps: of the sampler, for a coarse volume.
    """

    def __init__(self, pipeline: Pipeline, name: str, limits: Limits | None = None, preview_steps: int = PREVIEW_STEPS):
        self.pipeline, self.name = pipeline, name
        self.limits, self.preview_steps = limits or Limits(), preview_steps
        self._thread = ThreadPoolExecutor(1, "ldm3d")
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def kept(self, key: Hashable) -> bytes | None:
        """The volume as .nii.gz, where it was made before and is still kept; the key is an `Asked`, or of `run`."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def submit(self, asked: Asked, job: Job) -> "Future[bytes]":
        """Make a volume in the studio's thread: its .nii.gz. Raises Cancelled or InputError from the future."""
        return self.run(asked, lambda: self._make(asked, job))

    def run(self, key: Hashable, make: Callable[[], bytes]) -> "Future[bytes]":
        """Make something else in the studio's thread, which is kept under a key; None keeps nothing."""

        def made() -> bytes:
            content = self.kept(key)
            if content is None:
                content = make()
                self._keep(key, content)
            return content

        return self._thread.submit(made)

    def _keep(self, key: Hashable, content: bytes) -> None:
        if key is None:
            return
        with self._lock:
            self._kept[key] = content
            while sum(map(len, self._kept.values())) > self.limits.kept:
                self._kept.popitem(last=False)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _make(self, asked: Asked, job: Job) -> bytes:
        job.start()
        job.step(0)
        model = _Watched(self.pipeline, 1 if asked.coarse else self.pipeline.group_size, job.step)
        (volume,) = draw(model, [asked.row], [0], asked.sampling, 1)
        return pack_volume(self.pipeline.cropped(volume), self.pipeline.output_grid.affine, self.pipeline.mark)

    def description(self) -> dict[str, Any]:
        """What the page needs to know of the model, as JSON values."""
        grid, sampling = self.pipeline.output_grid, self.pipeline.sampling
        return {
            "name": self.name,
            "hash": self.pipeline.model_hash,
            "suffix": self.pipeline.suffix,
            "shape": list(grid.shape),
            "spacing_mm": list(grid.spacing_mm),
            "covariates": [_control(c) for c in self.pipeline.schema],
            "sampling": {name: getattr(sampling, name) for name in ("sampler", "steps", "guidance", "seed")},
            "samplers": list(SAMPLERS),
            "works": works_of(self.pipeline),
            "guides": bool(len(self.pipeline.schema)) and not self.pipeline.schema.required,
            "preview_steps": self.preview_steps,
            "max_steps": self.limits.steps,
        }


def _control(covariate: Any) -> dict[str, Any]:
    """A covariate as a slider or a choice."""
    control = {name: getattr(covariate, name) for name in ("name", "kind", "unit", "seen", "required")}
    control |= {
        "label": covariate.name.removesuffix(f"_{covariate.unit}").replace("_", " "),
        "categories": covariate.categories,
    }
    if covariate.kind == "continuous":
        around = (covariate.mean - 4 * covariate.std, covariate.mean + 4 * covariate.std)
        low, high = covariate.range or around
        if covariate.range and covariate.seen:  # a range of what makes sense is wide; the slider is for what can be seen
            margin = 0.15 * (covariate.seen[1] - covariate.seen[0])
            low, high = max(low, covariate.seen[0] - margin), min(high, covariate.seen[1] + margin)
        step = _step(high - low)
        low, high = -(-low // step) * step, high // step * step
        control |= {"low": low, "high": high, "step": step, "middle": round(covariate.mean / step) * step}
    return control


def _step(width: float) -> float:
    """A round number, of which some hundred make the width."""
    step = 10.0**-6
    while width / step > 400:
        step *= 10
    return step
