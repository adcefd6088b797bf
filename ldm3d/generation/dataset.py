"""Requests from a dataset: for every session the images that a model takes, and the covariates of its subject."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm3d.config.conditions import Condition, DegradedCondition, ImageCondition, LabelsCondition
from ldm3d.config.data import DataConfig
from ldm3d.data.bids import read_scans
from ldm3d.data.conditions import DSEG
from ldm3d.data.keys import file_key
from ldm3d.data.labels import LabelMaps
from ldm3d.data.layouts import label_of
from ldm3d.data.tables import read_table
from ldm3d.description import Preparation
from ldm3d.errors import InputError, itemised
from ldm3d.generation.given import Images, odd_contrasts
from ldm3d.generation.given_scans import Given, place, told_of

MEASURED = "*desc-measured_mask*"  # what masks of what was measured are called
LINK = "source"  # what BIDS URIs call the dataset


@dataclass(frozen=True)
class Sessions:
    """What a dataset asks for.

    Attributes:
        names: of the sessions, "sub-01 ses-1".
        rows: covariates of each, as the table has them.
        files: images of each by the condition's name; a pair with its mask where voxels may be missing, or with the covariates
            that a visit tells.
    """

    names: list[str]
    rows: list[dict[str, Any]]
    files: list[dict[str, Any]]


def find_sessions(folder: Path, conditions: Sequence[Condition], suffix: str, covariates: Sequence[str]) -> Sessions:
    """The sessions of a BIDS dataset that have every image which any session has; the others are named and left out.

    Args:
        folder: of the dataset. Label maps are files of it with "dseg" in their names; masks of what was measured are called
            desc-measured_mask.
        conditions, suffix: of the model.
        covariates: names of columns that are read from participants.tsv, where there are such.

    Raises:
        InputError: no such dataset, or none of the images in it.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder} (--bids)")
    found: dict[str, dict[tuple[str, str], Any]] = {}
    for condition in conditions:
        if of_sessions := _files(folder, condition, suffix):
            found[condition.name] = of_sessions
    if not found:
        raise InputError(f"{folder} has no image that this model takes ({', '.join(each.name for each in conditions)})")
    sessions = sorted(set().union(*found.values()))
    lacking = {
        _name(each): f"no {', '.join(name for name in found if each not in found[name])}"
        for each in sessions
        if any(each not in of_sessions for of_sessions in found.values())
    }
    if len(lacking) == len(sessions):
        raise InputError(f"no session of {folder} has all of {', '.join(found)}:\n{itemised(lacking)}")
    if lacking:
        print(f"{len(lacking)} of {len(sessions)} sessions are left out:\n{itemised(lacking)}", flush=True)
    kept = [each for each in sessions if _name(each) not in lacking]
    asked = _covariates(folder, covariates)
    files = [{name: of[each] for name, of in found.items()} for each in kept]
    rows: list[dict[str, Any]] = [dict(asked.get(subject, {})) for subject, _ in kept]
    for condition in conditions:
        tells = condition.tells if isinstance(condition, ImageCondition) else ()
        for of_session, row in zip(files, rows):
            if tells and condition.name in of_session:
                told = {name: row[name] for name in tells if name in row}
                of_session[condition.name] = of_session[condition.name], told
    return Sessions(list(map(_name, kept)), rows, files)


def placeable(sessions: Sessions, pipeline: Any, folder: Path, stripped: bool = False) -> Sessions:
    """The sessions whose images can be placed on the model's Grid; the others are named with the reason and left out.

    Sessions with an image of another contrast are named, too, and kept.
    """
    reasons, odd = {}, {}
    for name, files in zip(sessions.names, sessions.files):
        try:
            if said := odd_contrasts(pipeline, place_for(pipeline, files, stripped)):
                odd[name] = "; ".join(said)
        except InputError as error:
            reasons[name] = str(error)
    if len(reasons) == len(sessions.names):
        raise InputError(f"none of {len(reasons)} sessions of {folder} can be used:\n{itemised(reasons)}")
    if reasons:
        print(f"{len(reasons)} of {len(sessions.names)} sessions cannot be used:\n{itemised(reasons)}", flush=True)
    if odd:
        print(f"{len(odd)} of {len(sessions.names)} sessions are odd, and are not left out:\n{itemised(odd)}", flush=True)
    good = [i for i, name in enumerate(sessions.names) if name not in reasons]
    names, rows, images = ([each[i] for i in good] for each in (sessions.names, sessions.rows, sessions.files))
    return Sessions(names, rows, images)  # type: ignore[arg-type]  # each of its own kind


