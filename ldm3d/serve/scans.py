"""Scans that users drop onto the page, and what the model makes of them: the same head with other covariates.

A scan is a file in a temporary folder for as long as it takes to read it. Then the last few stay in memory.
"""

import json
import secrets
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray

from ldm3d.applications.edit import edit
from ldm3d.applications.placed import PlacedScan, place
from ldm3d.covariates import Value
from ldm3d.data.nifti import pack_volume, read_volume, to_image
from ldm3d.errors import InputError, choose
from ldm3d.pipeline import Pipeline
from ldm3d.serve.asked import Limits, whole_number
from ldm3d.serve.studio import Job

KINDS = (".nii", ".nii.gz", ".mgz")
FIELDS = ("scan", "source", "covariates", "steps", "coarse")
STEPS = 20  # of the full edit, by default


@dataclass(frozen=True)
class Edited:
    """A scan with other covariates.

    Attributes:
        scan: its name, from `Scans.add`.
        source: (name, value or None), the scan's own covariates.
        changes: (name, value) of those that differ; empty for the scan itself.
        steps: of the sampler.
        coarse: a preview, with few steps.
        own_voxels: on the scan's own voxels and in its own intensities; else on the model's grid, in [0, 1].
    """

    scan: str
    source: tuple[tuple[str, Value], ...]
    changes: tuple[tuple[str, Value], ...]
    steps: int
    coarse: bool = False
    own_voxels: bool = False

    @property
    def row(self) -> dict[str, Value]:
        """The covariates that the scan is to have."""
        return {**dict(self.source), **dict(self.changes)}


class Scans:
    """The scans of everyone who uses the page; only who knows a scan's name, a random one, can ask for it.

    Args:
        pipeline: the model.
        limits: how large a scan may be, and how many are kept.
    """

    def __init__(self, pipeline: Pipeline, limits: Limits):
        self.pipeline, self.limits = pipeline, limits
        self._temporary = tempfile.TemporaryDirectory(prefix="ldm3d-serve-")
        self.folder = Path(self._temporary.name)
        self._placed: OrderedDict[str, PlacedScan] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, kind: str) -> Path:
        """A new file for an upload; InputError unless its kind is one of `KINDS`."""
        choose("kind of file", kind, KINDS)
        return self.folder / f"{secrets.token_hex(16)}{kind}"

    def add(self, path: Path, job: Job) -> tuple[str, bytes]:
        """Read an upload, bring it to the model's grid and forget the file: (name, volume on the grid as .nii.gz)."""
        job.start()
        try:
            scan, affine = read_volume(path, self.limits.scan_voxels)
        except InputError as error:
            raise InputError(str(error).replace(str(path), "the scan")) from None
        finally:
            path.unlink(missing_ok=True)
        placed = place(self.pipeline, to_image(scan, affine))
        job.step(0)
        name = secrets.token_hex(16)
        with self._lock:
            self._placed[name] = placed
            while len(self._placed) > self.limits.scans:
                self._placed.popitem(last=False)
        return name, self._on_grid(placed, placed.volume[0].float().cpu().numpy())

    def edit(self, asked: Edited, job: Job) -> bytes:
        """The edited scan as .nii.gz, marked as derived."""
        job.start()
        placed = self.get(asked.scan)
        if not asked.changes:
            own, on_grid = placed.scan, placed.volume
        else:
            made = edit(
                self.pipeline,
                placed,
                dict(asked.source),
                dict(asked.changes),
                steps=asked.steps,
                progress=lambda done, _: job.step(done),
            )
            own, on_grid = (made.back() if asked.own_voxels else placed.scan), made.volume()
        if asked.own_voxels:
            return pack_volume(own, placed.affine, placed.mark)
        return self._on_grid(placed, on_grid[0].float().cpu().numpy())

    def get(self, name: str) -> PlacedScan:
        with self._lock:
            if name in self._placed:
                self._placed.move_to_end(name)
                return self._placed[name]
        raise InputError(f"this scan is no longer here: the last {self.limits.scans} are kept; drop it again")

    def close(self) -> None:
        self._temporary.cleanup()

    def _on_grid(self, placed: PlacedScan, volume: NDArray) -> bytes:
        return pack_volume(self.pipeline.cropped(volume), self.pipeline.output_grid.affine, placed.mark)


def read_edited(text: bytes | str, scans: Scans, preview_steps: int, own_voxels: bool = False) -> Edited:
    """A request from JSON: {"scan": NAME, "source": {...}, "covariates": {...}, "steps": 20, "coarse": false}.

    `covariates` are those that the edited scan is to have; those left out stay as in `source`.

    Raises:
        InputError: no such JSON, no such scan, an unknown key, or a value that the model does not take.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(values.get(key, {}), dict) for key in ("source", "covariates")):
        raise InputError("the request is no JSON object with `source` and `covariates` as objects")
    for key in values:
        choose("key of a request", key, FIELDS)
    scans.get(name := str(values.get("scan")))
    schema, coarse = scans.pipeline.schema, values.get("coarse") is True
    source = schema.parse(values.get("source", {}))
    to = schema.parse({**source, **values.get("covariates", {})})
    changes = tuple((key, value) for key, value in to.items() if value is not None and value != source[key])
    steps = whole_number(values, "steps", 1, scans.limits.steps) or STEPS
    return Edited(name, tuple(source.items()), changes, min(steps, preview_steps) if coarse else steps, coarse, own_voxels)
