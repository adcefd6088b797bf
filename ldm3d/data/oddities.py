"""Warnings about prepared scans that look odd among all of them: one for each kind, not for each scan."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ldm3d.geometry import FOREGROUND, WORLD

HEAD_MM = (40, 350)  # sides of the foreground: from a premature newborn's brain to an adult's head with neck and shoulders

# Foreground in blocks of 2 mm: six defaced adult heads had 2,576 to 3,686 ml, the brain of a template 1,883
HEAD_ML, BRAIN_ML = 2300, 600


def warn_of_oddities(
    table: pd.DataFrame,
    results: Sequence[Mapping[str, Any]],
    tolerance_mm: float,
    place: str = FOREGROUND,
    stripped: bool | None = None,
) -> list[str]:
    """One warning for each kind of oddity; returns them, too.

    Args:
        table: a row a scan, with subject, session, path and key.
        results: of each row cut_mm, extent_mm, around_zero as in `ldm3d.data.placing.to_grid`, and notes on reading it.
        tolerance_mm: how much foreground may be cut off without a warning.
        place: of the Grid.
        stripped: whether the config says that scans are skull-stripped; None: that is not judged.
    """
    rows = [*table.itertuples()]
    cut = sorted([(result["cut_mm"], who(row)) for row, result in zip(rows, results)], reverse=True)
    twins = [
        f"{', '.join(map(who, group.itertuples()))}: {', '.join(group['path'].unique())}"
        for _, group in table.groupby("key")
        if group["subject"].nunique() > 1
    ]
    kinds = {
        f"scans lose foreground that the Grid does not hold (if it is more than the neck, {cut_remedy(place)})": [
            f"{name}: {mm:g} mm" for mm, name in cut if mm > tolerance_mm
        ],
        "scans were read with a guess": [note for result in results for note in result["notes"]],
        # No error: animals and phantoms have other sizes, which cannot be told from wrong voxel sizes
        f"scans have the size of no human head ({HEAD_MM[0]} to {HEAD_MM[1]} mm on each side of the foreground); are their "
        "voxel sizes right?": [
            f"{who(row)}: {' x '.join(f'{side:.0f}' for side in sides)} mm"
            for row, sides in zip(rows, (result["extent_mm"] for result in results))
            if not HEAD_MM[0] <= min(sides) <= max(sides) <= HEAD_MM[1]
        ],
        **_mixed(
            *([who(row) for row, result in zip(rows, results) if result["around_zero"] is is_so] for is_so in (True, False))
        ),
        **other_than_said([who(row) for row in rows], results, stripped),
        "scans are of several subjects each, which therefore share a split (one person under two names?)": twins,
    }
    messages = [
        f"{len(scans)} {what}:\n  " + "\n  ".join(scans[:5]) + (f"\n  and {len(scans) - 5} more" if len(scans) > 5 else "")
        for what, scans in kinds.items()
        if scans
    ]
    for message in messages:
        warnings.warn(message, stacklevel=3)
    return messages


def cut_remedy(place: str) -> str:
    """What to do about a Grid of a place that cuts off more than the neck."""
    moved = ", or move data.grid.origin_mm if scans are registered to its space" if place == WORLD else ""
    return f"enlarge data.grid.shape{moved}"


def who(row: Any) -> str:
    """Name of a scan's row: "sub-01 ses-a"."""
    return f"sub-{row.subject}" + (f" ses-{row.session}" if row.session else "")


def other_than_said(
    names: Sequence[str], results: Sequence[Mapping[str, Any]], stripped: bool | None
) -> dict[str, Sequence[str]]:
    """Scans that look like whole heads though `data.skull_stripped` is true, or the reverse."""
    sizes = [(name, result.get("foreground_ml"), result.get("even_background")) for name, result in zip(names, results)]
    heads = [f"{name}: {ml:.0f} ml" for name, ml, _ in sizes if stripped and ml and ml > HEAD_ML]
    brains = [f"{name}: {ml:.0f} ml" for name, ml, even in sizes if ml and even and BRAIN_ML < ml < HEAD_ML]
    found = {
        "scans look like whole heads, by the volume of their foreground, and data.skull_stripped is true; strip them "
        "(data.brain_extraction, data.mask), or set it to false": heads,
    }
    if stripped is False and len(brains) == len(names):  # a few may be small heads
        found[
            "scans look skull-stripped, by their foreground and even background, and data.skull_stripped is false; set it to "
            "true, as generated volumes say what it is"
        ] = brains
    return found


def _mixed(standardised: Sequence[str], raw: Sequence[str]) -> dict[str, Sequence[str]]:
    """The rarer kind if a dataset has both; all standardised is as good as all raw."""
    if not standardised or not raw:
        return {}
    what, fewer = "no intensities below 0", raw
    if len(standardised) <= len(raw):
        what, fewer = "intensities around 0, as standardised scans have", standardised
    return {f"scans have {what}, unlike the others, so their contrast differs; give all raw, or all standardised": fewer}
