"""The images that a model is given of each scan: found in the dataset, brought to the scan's Grid, and named by fingerprints.

A condition that a scan lacks is a volume of NaN, which stays NaN through every network: it says that nothing is given.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.config.conditions import Condition, DegradedCondition, ImageCondition, LabelsCondition
from ldm3d.config.sections import Config
from ldm3d.data.bids import read_scans
from ldm3d.data.degrade import WorseVolume, degraded
from ldm3d.data.keys import file_key, scan_of
from ldm3d.data.labels import LabelMaps, read_labels, shares_on_grid
from ldm3d.data.nifti import read_volume
from ldm3d.data.placing import grid_of, to_grid
from ldm3d.data.preparing import load_info, load_prepared, load_removed
from ldm3d.data.removed import remove_beside
from ldm3d.data.slicing import Measurement
from ldm3d.errors import InputError, some
from ldm3d.geometry import WORLD, Grid
from ldm3d.randomness import generator

# FreeSurfer's labels
_WHITE = (2, 41, 7, 46, 16, 28, 60, 77, 251, 252, 253, 254, 255)
_FLUID = (4, 5, 14, 15, 24, 43, 44, 72)
DSEG = "*dseg*"  # what label maps are called among scans
Cached = ImageCondition | LabelsCondition  # of a file of their own


def cached_conditions(config: Config) -> list[Cached]:
    """The conditions whose latents are stored beside those of the scans; visits are among these already."""
    return [
        each
        for each in config.diffusion.conditions
        if isinstance(each, LabelsCondition) or (isinstance(each, ImageCondition) and each.suffix)
    ]


def with_files(config: Config) -> list[Cached]:
    """All that each scan may have in files of their own: further contrasts of the volumes, and conditions."""
    return [*config.contrasts, *cached_conditions(config)]


def find_files(config: Config, condition: Cached, scans: pd.DataFrame) -> list[Path | None]:
    """The file of a condition, or of a contrast, of each scan; None where there is none, and a warning says how many.

    Raises:
        InputError: no scan has one; of a scan's label maps there are several.
    """
    files = (_images if isinstance(condition, ImageCondition) else _label_maps)(config, condition, scans)
    lacking = [f"sub-{s}" + (f" ses-{v}" if v else "") for s, v, f in zip(scans["subject"], scans["session"], files) if not f]
    if len(lacking) == len(scans):
        raise InputError(f"{_key(config, condition)}: none of {len(scans)} scans has one; check suffix, derivatives, pattern")
    if lacking:
        message = f"{len(lacking)} of {len(scans)} scans have no {condition.name} ({some(lacking)}): left open"
        warnings.warn(message, stacklevel=3)
    return files


def _key(config: Config, condition: Cached) -> str:
    """Where the config names it."""
    return f"{'data.channels' if condition in config.contrasts else 'diffusion.conditions'} {condition.name}"


def _images(config: Config, condition: ImageCondition, scans: pd.DataFrame) -> list[Path | None]:
    if config.data.bids is None:
        raise InputError(f"diffusion.conditions {condition.name}: images of a suffix are found in a BIDS dataset (data.bids)")
    changes: dict[str, Any] = {"suffix": condition.suffix, "filter": {}, "mask": None, "exclude": None}
    if condition.derivatives:
        changes["derivatives"] = condition.derivatives
    try:
        found = read_scans(config.data.model_copy(update=changes), ())
    except InputError as error:
        raise InputError(f"{_key(config, condition)}: {error}") from None
    paths = {(s, v): Path(p) for s, v, p in zip(found["subject"], found["session"], found["path"])}
    return [paths.get(each) for each in zip(scans["subject"], scans["session"])]


def _label_maps(config: Config, condition: LabelsCondition, scans: pd.DataFrame) -> list[Path | None]:
    folder = condition.derivatives or config.data.derivatives or config.data.bids
    if folder is None or not folder.is_dir():
        raise InputError(f"diffusion.conditions {condition.name}: no folder {folder} (derivatives) with label maps")
    beside = DSEG if folder == config.data.bids else None  # where the scans themselves are, too
    maps = LabelMaps(folder, condition.pattern or beside)
    return [
        maps.one(subject, session) if maps.find(subject, session) else None
        for subject, session in zip(scans["subject"], scans["session"])
    ]


def fingerprint(config: Config, condition: Cached, files: Sequence[Path | None], keys: Sequence[str]) -> str:
    """16 hex digits that change with any file of a condition, with its scan and with what is made of it."""
    settings = condition.model_dump(mode="json", include={"kind", "groups", "detail"})
    data = config.data
    if isinstance(condition, ImageCondition) and (data.mask or data.brain_extraction or data.bias_correction):
        settings["relieved"] = "like the scan"  # which earlier versions did not do
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file, key in zip(files, keys):
        digest.update(f"{key} {file_key(file, {}) if file else ''}\n".encode())
    return digest.hexdigest()[:16]


def load_condition(config: Config, condition: Cached, files: Mapping[str, Path | None], key: str) -> NDArray:
    """A condition of a prepared scan on the same Grid: an image in [0, 1], or shares of the groups, (C, X, Y, Z).

    Args:
        config, condition: of the experiment.
        files: of the condition, by the key of the scan.
        key: of the scan.
    """
    grid, file = grid_of(config.data.grid), files[key]
    if file is None:
        return np.full((len(getattr(condition, "groups", (0,))), *grid.shape), np.nan, np.float32)
    info = load_info(config, key)
    try:
        source: Path | tuple[NDArray, NDArray] = file
        if isinstance(condition, ImageCondition):
            image, affine = read_volume(file)
            scan, of_scan = load_removed(config, key), np.array(info["source_affine"])
            source = remove_beside(image, affine, scan, of_scan, bool(config.data.bias_correction))[0], affine
        return on_grid(condition, source, at(grid, info), config.data.percentiles)[0]
    except InputError as error:
        raise InputError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


class ScanImages:
    """What a model makes of each prepared scan, and what it is given to make it.

    Args:
        config: whose prepared folder holds the scans.
        scans: rows of its table.

    Raises:
        InputError: what `find_files` raises.
    """

    def __init__(self, config: Config, scans: pd.DataFrame):
        self.config, self.scans, self.keys = config, scans.reset_index(drop=True), list(scans["key"])
        self.files = {each.name: dict(zip(self.keys, find_files(config, each, scans))) for each in with_files(config)}
        of_visits = (each for each in config.given_conditions if isinstance(each, ImageCondition) and each.visit)
        self.visits = {each.name: visits_of(each, scans) for each in of_visits}

    @property
    def complete(self) -> list[int]:
        """The scans that lack nothing, neither what is made nor what is given."""
        return [
            i
            for i, key in enumerate(self.keys)
            if all(files[key] for files in self.files.values()) and all(others[i] for others in self.visits.values())
        ]

    def made(self, i: int) -> NDArray:
        """What the model should make of a scan, (C, X, Y, Z) in [0, 1]: all its contrasts, or the condition `makes`."""
        if makes := self.config.diffusion.makes:
            return self._cached(makes, i)
        others = (self._cached(each.name, i) for each in self.config.contrasts)
        return np.concatenate([load_prepared(self.config, self.keys[i]), *others])

    def given(self, i: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By name: the images of a scan, (C, X, Y, Z), and which voxels are there of those that miss some, (1, X, Y, Z).

        What is made worse is drawn from random numbers that follow from the scan's voxels, so a scan is always given the same.
        """
        volumes, measured = {}, {}
        for condition in self.config.given_conditions:
            name, key = condition.name, self.keys[i]
            if isinstance(condition, DegradedCondition):
                worse = self._degraded(condition, key)
                volumes[name] = worse.volume
                if condition.hides:
                    measured[name] = worse.known
            elif name in self.files:
                volumes[name] = torch.from_numpy(self._cached(name, i))
            else:  # a scan: that of another visit, or the own one, of which something else is made
                volumes[name] = torch.from_numpy(load_prepared(self.config, self.keys[self._visit(name, i)]))
        return volumes, measured

    def coarse(self, i: int) -> dict[str, Measurement]:
        """By name: the scan as it was measured, where it is given in a lower resolution."""
        coarsened = [each for each in self.config.given_conditions if isinstance(each, DegradedCondition) and each.coarsens]
        worse = {each: self._degraded(each, self.keys[i]) for each in coarsened}
        return {each.name: Measurement(made.linear, made.volume, each.noise_std) for each, made in worse.items()}

    def cubic(self, i: int) -> NDArray | None:
        """A scan that is given in a lower resolution, brought back by cubic interpolation; None where there is none such."""
        for each in self.config.given_conditions:
            if isinstance(each, DegradedCondition) and any(step.operator == "resolution" for step in each.degradations):
                return self._degraded(each, self.keys[i], cubic=True).volume.clamp(0, 1).numpy()
        return None

    def _degraded(self, condition: DegradedCondition, key: str, cubic: bool = False) -> WorseVolume:
        scan = torch.from_numpy(load_prepared(self.config, key))
        drawn = generator("image of a scan", condition.name, scan_of(key))
        return degraded(scan, self.config.data.grid.spacing_mm, condition.degradations, drawn, cubic)

    def told(self, i: int) -> dict[str, dict[str, Any]]:
        """By name: the covariates that the visit which a scan is given tells."""
        tells = {each.name: each.tells for each in self.config.given_conditions if isinstance(each, ImageCondition)}
        return {
            name: self.scans.loc[self._visit(name, i), list(covariates)].to_dict()
            for name, covariates in tells.items()
            if covariates
        }

    def _visit(self, name: str, i: int) -> int:
        """The row of a scan's other visit, the first of those that may be given; its own where there is none."""
        return next(iter(self.visits[name][i]), i) if name in self.visits else i

    def _cached(self, name: str, i: int) -> NDArray:
        condition = next(each for each in with_files(self.config) if each.name == name)
        return load_condition(self.config, condition, self.files[name], self.keys[i])


