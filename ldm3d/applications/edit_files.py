"""Edited scans as a BIDS derivative: a folder that a killed command leaves in order, and goes on with.

OUT/sub-XX[/ses-YY]/anat/   ..._desc-edited_T1w.nii.gz    the scan with other covariates; desc-trajectory, 4D, for several
                            ..._desc-difference_T1w       edited minus scan, in the scan's intensities
                            ..._desc-tissuechange_T1w     share of each voxel that became (+) or ceased to be (-) tissue
                            ..._desc-spread_T1w           deviation of the change over samples, where there are several
                            ..._desc-edited_T1w.json      (or desc-trajectory) appears last: with it the scan is done
OUT/figures/                a picture of each
OUT/volumes.tsv             measured volumes before and after

BIDS knows no T1w images that are maps or have four dimensions, so validators are told to ignore these.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import ldm3d
from ldm3d import figures
from ldm3d.applications.derived import source_of
from ldm3d.applications.edit import Edit
from ldm3d.covariates import Value, describe
from ldm3d.data.derivative import as_json, derivative_files
from ldm3d.data.nifti import write_volume
from ldm3d.data.placing import restore
from ldm3d.data.tables import write_table
from ldm3d.errors import InputError
from ldm3d.files import write_atomic
from ldm3d.pipeline import Pipeline
from ldm3d.rulers.volumetry import Measure, apply_measure, tissue_change

README = (
    "Scans edited by a latent diffusion model (ldm3d): what a person's brain might look like with other covariates. They are "
    "derived from scans and partly synthetic; what they show never happened. Not for diagnosis."
)
TABLE = "volumes.tsv"
EDITED, TRAJECTORY = "edited", "trajectory"
MAPS = ("difference", "tissuechange", "spread")
IGNORED = "".join(f"{line}\n" for line in ("figures", TABLE, *(f"*_desc-{name}_*" for name in (TRAJECTORY, *MAPS))))


@dataclass(frozen=True)
class Job:
    """One scan to edit, as it is asked for.

    Attributes:
        scan: its file.
        source: covariates of the scan, as given.
        to: the changes, as given.
        options: of `edit`.
    """

    scan: Path
    source: Mapping[str, Any]
    to: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def label(self) -> tuple[str, str]:
        """(subject, session) by the file's name; "" for no session. Letters and digits of any other name."""
        entities = dict(re.findall(r"(sub|ses)-([A-Za-z0-9]+)", self.scan.name))
        other = re.sub("[^A-Za-z0-9]", "", self.scan.name.partition(".")[0]) or "scan"
        return entities.get("sub", other), entities.get("ses", "")

    @property
    def stem(self) -> str:
        """ "sub-01_ses-2"."""
        subject, session = self.label
        return f"sub-{subject}" + (f"_ses-{session}" if session else "")

    def identity(self, model_hash: str) -> str:
        """Names all that the result follows from."""
        parts = [model_hash, dict(self.source), dict(self.to), dict(self.options)]
        content = hashlib.sha256(self.scan.read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps([content, *parts], default=str, sort_keys=True).encode()).hexdigest()[:16]


