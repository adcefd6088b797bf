"""Images of a request on a model's Grid: prepared and placed as its training's were, in one world for those of a session."""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.config.conditions import Condition, DegradedCondition, ImageCondition, LabelsCondition
from ldm3d.covariates import CovariateSchema
from ldm3d.data.conditions import as_t1w, at, on_grid
from ldm3d.data.extraction import Tool, tool_of_model
from ldm3d.data.given import read_given
from ldm3d.data.registration import placed as placed_scan
from ldm3d.data.removed import Removed, remove, remove_beside
from ldm3d.data.slicing import Measurement, sliced, thick_axes
from ldm3d.description import Preparation
from ldm3d.errors import InputError, choose
from ldm3d.geometry import Grid, resample

MOSTLY = 0.95  # share of a voxel, as wide as its point spread, from which on it counts as measured


@dataclass(frozen=True, eq=False)
class Own:
    """An image as it came.

    Attributes:
        scan, affine: (1, X', Y', Z') in its own voxels and intensities.
        info: of `ldm3d.data.placing.to_grid`, the way back.
        measured: (X', Y', Z'), which of its voxels count; None: all.
        source: its path; "" for an image without a file.
        removed: what it was relieved of before it was placed, as the training's scans were.
    """

    scan: NDArray
    affine: NDArray
    info: Mapping[str, Any]
    measured: NDArray | None
    source: str
    removed: Removed = field(default_factory=Removed)


@dataclass(frozen=True, eq=False)
class Given:
    """The images of one request, on the Grid.

    Attributes:
        volumes: by the condition's name, (C, X, Y, Z).
        measured: of conditions with voxels missing, by name: (1, X, Y, Z), 1 where a voxel is there.
        own: by name, the image as it came.
        told: of visits, by name: standardised covariates that they tell, (K,), NaN for unknown; see `told_of`.
        coarse: of scans of lower resolution, by name: what was measured.
    """

    volumes: Mapping[str, Tensor]
    measured: Mapping[str, Tensor]
    own: Mapping[str, Own]
    told: Mapping[str, Tensor] = field(default_factory=dict)
    coarse: Mapping[str, Measurement] = field(default_factory=dict)


def place(
    conditions: Sequence[Condition],
    images: Mapping[str, Any],
    grid: Grid,
    preparation: Preparation,
    stripped: bool,
    has_no_skull: bool = False,
) -> Given:
    """Bring the images of one request to the Grid: the first that is a scan as the training's scans were, the others with it.

    Args:
        conditions: of the model.
        images: by the condition's name a path or a nibabel image in any space; or a pair of it and a mask, which is above 0
            where the image was measured. Those of one subject and session share a world. A scan of another visit is placed
            by itself; it may be a pair with covariates, see `told_of`.
        grid, preparation, stripped: of the model. Skull and bias field are taken from scans as from those of its training;
            another contrast of the session loses what the mask of the first scan hides.
        has_no_skull: the scans have none any more, so no brain is extracted.

    Raises:
        InputError: no image, an unknown condition, images of different subjects; what `read_given` and `to_grid` raise.
    """
    known = {each.name: each for each in conditions}
    for name in images:
        choose("condition", name, known)
    if not images:
        raise InputError(f"no condition is given; this model takes {', '.join(known) or 'none'}")
    check_needed(conditions, images)
    read = {name: _read(name, known[name], image) for name, image in images.items()}
    _check_one_subject({name: source for name, (*_, source) in read.items()})
    anchor = min(read, key=lambda name: (isinstance(known[name], LabelsCondition), list(known).index(name)))
    wanted = _Wanted(grid, preparation, stripped, None if has_no_skull else tool_of_model(preparation.brain_extraction))
    volumes, measured = {}, {}
    own: dict[str, Own] = {}
    coarse: dict[str, Measurement] = {}
    for name in (anchor, *(each for each in read if each != anchor)):
        condition, (scan, affine, mask, source) = known[name], read[name]
        try:
            volume, info, removed, seen = _placed(condition, scan, affine, source, wanted, own.get(anchor))
        except InputError as error:
            raise InputError(f"{name}: {source or 'the image'}: {error}") from None
        inside, volumes[name] = None, torch.from_numpy(volume)
        if mask is not None:
            inside, measured[name] = _measured(mask, scan, affine, np.array(info["grid_affine"]), grid)
            volumes[name] = volumes[name] * measured[name]
        own[name] = Own(scan, affine, info, inside, source, removed)
        if isinstance(condition, DegradedCondition) and condition.coarsens:
            coarse |= _coarse(condition, seen, own[name], grid)
    return Given(volumes, measured, own, coarse=coarse)


def check_needed(conditions: Sequence[Condition], given: Container[str] = ()) -> None:
    """Raise InputError where an image is left open that the training never left open (`drop: 0`)."""
    if lacking := [each.name for each in conditions if each.drop == 0 and each.name not in given]:
        raise InputError(
            f"{', '.join(lacking)} is missing: this model was trained with it in every sample, so it has no answer without; "
            f"give it (generate: --condition {lacking[0]}=FILE)"
        )


@dataclass(frozen=True)
class _Wanted:
    """How images are placed: as the arguments of `place`, with the program that extracts brains."""

    grid: Grid
    preparation: Preparation
    stripped: bool
    tool: Tool | None


