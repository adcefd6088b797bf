"""Of whom is a model known to be good? Training and tested people in bands of age and categories, and how useful it is there.

It answers questions such as "may I train an age regressor for women over 80 on its volumes?". In each cell, regressors that
were trained on synthetic volumes are compared with those that were trained on real ones (`ldm3d.evaluation.utility`), on the
held-out people of the cell.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ldm3d.covariates import Covariate, CovariateSchema, Value
from ldm3d.data.bands import BAND_YEARS, EVERYONE, axes_of, band_of, read_bands
from ldm3d.data.splits import TRAIN
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.subgroups import label, labels_of
from ldm3d.evaluation.utility import Utility
from ldm3d.statistics.bootstrap import means, relative, resamples


@dataclass(frozen=True)
class Cell:
    """People of one band and category.

    Attributes:
        row, column: labels; `EVERYONE` for no restriction.
        trained: training people, from that data or from the model's account; None if neither tells.
        tested: held-out people.
        ratio, low, high: error of regressors that were trained on synthetic volumes, relative to those that were trained on
            real ones, with its 95% interval; NaN if there is none.
    """

    row: str
    column: str
    trained: int | None
    tested: int
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Coverage:
    """Cells by row and column.

    Attributes:
        task: the covariate that regressors predict; "" if none was trained.
        by, across: the covariates of rows and columns; None: everyone.
        rows, columns: labels, `EVERYONE` last.
        cells: row by row.
    """

    task: str
    by: Covariate | None
    across: Covariate | None
    rows: list[str]
    columns: list[str]
    cells: list[Cell]

    def at(self, row: str, column: str) -> Cell:
        return next(cell for cell in self.cells if (cell.row, cell.column) == (row, column))

    def to_dict(self) -> dict[str, Any]:
        names = {key: each and each.name for key, each in (("by", self.by), ("across", self.across))}
        return {"task": self.task or None, **names, "cells": [asdict(cell) for cell in self.cells]}


def coverage(schema: CovariateSchema, found: Evaluation, account: Mapping[str, Any] | None = None) -> list[Coverage]:
    """One for each task of `found.utility`, or one without a task; none for a model without covariates.

    `account`: of the model (`ldm3d.account`), which counts training people where their scans are not at hand.
    """
    if not len(schema):
        return []
    return [_coverage(schema, found, account, useful) for useful in found.utility or [None]]


def _coverage(
    schema: CovariateSchema, found: Evaluation, account: Mapping[str, Any] | None, useful: Utility | None
) -> Coverage:
    by, across = axes_of(schema)
    edges = decades(by, [*found.subjects, *(found.training or ())]) if by else []
    rows = [*(labels_of(by, edges) if by else ()), EVERYONE]
    columns = [*(labels_of(across, []) if across else ()), EVERYONE]

    def belongs(values: Mapping[str, Value], row: str, column: str) -> bool:
        own = row == EVERYONE or (by is not None and label(by, edges, values[by.name]) == row)
        return own and (column == EVERYONE or (across is not None and values[across.name] == column))

    def count(people: Sequence[Hashable], all_values: Sequence[Mapping[str, Value]], row: str, column: str) -> int:
        return len({person for person, values in zip(people, all_values) if belongs(values, row, column)})

    told = _told(schema, edges, account)
    cells = []
    for row in rows:
        for column in columns:
            if found.training is not None and found.has_training_of(account):
                trained = count(found.training_people or range(len(found.training)), found.training, row, column)
            else:
                trained = told(row, column)
            errors = _errors(useful, found, [belongs(values, row, column) for values in found.subjects]) if useful else ()
            cells.append(Cell(row, column, trained, count(found.people, found.subjects, row, column), *errors))
    return Coverage(useful.covariate if useful else "", by, across, rows, columns, cells)


def _told(schema: CovariateSchema, edges: Sequence[float], account: Mapping[str, Any] | None) -> Callable[..., int | None]:
    """(row, column) -> training people, as the account of a model tells; None where it does not."""
    if account is None:
        return lambda *_: None
    by, across = axes_of(schema)
    data, known = account["data"], Counter[tuple[str, str]]()
    bands = read_bands(data.get("bands", {}), schema)
    for (band, category), people in (bands or {}).items():
        known[str(band if band == EVERYONE or by is None else label(by, edges, band)), category] += people
    if across:  # all that older versions tell
        known |= {(EVERYONE, each): data["few"].get(f"{across.name}: {each}", 0) for each in across.categories}
    known[EVERYONE, EVERYONE] = int(data["subjects"].get(TRAIN, 0))
    return lambda *cell: known[cell] if bands is not None else known.get(cell)


def _errors(useful: Utility, found: Evaluation, chosen: Sequence[bool]) -> tuple[float, float, float]:
    """The ratio of errors with its interval, over the chosen volumes (N,) of `found.subjects`."""
    known = [row[useful.covariate] is not None for row in found.subjects]
    own = np.array(chosen, dtype=bool)[known]
    people = [person for person, is_known in zip(found.people, known) if is_known]
    if not own.any():
        return math.nan, math.nan, math.nan
    weights = resamples([person for person, is_own in zip(people, own) if is_own])
    synthetic, real = (useful.errors[kind][own] for kind in ("synthetic", "real"))
    ratio, ends = relative(synthetic.mean(), real.mean(), means(synthetic, weights), means(real, weights))
    return float(ratio), *ends


def decades(covariate: Covariate, rows: Sequence[Mapping[str, Value]]) -> list[float]:
    """Edges of bands of ten years around all values, so that the outer bands, where nobody is, are there too.

    One is left out where the covariate's range says that there are no such values.
    """
    values = [float(value) for row in rows if (value := row[covariate.name]) is not None]
    values += covariate.seen or ()
    if not values:
        return []
    first, last = band_of(min(values)), band_of(max(values))
    edges = [float(edge) for edge in range(first, last + BAND_YEARS + 1, BAND_YEARS)]
    low, high = covariate.range or (-math.inf, math.inf)
    return [edge for edge in edges if low < edge <= high]