def place_for(pipeline: Any, files: Mapping[str, Any], stripped: bool = False) -> Given:
    """See `ldm3d.generation.given_scans.place`, which calls `stripped` `has_no_skull`."""
    preparation = pipeline.preparation or Preparation()
    placed = place(pipeline.conditions, files, pipeline.grid, preparation, pipeline.skull_stripped, stripped)
    return replace(placed, told=told_of(pipeline.conditions, files, pipeline.schema))


def images_of(sessions: Sessions, pipeline: Any, folder: Path, each: int, like: str | None, stripped: bool = False) -> Images:
    """The images of a series with `each` volumes of every session."""
    digest = hashlib.sha256()
    for files in sessions.files:
        for name in sorted(files):
            for part in files[name] if isinstance(files[name], tuple) else (files[name],):
                digest.update(f"{name} {part if isinstance(part, dict) else file_key(part, {})}\n".encode())
    identity = {"dataset": digest.hexdigest()[:16], "each": each, **({"stripped": True} if stripped else {})}
    root = folder.resolve()
    images = Images(pipeline.conditions, lambda n: place_for(pipeline, sessions.files[n // each], stripped), identity, like)
    images.links = {LINK: root.as_uri()}
    images.named = lambda path: f"bids:{LINK}:{Path(path).resolve().relative_to(root)}"
    return images


def _files(folder: Path, condition: Condition, suffix: str) -> dict[tuple[str, str], Any]:
    """(subject, session) -> file of a condition, or a pair with its mask."""
    suffix = (condition.suffix or suffix) if isinstance(condition, ImageCondition) else suffix
    grid = {"shape": (1, 1, 1), "spacing_mm": (1, 1, 1)}
    maps = LabelMaps(folder, (condition.pattern or DSEG) if isinstance(condition, LabelsCondition) else MEASURED)
    try:
        scans = read_scans(DataConfig.model_validate({"bids": folder, "suffix": suffix, "grid": grid}), ())
        keys = list(zip(scans["subject"], scans["session"]))
        files = dict(zip(keys, map(Path, scans["path"])))
    except InputError:
        files = {}
    if isinstance(condition, LabelsCondition):
        found = {key: maps.find(*key) for key in files or _sessions(folder)}
        return {key: paths[0] for key, paths in found.items() if paths}
    if isinstance(condition, DegradedCondition) and condition.hides:
        masks = {key: maps.find(*key) for key in files}
        return {key: (files[key], paths[0]) for key, paths in masks.items() if paths}
    return files


def _sessions(folder: Path) -> list[tuple[str, str]]:
    """(subject, session) of the folders of a dataset."""
    found = []
    for subject in sorted(folder.glob("sub-*")):
        visits = [path.name.removeprefix("ses-") for path in sorted(subject.glob("ses-*"))]
        found += [(subject.name.removeprefix("sub-"), visit) for visit in visits or [""]]
    return found


def _covariates(folder: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Subject -> what participants.tsv says of it, for these columns."""
    path = folder / "participants.tsv"
    if not path.is_file():
        return {}
    table = read_table(path)
    columns = [name for name in names if name in table]
    return {label_of(row["participant_id"]): {name: row[name] for name in columns} for row in table.to_dict("records")}


def _name(session: tuple[str, str]) -> str:
    return f"sub-{session[0]}" + (f" ses-{session[1]}" if session[1] else "")
