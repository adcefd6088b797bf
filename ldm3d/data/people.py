"""Who belongs together, and the split of everybody: by a column of the table, by what stands already, or by the rule."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse import csgraph

from ldm3d.config.data import CovariateConfig, DataConfig
from ldm3d.data.splits import TEST, TRAIN, VALIDATION, assign_splits
from ldm3d.data.tables import read_table
from ldm3d.errors import InputError, nearest, shown, some
from ldm3d.notation import is_missing

# Columns of scans beside covariates, by the setting that names them; no covariate can have such a name
SPLIT, GROUP, STRATUM = "data.split_column", "data.group_column", "data.splits.stratify "
_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "held-out", "holdout"), TEST),
}
_DECADE = 10  # years of a stratum of ages


def split_columns(data: DataConfig, covariates: Sequence[CovariateConfig]) -> dict[str, str]:
    """The columns that splitting needs beside those of the covariates, by the name under which `read_scans` returns them."""
    given = {SPLIT: data.split_column, GROUP: data.group_column}
    known = {c.name for c in covariates}
    return {name: column for name, column in given.items() if column} | {
        f"{STRATUM}{name}": name for name in data.splits.stratify if name not in known
    }


def people_of(table: pd.DataFrame) -> dict[str, str]:
    """Subject -> the first by name of all subjects with which it shares scans or a group, directly or through others.

    Who is in a group is called "group NAME" instead, after the first by name of all groups: subjects that are added to it do
    not change that.

    Args:
        table: a row a scan, with subject and key, and with `GROUP` where there are groups ("" for none).
    """
    (subject, subjects), (key, keys) = (pd.factorize(table[name], sort=True) for name in ("subject", "key"))
    groups: list[str] = []
    links = [(subject, len(subjects) + key)]
    if GROUP in table:
        named = np.array([not is_missing(cell) for cell in table[GROUP]])
        group, groups = pd.factorize(table[GROUP][named], sort=True)
        links.append((subject[named], len(subjects) + len(keys) + group))
    size = len(subjects) + len(keys) + len(groups)
    row, column = (np.concatenate(each) for each in zip(*links))
    _, part = csgraph.connected_components(sparse.coo_matrix((np.ones(len(row)), (row, column)), (size, size)), directed=False)
    first: dict[int, str] = {}
    for i, name in enumerate(groups):
        first.setdefault(part[len(subjects) + len(keys) + i], f"group {name}")
    return {name: first.setdefault(part[i], name) for i, name in enumerate(subjects)}


def split_subjects(
    table: pd.DataFrame, data: DataConfig, covariates: Sequence[CovariateConfig], kept: Mapping[str, str]
) -> dict[str, str]:
    """The split of every subject; people who belong together share it.

    Args:
        table: a row a scan, with subject, key, covariates and the columns of `split_columns`.
        data: with the rule.
        covariates: of the table.
        kept: the splits that stand already, by subject. Where those of people who turn out to belong together differ, who
            trains goes on training: it must not be held out later.

    Raises:
        InputError: a split column with other words, or with several splits for people who belong together; strata by
            something that is no age and no category.
    """
    people = people_of(table)
    members: dict[str, list[str]] = {}
    for subject, person in people.items():
        members.setdefault(person, []).append(subject)
    standing = {subject: split for subject, split in kept.items() if subject not in people}
    for person, subjects in members.items():
        splits = {kept[subject] for subject in subjects if subject in kept}
        if splits:
            standing[person] = next(split for split in (TRAIN, VALIDATION, TEST) if split in splits)
    standing |= _stated(table, data, people)
    strata = _strata(table, data, covariates, people) if data.splits.stratify else None
    splits = assign_splits(people.values(), data.splits, standing, strata)
    return {subject: splits[person] for subject, person in people.items()}


def _stated(table: pd.DataFrame, data: DataConfig, people: Mapping[str, str]) -> dict[str, str]:
    """What the split column says of people."""
    if SPLIT not in table:
        return {}
    cells = [(subject, cell.strip().lower()) for subject, cell in zip(table["subject"], table[SPLIT]) if not is_missing(cell)]
    if unknown := sorted({cell for _, cell in cells} - _WORDS.keys()):
        raise InputError(
            f"column {data.split_column!r} (data.split_column) holds {some(map(shown, unknown))}; write train, validation or "
            "test, or leave the cell empty for a split by the rule"
        )
    stated: dict[str, dict[str, str]] = {}
    for subject, cell in cells:
        stated.setdefault(people[subject], {}).setdefault(_WORDS[cell], subject)
    torn = [
        f"{person if person.startswith('group ') else f'sub-{person}'} ("
        + ", ".join(f"sub-{subject} {split}" for split, subject in splits.items())
        + ")"
        for person, splits in stated.items()
        if len(splits) > 1
    ]
    if torn:
        raise InputError(
            f"column {data.split_column!r} (data.split_column) puts scans that belong together into several splits: "
            f"{some(torn)}; all scans of a subject, and all subjects of a group, share one"
        )
    return {person: next(iter(splits)) for person, splits in stated.items()}


def _strata(
    table: pd.DataFrame, data: DataConfig, covariates: Sequence[CovariateConfig], people: Mapping[str, str]
) -> dict[str, str]:
    """The stratum of each person, by its first scan: categories as they are, ages by decades."""
    known = {c.name: c for c in covariates}
    columns = []
    for name in data.splits.stratify:
        config = known.get(name)
        if config is not None and config.kind == "continuous":
            if config.unit != "years":
                close = nearest("age", [c.name for c in covariates]) or "age"
                raise InputError(
                    f"data.splits.stratify: {name} is a number in {config.unit or 'no unit'}; strata are by categories, by "
                    f"columns of text, or by ages in years (unit: years), such as {close}"
                )
            columns.append(["" if math.isnan(value) else str(int(value // _DECADE)) for value in table[name]])
        else:
            cells = table[name] if config is not None else table[f"{STRATUM}{name}"]
            columns.append(["" if cell is None or is_missing(cell) else cell for cell in cells])
    strata: dict[str, str] = {}
    for subject, *values in zip(table["subject"], *columns):
        strata.setdefault(people[subject], "\t".join(values))
    return strata


def kept_splits(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], data: DataConfig
) -> tuple[dict[str, str], str]:
    """The splits that a prepared folder has already, and a message: they stay, by whatever rule they were made, until the
    settings of splits change.

    Args:
        folder: of prepared scans.
        before, now: the settings that it was made with, and those of today.
        data: today's rule.

    Raises:
        InputError: splits.tsv is damaged.
    """
    rules = ("data.splits", SPLIT, GROUP)
    if not (folder / "splits.tsv").is_file() or any(before.get(name) != now.get(name) for name in rules):
        return {}, ""
    table = read_table(folder / "splits.tsv")
    if not {"subject", "split"} <= set(table) or not set(table["split"]) <= {TRAIN, VALIDATION, TEST}:
        raise InputError(f"{folder / 'splits.tsv'} is damaged; restore it, or delete it to split all subjects anew")
    kept = dict(zip(table["subject"], table["split"]))
    if data.group_column or data.split_column or data.splits.stratify:
        return kept, ""
    by_rule = assign_splits(kept, data.splits)
    moved = sum(by_rule[subject] != split for subject, split in kept.items())
    return kept, (
        f"{moved} of {len(kept)} subjects keep the split of {folder / 'splits.tsv'}, though the rule would now give them "
        "another: what is trained already has seen them so. To split anew, delete that file and train both stages again"
    ) * bool(moved)