class EditFolder:
    """A folder of edited scans.

    Args:
        folder: empty, absent, or of the same edits before.
        pipe: the model.
        measure: of volumes, see `ldm3d.rulers.volumetry.load_measure`.

    Raises:
        InputError: the folder holds something else.
    """

    def __init__(self, folder: Path | str, pipe: Pipeline, measure: Measure):
        self.folder, self.pipe, self.measure = Path(folder), pipe, measure
        description = self.folder / "dataset_description.json"
        made_by = {"Name": "ldm3d", "Version": ldm3d.__version__, "Description": f"edit, model {pipe.model_hash}"}
        self.files = derivative_files("Edited brain scans (DERIVED, partly synthetic)", [made_by], README)
        used = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        known = description.read_text(encoding="utf-8", errors="replace") if description.is_file() else ""
        if used and '"edit, model ' not in known:
            raise InputError(f"{self.folder} is not empty and holds no edited scans; choose another --out")

    def path(self, job: Job, desc: str, ending: str = ".nii.gz") -> Path:
        subject, session = job.label
        anat = self.folder / f"sub-{subject}" / (f"ses-{session}" if session else "") / "anat"
        return anat / f"{job.stem}_desc-{desc}_{self.pipe.suffix}{ending}"

    def is_done(self, job: Job) -> bool:
        """Whether this scan is edited already.

        Raises:
            InputError: it is, but otherwise than asked now.
        """
        for path in (self.path(job, desc, ".json") for desc in (EDITED, TRAJECTORY)):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))["Edit"]["Identity"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if found != job.identity(self.pipe.model_hash):
                raise InputError(f"{path} is of another edit, scan or model; choose another --out, or delete it")
            return True
        return False

    def write(self, job: Job, done: Edit) -> dict[str, Any]:
        """Write an edit; returns its sidecar."""
        for name, content in [*self.files.items(), (".bidsignore", IGNORED)]:
            if not (self.folder / name).exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomic(self.folder / name, content)
        placed, spacing = done.placed, self.pipe.grid.spacing_mm
        before = placed.volume[0].cpu().numpy()
        kind = EDITED if len(done.targets) == 1 else TRAJECTORY
        maps: dict[str, list[NDArray]] = {name: [] for name in (kind, *MAPS)}
        volumes, measured = [], []
        for target in range(len(done.targets)):
            change, spread = done.change(target)
            edited = placed.back(placed.reconstruction + change)
            volumes.append((before + change[0].cpu().numpy()).clip(0, 1))
            maps[kind].append(edited)
            maps["difference"].append(edited - placed.scan)
            tissue = tissue_change(before[0], volumes[-1][0], spacing)
            maps["tissuechange"].append(restore(tissue[None], {**placed.info, "low": 0.0, "high": 1.0})[0])
            if spread is not None:
                maps["spread"].append(placed.back_change(spread[0].cpu().numpy()))
            measured.append(dict(apply_measure(self.measure, volumes[-1], spacing)))
        for name, found in maps.items():
            if found:
                write_volume(self.path(job, name), np.concatenate(found), placed.affine, placed.mark)
        self._draw(job, done, before, volumes)
        sidecar = self._sidecar(job, done, dict(apply_measure(self.measure, before, spacing)), measured)
        write_atomic(self.path(job, kind, ".json"), as_json(sidecar))
        return sidecar

    def write_table(self) -> Path:
        """volumes.tsv of all scans that are done: a row for each target."""
        rows = []
        for path in sorted(self.folder.rglob(f"sub-*_desc-*_{self.pipe.suffix}.json")):
            sidecar = json.loads(path.read_text(encoding="utf-8"))
            of = sidecar["Edit"]
            for target, after in zip(of["To"], of["VolumesAfter"]):
                row = {"participant_id": path.name.partition("_")[0], "scan": sidecar["Sources"][0]}
                row |= {f"from_{name}": value for name, value in of["From"].items()}
                row |= {f"to_{name}": value for name, value in target.items()}
                for name, value in after.items():
                    first = of["VolumesBefore"][name]
                    row |= {f"{name}_before": first, f"{name}_after": value}
                    row[f"{name}_change"] = None if first is None or value is None else round(value - first, 3)
                rows.append(row)
        write_table(self.folder / TABLE, pd.DataFrame(rows))
        return self.folder / TABLE

    def _draw(self, job: Job, done: Edit, before: NDArray, volumes: Sequence[NDArray]) -> None:
        """A film strip: the scan, what it becomes, and where the last one differs."""
        (self.folder / "figures").mkdir(exist_ok=True)
        titles = ["scan: " + describe(done.source), *(describe(_changed(done.source, row)) for row in done.targets)]
        spacing, name = self.pipe.grid.spacing_mm, f"{job.stem}_desc-"
        strip = figures.mosaic(
            [before, *volumes], titles, spacing, columns=min(len(titles), 5), heading="derived, synthetic in part"
        )
        figures.save(strip, self.folder / "figures" / f"{name}edited.png")
        difference = figures.overlay(
            before, volumes[-1] - before, spacing, f"change to {titles[-1]}", "share of the intensity range", signed=True
        )
        figures.save(difference, self.folder / "figures" / f"{name}difference.png")

    def _sidecar(
        self, job: Job, done: Edit, before: Mapping[str, float], after: Sequence[Mapping[str, float]]
    ) -> dict[str, Any]:
        return {
            "Description": f"A {self.pipe.suffix} scan edited to other covariates by ldm3d: derived, and synthetic in part",
            "Sources": [source_of(job.scan)],
            "SkullStripped": self.pipe.skull_stripped,
            "model_hash": self.pipe.model_hash,
            "Edit": {
                "From": _given(done.source),
                "To": [_given(row) for row in done.targets],
                **vars(done.settings),
                "VolumesBefore": _numbers(before),
                "VolumesAfter": [_numbers(row) for row in after],
                "Registration": done.placed.info.get("registration"),
                "Identity": job.identity(self.pipe.model_hash),
            },
        }


def _changed(source: Mapping[str, Value], target: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in target.items() if value != source.get(name)} or dict(target)


def _given(row: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in row.items() if value is not None}


def _numbers(row: Mapping[str, float]) -> dict[str, float | None]:
    return {name: round(float(value), 3) if np.isfinite(value) else None for name, value in row.items()}
