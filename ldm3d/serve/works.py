"""What the page makes of a scan: the same head with other covariates, its healthy counterpart, or the scan restored.

A request says which by `work`, and of which scan:

    {"work": "edit", "scan": NAME, "source": {...}, "covariates": {...}, "steps": 20, "coarse": false}
    {"work": "counterpart", "scan": NAME, "source": {...}, "samples": 4}
    {"work": "restore", "scan": NAME, "source": {...}, "operator": "missing=z:10-14", "noise": 0.01, "samples": 4}

`source` are the person's own covariates, `covariates` those that an edit is to have. An operator names no file; "hole" needs
{"centre": [i, j, k], "radius_mm": 15} beside it, a voxel of the volumes that the page shows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ldm3d.applications.counterpart import counterpart
from ldm3d.applications.edit import edit
from ldm3d.applications.placed import PlacedScan
from ldm3d.applications.restore import restore
from ldm3d.covariates import Value
from ldm3d.errors import InputError, choose, shown
from ldm3d.pipeline import Pipeline
from ldm3d.serve.asked import Limits, number, read_object, whole_number

Covariates = tuple[tuple[str, Value], ...]
Report = Callable[[int, int], None]

STEPS = 20  # of the full edit, by default
SAMPLES = 4
MOST_SAMPLES = 16
HAPPENED = ("noise", "missing", "slices", "blur", "hole")  # operators that need no file


class Made(NamedTuple):
    """What became of a scan.

    Attributes:
        volume: (C, X, Y, Z) on the networks' grid, in [0, 1].
        own: makes it on the scan's own voxels or finer ones, in its own intensities: (volume, affine).
        spread: like `volume`, how far to trust it: a deviation; None where there is nothing to say.
        deviation: likewise, like `own`.
    """

    volume: NDArray
    own: Callable[[], tuple[NDArray, NDArray]]
    spread: NDArray | None = None
    deviation: Callable[[], tuple[NDArray, NDArray]] | None = None


class Work(Protocol):
    """A request, which can be a key."""

    name: ClassVar[str]
    scan: str
    source: Covariates

    @property
    def row(self) -> dict[str, Value]:
        """The covariates of what is made."""
        ...

    @property
    def coarse(self) -> bool:
        """Whether it is a preview."""
        ...

    def make(self, placed: PlacedScan, progress: Report) -> Made:
        """Make it; progress gets the numbers of parts that are done and that there will be."""
        ...


@dataclass(frozen=True)
class _OfScan:
    """A scan by its name, from `Scans.add`, and the person's own covariates."""

    scan: str
    source: Covariates

    @property
    def row(self) -> dict[str, Value]:
        return dict(self.source)

    @property
    def coarse(self) -> bool:
        return False


@dataclass(frozen=True)
class Edited(_OfScan):
    """The same head with other covariates, `changes`; empty for the scan itself."""

    name = "edit"
    changes: Covariates
    steps: int
    preview: bool = False

    @property
    def row(self) -> dict[str, Value]:
        return {**dict(self.source), **dict(self.changes)}

    @property
    def coarse(self) -> bool:
        return self.preview

    def make(self, placed: PlacedScan, progress: Report) -> Made:
        if not self.changes:
            return Made(placed.volume[0].float().cpu().numpy(), lambda: (placed.scan, placed.affine))
        made = edit(placed.pipe, placed, dict(self.source), dict(self.changes), steps=self.steps, progress=progress)
        return Made(made.volume()[0].float().cpu().numpy(), lambda: (made.back(), placed.affine))


@dataclass(frozen=True)
class HealthyCounterpart(_OfScan):
    """The same head as a model of healthy people would have it; the mean of some samples."""

    name = "counterpart"
    samples: int

    def make(self, placed: PlacedScan, progress: Report) -> Made:
        made = counterpart(placed.pipe, placed, self.row, samples=self.samples, progress=progress)
        own = lambda: (placed.back(made.mean, reference=placed.volume), placed.affine)  # noqa: E731
        return Made(made.mean[0].float().cpu().numpy(), own)