def visits_of(condition: ImageCondition, scans: pd.DataFrame) -> tuple[tuple[int, ...], ...]:
    """For each row those of the same subject's other visits that the condition allows, by the order of their sessions.

    Raises:
        InputError: there is none for any row.
    """
    rows: dict[str, list[int]] = {}
    for row, subject in enumerate(scans["subject"]):
        rows.setdefault(subject, []).append(row)
    sessions = list(scans["session"])

    def allowed(row: int, other: int) -> bool:
        before, after = sessions[other] < sessions[row], sessions[other] > sessions[row]
        return {"earlier": before, "later": after, "other": before or after}[str(condition.visit)]

    others = [tuple(o for o in rows[s] if allowed(row, o)) for row, s in enumerate(scans["subject"])]
    if not any(others):
        raise InputError(f"diffusion.conditions {condition.name}: no subject has an {condition.visit} visit (session)")
    return tuple(others)


def at(grid: Grid, info: Mapping[str, Any]) -> Grid:
    """The Grid where it was laid over a scan, in the world of that scan."""
    return replace(grid, affine=np.array(info["grid_affine"]), place=WORLD)


def on_grid(
    condition: Condition, source: Path | tuple[NDArray, NDArray], placed: Grid, percentiles: tuple[float, float]
) -> tuple[NDArray, dict[str, Any]]:
    """A file, or a volume (1, X, Y, Z) with its affine, on a Grid that lies in its world: (C, X, Y, Z), and the way back.

    Raises:
        InputError: nothing of it is on the Grid; labels that the condition does not know, or none that it knows.
    """
    if isinstance(condition, LabelsCondition):
        labels, affine = read_labels(source) if isinstance(source, Path) else source
        _check_labels(condition, labels)
        shares = shares_on_grid(labels, affine, placed.affine, placed.shape, condition.groups)[1:]
        if not shares.any():
            raise InputError("none of its labels lies on the grid; is it in the space of the scan?")
        info = {"source_shape": list(labels.shape[1:]), "source_affine": np.asarray(affine).tolist()}
        return shares, info | {"grid_affine": placed.affine.tolist()}
    return to_grid(*(read_volume(source) if isinstance(source, Path) else source), placed, percentiles)


def as_t1w(labels: NDArray) -> NDArray:
    """A label map in the contrast of a T1w image, by which it can be registered and placed; float32, like `labels`.

    FreeSurfer's white matter is bright, its fluid dark, every other label between them. On rendered brains this lies within
    a millimetre of where the scan itself is registered to; a mask of all labels was off by 3 to 5 mm.
    """
    painted = np.where(labels != 0, np.float32(0.65), np.float32(0))
    painted[np.isin(labels, _WHITE)], painted[np.isin(labels, _FLUID)] = 1.0, 0.2
    return painted


def _check_labels(condition: LabelsCondition, labels: NDArray) -> None:
    known = {label for group in condition.groups.values() for label in group}
    found = {int(label) for label in np.unique(labels)}
    if not found & known:
        listed = some(f"{label}" for label in sorted(found - {0}))
        raise InputError(
            f"it holds labels {listed or 'of background alone'}, and {condition.name} knows {some(map(str, sorted(known)))}; "
            "give a label map of that kind"
        )
