"""People in bands of ten years and categories: the rows and columns of "for whom is this model?"."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ldm3d.covariates import Covariate

BAND_YEARS = 10
SEXES = ("sex", "gender")
EVERYONE = "all"
FEWEST_TOLD = 5  # people; smaller numbers might identify somebody


def axes_of(schema: Iterable[Covariate]) -> tuple[Covariate | None, Covariate | None]:
    """The covariates of bands and of categories: the first in years, and sex or else the first category; None for none."""
    covariates = list(schema)
    by = next((each for each in covariates if each.kind == "continuous" and each.unit in ("year", "years")), None)
    categories = sorted((each for each in covariates if each.kind == "categorical"), key=lambda each: each.name not in SEXES)
    return by, categories[0] if categories else None


def band_of(value: float) -> int:
    """The lower end of the band that a value lies in."""
    return BAND_YEARS * math.floor(value / BAND_YEARS)


def people_by_band(scans: pd.DataFrame, schema: Iterable[Covariate]) -> dict[str, Any]:
    """People of a table of scans in each band and category, as JSON values; those that are not known lie in none.

    Args:
        scans: with subject and the covariates.
        schema: of the covariates.

    Returns:
        by, across: names of the covariates of `axes_of`, or None; people: (band or "all", category or "all", number) of all
        that hold somebody. A number below `FEWEST_TOLD` is told as the largest of them.
    """
    by, across = axes_of(schema)
    cells: dict[tuple[int | str, str], set] = {}
    for row in scans.to_dict("records"):
        band = row[by.name] if by else None
        bands = [EVERYONE] if band is None or math.isnan(band) else [EVERYONE, band_of(band)]
        category = row[across.name] if across else None
        for key in [(one, other) for one in bands for other in [EVERYONE, *([category] if isinstance(category, str) else [])]]:
            cells.setdefault(key, set()).add(row["subject"])
    counts = [[*key, len(people) if len(people) >= FEWEST_TOLD else FEWEST_TOLD - 1] for key, people in cells.items()]
    return {"by": by and by.name, "across": across and across.name, "people": sorted(counts, key=str)}


def read_bands(bands: Mapping[str, Any], schema: Iterable[Covariate]) -> dict[tuple[int | str, str], int] | None:
    """(band or "all", category or "all") -> people, of `people_by_band`; None where it is of other covariates."""
    by, across = axes_of(schema)
    if (bands.get("by"), bands.get("across")) != (by and by.name, across and across.name):
        return None
    return {(band, category): count for band, category, count in bands["people"]}
