"""Who is in which split: the table that stands first in a paper."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ldm3d.config.sections import Config
from ldm3d.covariates import Covariate, as_name
from ldm3d.data.bids import read_columns
from ldm3d.data.splits import TEST, TRAIN, VALIDATION
from ldm3d.errors import InputError
from ldm3d.notation import is_missing, read_number

# Headers of columns that are read where the table has them, whether or not they are covariates; the first that is there
COLUMNS = {
    "site": (
        *("site", "site_id", "study_site", "centre", "center", "scanner", "scanner_id", "institution", "institution_name"),
        *("study", "cohort", "dataset", "manufacturer"),
    ),
    "age": ("age", "age_years", "age_at_scan", "age_at_visit", "ageatscan"),
    "sex": ("sex", "gender"),
}


def extra_columns(config: Config, table: pd.DataFrame) -> dict[str, list[Any]]:
    """Site, age and sex of every scan, where a covariate or a column of the table has such a name."""
    covariates = {key: [name for name in names if name in table] for key, names in COLUMNS.items()}
    found = {key: table[names[0]].tolist() for key, names in covariates.items() if names}
    wanted = {key: names for key, names in COLUMNS.items() if key not in found}
    try:
        columns = read_columns(config.data, table, wanted)
    except InputError:  # a table that no covariate needs: the page goes without it
        return found
    for key, cells in columns.items():
        found[key] = [_number(cell) if key == "age" else None if is_missing(cell) else cell for cell in cells]
    return found


def _number(cell: str) -> float:
    try:
        return read_number(cell)[0]
    except ValueError:
        return np.nan


def table_1(table: pd.DataFrame, schema: Collection[Covariate], columns: Mapping[str, Sequence]) -> dict[str, list]:
    """Covariates, and age and sex where they are none, by split: mean ± deviation and range, or numbers and shares."""
    splits = [split for split in (TRAIN, VALIDATION, TEST) if (table["split"] == split).any()]
    parts = [table.index == table.index, *(table["split"] == split for split in splits)]
    rows = [
        ["subjects", *(str(table.loc[part, "subject"].nunique()) for part in parts)],
        ["scans", *(str(int(part.sum())) for part in parts)],
    ]
    known = {covariate.name: (covariate.label, table[covariate.name]) for covariate in schema}
    names = {as_name(name) for name in known}
    for key in ("age", "sex"):
        if key in columns and not names & set(COLUMNS[key]):
            known[key] = f"{key} (column of the table)", pd.Series(columns[key], index=table.index)
    for label, values in known.values():
        if values.dtype.kind == "f":
            rows.append([label, *(_spread(values[part]) for part in parts)])
            continue
        for value in sorted(values.dropna().unique()):
            rows.append([f"{label}: {value}", *(_share(values[part], value) for part in parts)])
        if values.isna().any():
            rows.append([f"{label}: missing", *(_share(values[part], None) for part in parts)])
    return {"columns": ["", "all", *splits], "rows": rows}


def _spread(values: pd.Series) -> str:
    there = values.dropna()
    text = "none"
    if len(there):
        deviation = f" ± {there.std(ddof=1):.1f}" if len(there) > 1 else ""
        text = f"{there.mean():.1f}{deviation}\n{there.min():g} to {there.max():g}"
    missing = len(values) - len(there)
    return text + (f"\n{missing} missing" if missing else "")


def _share(values: pd.Series, value: Any) -> str:
    count = int((values == value).sum() if value is not None else values.isna().sum())
    return f"{count} ({count / max(len(values), 1):.0%})"