@dataclass(frozen=True)
class Restoration(_OfScan):
    """The scan without what happened to it; the mean of some samples, and their deviation.

    Attributes:
        operator: a word of `ldm3d.applications.degraded`; "hole" for what follows.
        hole: the voxel on the networks' grid in its middle, and its radius in mm.
    """

    name = "restore"
    operator: str
    hole: tuple[float, ...]
    noise: float
    samples: int

    def make(self, placed: PlacedScan, progress: Report) -> Made:
        operator = self.operator
        if self.hole:
            *centre, radius = self.hole
            place = np.array(placed.info["grid_affine"]) @ [*centre, 1]
            operator = f"ball={','.join(f'{mm:.3f}' for mm in place[:3])}:{radius:g}"
        options = {"covariates": self.row, "samples": self.samples, "progress": progress}
        made = restore(placed.pipe, placed, operator, self.noise, **options)
        how = made.degraded
        deviation = lambda: (how.deviation_back(placed, made.deviation), how.affine)  # noqa: E731
        own = lambda: (how.back(placed, made.mean), how.affine)  # noqa: E731
        mean = made.mean[0].float().cpu().numpy()
        return Made(mean, own, made.deviation[0].float().cpu().numpy(), deviation) if self.samples > 1 else Made(mean, own)


def works_of(pipeline: Pipeline) -> list[str]:
    """Names of what a model can make of a scan; none for volumes with several channels, which no scan is."""
    if pipeline.autoencoder.in_channels != 1:
        return []
    return ["edit", "counterpart", "restore"] if len(pipeline.schema) else ["counterpart", "restore"]


def read_work(text: bytes | str, pipeline: Pipeline, limits: Limits, preview_steps: int) -> Work:
    """A request from JSON, see the top of this file.

    Raises:
        InputError: no such JSON, an unknown key, or a value that the model or the limits do not allow.
    """
    values = read_object(text, ("source", "covariates"))
    name = choose("work", values.get("work", "edit"), works_of(pipeline))
    about = str(values.get("scan")), tuple(pipeline.schema.parse(values.get("source", {})).items())
    return _READERS[name](about, values, pipeline, limits, preview_steps)


def _read_edit(about: tuple[str, Covariates], values: dict, pipeline: Pipeline, limits: Limits, preview_steps: int) -> Work:
    _check_keys(values, "covariates", "steps", "coarse")
    scan, source = about
    to = pipeline.schema.parse({**dict(source), **values.get("covariates", {})})
    changes = tuple((key, value) for key, value in to.items() if value is not None and value != dict(source)[key])
    coarse = values.get("coarse") is True
    steps = whole_number(values, "steps", 1, limits.steps) or STEPS
    return Edited(scan, source, changes, min(steps, preview_steps) if coarse else steps, coarse)


def _read_counterpart(about: tuple[str, Covariates], values: dict, *_: Any) -> Work:
    _check_keys(values, "samples")
    return HealthyCounterpart(*about, whole_number(values, "samples", 1, MOST_SAMPLES) or SAMPLES)


def _read_restoration(about: tuple[str, Covariates], values: dict, pipeline: Pipeline, *_: Any) -> Work:
    _check_keys(values, "operator", "noise", "samples", "centre", "radius_mm")
    operator = str(values.get("operator", "noise"))
    name = choose("operator", operator.partition("=")[0], HAPPENED)
    hole = _hole(values, pipeline) if name == "hole" else ()
    noise = number(values, "noise", 1e-4, 1) or 0.01
    return Restoration(*about, operator, hole, noise, whole_number(values, "samples", 1, MOST_SAMPLES) or SAMPLES)


_READERS = {"edit": _read_edit, "counterpart": _read_counterpart, "restore": _read_restoration}


def _check_keys(values: Mapping[str, Any], *known: str) -> None:
    for key in values:
        choose("key of a request", key, ("work", "scan", "source", *known))


def _hole(values: Mapping[str, Any], pipeline: Pipeline) -> tuple[float, ...]:
    centre, radius = values.get("centre"), number(values, "radius_mm", 0.1, 1000) or 15
    if not isinstance(centre, list) or len(centre) != 3 or not all(type(n) in (int, float) and abs(n) < 1e6 for n in centre):
        raise InputError(f"centre is {shown(centre)}; give the three numbers of a voxel")
    return *(n + before for n, (before, _) in zip(centre, pipeline.crop)), radius
