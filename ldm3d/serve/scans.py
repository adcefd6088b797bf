"""Scans that users drop onto the page, and what `ldm3d.serve.works` makes of them.

A scan is a file in a temporary folder for as long as it takes to read it. Then the last few stay in memory.
"""

import secrets
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path

from numpy.typing import NDArray

from ldm3d.applications.placed import PlacedScan, place
from ldm3d.data.nifti import pack_volume, read_volume, to_image
from ldm3d.errors import InputError, choose
from ldm3d.pipeline import Pipeline
from ldm3d.serve.asked import Limits
from ldm3d.serve.studio import Job
from ldm3d.serve.works import Made, Work

KINDS = (".nii", ".nii.gz", ".mgz")


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
        self._made: OrderedDict[Work, Made] = OrderedDict()  # so that a download need not wait again
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

    def make(self, asked: Work, part: str, job: Job) -> bytes:
        """What becomes of a scan as .nii.gz, marked as derived.

        Args:
            asked: what.
            part: "grid", on the model's grid and in [0, 1]; "own", on the scan's own voxels and in its own intensities;
                "spread" and "deviation", likewise how far to trust it.
            job: is told of every step.
        """
        job.start()
        placed = self.get(asked.scan)
        with self._lock:
            made = self._made.get(asked)
        if made is None:
            made = asked.make(placed, lambda done, total: job.step(done, total))
            with self._lock:
                self._made[asked] = made
                while len(self._made) > self.limits.scans:
                    self._made.popitem(last=False)
        if part == "grid":
            return self._on_grid(placed, made.volume)
        if part == "own":
            return pack_volume(*made.own(), placed.mark)
        if made.spread is None or made.deviation is None:
            raise InputError("there is no deviation: it needs a scan that is restored by two samples or more")
        return self._on_grid(placed, made.spread) if part == "spread" else pack_volume(*made.deviation(), placed.mark)

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