def _placed(
    condition: Condition, scan: NDArray, affine: NDArray, source: str, wanted: _Wanted, anchor: Own | None
) -> tuple[NDArray, Mapping[str, Any], Removed, NDArray]:
    """An image on the Grid (C, X, Y, Z), the way back, what it was relieved of, and what that left of it.

    Args:
        condition, scan, affine, source: of the image.
        wanted: how.
        anchor: the first of the request's images, beside which it lies; None: it is the first.
    """
    how, removed, labels = wanted.preparation, Removed(), isinstance(condition, LabelsCondition)
    alone = anchor is None or (isinstance(condition, ImageCondition) and bool(condition.visit))
    seen, correct = as_t1w(scan) if labels and alone else scan, bool(how.bias_correction)
    if not labels and alone:
        seen, removed, _ = remove(scan, affine, Path(source or "image"), None, wanted.tool, correct)
    elif not labels and anchor is not None:
        seen, removed = remove_beside(scan, affine, anchor.removed, anchor.affine, correct)
    if not alone and anchor is not None:
        volume, info = on_grid(condition, (seen, affine), at(wanted.grid, anchor.info), how.percentiles)
        return volume, info, removed, seen
    volume, info = placed_scan(seen, affine, wanted.grid, how.percentiles, how.registration, wanted.stripped)
    if labels:
        volume, info = on_grid(condition, (scan, affine), at(wanted.grid, info), how.percentiles)
    return volume, info, removed, seen


def _coarse(condition: DegradedCondition, seen: NDArray, own: Own, grid: Grid) -> dict[str, Measurement]:
    """A scan of thick slices as a measurement, by the condition's name; {} where no voxel of it is thicker than the Grid's."""
    thick = thick_axes(own.affine, min(grid.spacing_mm))
    if not thick:
        return {}
    scaled = (seen - own.info["low"]) / (own.info["high"] - own.info["low"])
    profile = next(each.profile for each in condition.degradations if each.operator == "resolution")
    grid_affine = np.array(own.info["grid_affine"])
    return {condition.name: sliced(scaled, own.affine, grid_affine, grid.shape, thick, profile, condition.noise_std)[0]}


def _measured(
    mask: tuple[NDArray, NDArray], scan: NDArray, affine: NDArray, on_grid_affine: NDArray, grid: Grid
) -> tuple[NDArray, Tensor]:
    """Which voxels of a scan were measured, (X', Y', Z'), and which of the Grid, (1, X, Y, Z); outside of the scan all."""
    voxels, of_mask = mask
    inside = resample(voxels.astype(np.float32), of_mask, affine, scan.shape[1:])[0] > 0.5
    there = resample(inside[None].astype(np.float32), affine, on_grid_affine, grid.shape)
    outside = resample(np.ones_like(scan), affine, on_grid_affine, grid.shape) < MOSTLY
    return inside, torch.from_numpy(np.where(outside, 1.0, there >= MOSTLY).astype(np.float32))


def _read(name: str, condition: Condition, image: Any) -> tuple[NDArray, NDArray, tuple[NDArray, NDArray] | None, str]:
    """(voxels, affine, mask with its affine or None, path or "") of an image."""
    image, mask = image if isinstance(image, tuple) else (image, None)
    mask = None if isinstance(mask, Mapping) else mask  # covariates of a visit
    hides = isinstance(condition, DegradedCondition) and condition.hides
    if hides and mask is None:
        raise InputError(
            f"{name}: say which voxels were measured: give (image, mask) (generate: --measured {name}=MASK.nii.gz)"
        )
    if mask is not None and not hides:
        raise InputError(f"{name}: a mask of what was measured goes with conditions that hide voxels; leave it out")
    try:
        scan, affine, source = read_given(image)
        if isinstance(condition, LabelsCondition):
            scan = np.rint(scan).astype(np.int32)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    path = source if isinstance(image, str | Path) or Path(source).is_file() else ""
    return scan, affine, None if mask is None else read_given(mask)[:2], path


def told_of(conditions: Sequence[Condition], images: Mapping[str, Any], schema: CovariateSchema) -> dict[str, Tensor]:
    """What visits tell, standardised, by the condition's name; those that are not given are NaN.

    Args:
        conditions: of the model.
        images: as `place` takes them; a visit's may be a pair of an image and its covariates, {"age": 63}.
        schema: of the model.

    Raises:
        InputError: covariates that the condition does not tell, or a value that is none.
    """
    told = {}
    for condition in conditions:
        pair = images.get(condition.name)
        values = pair[1] if isinstance(pair, tuple) and isinstance(pair[1], Mapping) else {}
        names = condition.tells if isinstance(condition, ImageCondition) else ()
        if strangers := [name for name in values if name not in names]:
            tells = ", ".join(names) or "no covariates"
            raise InputError(f"{condition.name}: it tells {tells}, not {strangers[0]}; leave that out")
        if names and condition.name in images:
            value, known = schema.encode([values])[0].unbind(-1)  # (K,) each
            of = [schema.names.index(name) for name in names]
            told[condition.name] = torch.where(known > 0, value, torch.nan)[of]
    return told


def _check_one_subject(sources: Mapping[str, str]) -> None:
    """Raise InputError where names of files say that they are of different subjects."""
    subjects = {
        name: found[0] for name, path in sources.items() if (found := re.findall(r"sub-([A-Za-z0-9]+)", Path(path).name))
    }
    if len(set(subjects.values())) > 1:
        listed = ", ".join(f"{name} of sub-{subject}" for name, subject in subjects.items())
        raise InputError(f"the conditions are of different subjects: {listed}; give those of one")
