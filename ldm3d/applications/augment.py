"""Thin groups of a table filled with generated volumes, for trainings of whatever is trained on scans next.

People are counted by their category, or by their bin of a number, of each covariate in `by`; a group is a combination of
these. Each group that has fewer than `per_group` people gets as many requests as it lacks. A request for a number is that of a
random person of the group, moved by up to a fifth of the bin's width, or, where there is nobody, any number of the bin.
Covariates that are not in `by` are left open, and follow from the others as the model learned it.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ldm3d.covariates import Covariate, CovariateSchema, Value
from ldm3d.data.derivative import synthetic_path
from ldm3d.errors import InputError, some
from ldm3d.randomness import generator

BINS = 5
MOVED = 0.2  # of a bin's width
MOST = 1_000_000  # requests
TABLE, GROUPS = "augmented.tsv", "groups.tsv"


@dataclass(frozen=True)
class Part:
    """One category, or one bin of a number."""

    name: str
    category: str | None
    low: float = 0.0
    high: float = 0.0

    def __str__(self) -> str:
        return self.category if self.category is not None else f"{self.low:g}-{self.high:g}"


@dataclass(frozen=True)
class Group:
    """A group of people.

    Attributes:
        parts: one of each covariate in `by`.
        people: positions of their rows.
        requests: what is asked to fill it.
    """

    parts: tuple[Part, ...]
    people: tuple[int, ...]
    requests: tuple[Mapping[str, Value], ...]


def groups_of(
    schema: CovariateSchema,
    rows: Sequence[Mapping[str, Any]],
    by: Sequence[str],
    per_group: int,
    fixed: Mapping[str, Any] | None = None,
    bins: int = BINS,
    seed: int = 0,
) -> list[Group]:
    """All groups, with the requests that they lack.

    Args:
        schema: of the model.
        rows: cells of a table, by column, a row a person. Rows without a value of a covariate in `by` are in no group.
        by: covariates.
        per_group: people that each group is to have.
        fixed: asked of all volumes beside.
        bins: of a number, of equal width between the least and the largest.
        seed: of the requests; request i of a group is the same whatever else is asked.

    Raises:
        InputError: unknown or missing covariates, cells that cannot be read, nobody with values, too many requests.
    """
    if not by or per_group < 1 or bins < 1:
        raise InputError(f"by {list(by)}, {per_group} a group, {bins} bins: name a covariate, and numbers of at least 1")
    covariates, (asked,) = [schema[name] for name in by], schema.parse_all([dict(fixed or {})])
    if missing := [name for name in by if rows and name not in rows[0]]:
        raise InputError(f"the table has no column {some(missing)}, which --by names")
    if twice := [name for name in by if asked[name] is not None or list(by).count(name) > 1]:
        raise InputError(f"{some(twice)}: it is in --by, and there again; keep one")
    values = [_values(covariate, [row[covariate.name] for row in rows]) for covariate in covariates]
    parts = [_parts(covariate, of, bins) for covariate, of in zip(covariates, values)]
    places = [[_place(part, value) for value in of] for part, of in zip(parts, values)]
    people: dict[tuple[int, ...], list[int]] = {}
    for i, place in enumerate(zip(*places)):
        if min(place) >= 0:
            people.setdefault(place, []).append(i)
    if not people:
        raise InputError(f"nobody in the table has values of {', '.join(by)}; fill its columns, or name others in --by")
    every = list(itertools.product(*(range(len(of)) for of in parts)))
    lacking = sum(max(0, per_group - len(people.get(place, ()))) for place in every)
    if lacking > MOST:
        raise InputError(f"{lacking} volumes are lacking, more than {MOST}; take fewer bins, or a smaller --per-group")
    groups = []
    for place in every:
        own = tuple(part[k] for part, k in zip(parts, place))
        members, requests = people.get(place, []), []
        for n in range(per_group - len(members)):
            chance = torch.rand(1 + len(by), generator=generator("augment", seed, *place, n)).tolist()
            like = members[int(chance[0] * len(members))] if members else None
            drawn = {
                part.name: _drawn(part, None if like is None else of[like], c) for part, of, c in zip(own, values, chance[1:])
            }
            requests.append({**asked, **drawn})
        groups.append(Group(own, tuple(members), tuple(requests)))
    return groups


def tables_of(
    groups: Sequence[Group], rows: Sequence[Mapping[str, Any]], folder: Path, names: Sequence[str], root: Path, suffix: str
) -> dict[str, pd.DataFrame]:
    """The tables beside the volumes: real and synthetic people together, and a row for each group.

    Args:
        groups: of `groups_of`.
        rows: of the table.
        folder: of the series with the volumes, in the order of the groups' requests.
        names: covariates of the model.
        root: folder of the table, to which its paths are relative.
        suffix: of volumes.
    """
    requests = [request for group in groups for request in group.requests]
    joined: list[dict[str, Any]] = []
    for row in rows:
        path = {"path": str((root / row["path"]).resolve())} if row.get("path") else {}
        joined.append({**row, **path, "synthetic": 0})
    for i, request in enumerate(requests):
        path = synthetic_path(folder, i, len(requests), suffix)
        asked = {name: request[name] for name in names if request[name] is not None}
        joined.append({"participant_id": path.parents[1].name, "path": str(path.resolve()), **asked, "synthetic": 1})
    counted = [
        {**{p.name: str(p) for p in group.parts}, "real": len(group.people), "synthetic": len(group.requests)}
        for group in groups
    ]
    return {TABLE: pd.DataFrame(joined), GROUPS: pd.DataFrame(counted)}


def _values(covariate: Covariate, cells: Sequence[Any]) -> list[Value]:
    """Cells as values, None where one is missing; InputError with the row where one cannot be read."""
    values: list[Value] = []
    for number, cell in enumerate(cells, start=1):
        try:
            values.append(covariate.read(cell)[0])
        except InputError as error:
            raise InputError(f"row {number} of the table: {error}") from None
    return values


def _parts(covariate: Covariate, values: Sequence[Value], bins: int) -> list[Part]:
    if covariate.categories:
        return [Part(covariate.name, category) for category in covariate.categories]
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return []
    edges = np.linspace(min(numbers), max(numbers), bins + 1)
    if edges[0] == edges[-1]:
        return [Part(covariate.name, None, float(edges[0]), float(edges[0]))]
    return [Part(covariate.name, None, float(low), float(high)) for low, high in itertools.pairwise(edges)]


def _place(parts: Sequence[Part], value: Value) -> int:
    """Of a value's part; -1 for none."""
    if value is None or not parts:
        return -1
    if parts[0].category is not None:
        return [part.category for part in parts].index(str(value))
    # An edge belongs to the bin above it, but the last one
    return max(0, sum(part.low <= float(value) for part in parts) - 1)


def _drawn(part: Part, like: Value, chance: float) -> Value:
    """A value of a part: near that of a person, or by chance, a number in [0, 1)."""
    if part.category is not None:
        return part.category
    wide = part.high - part.low
    number = part.low + chance * wide if like is None else float(like) + (2 * chance - 1) * MOVED * wide
    return round(min(max(number, part.low), part.high), 4)
