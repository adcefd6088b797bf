"""The page of `ldm3d prepare`: every scan as a picture, the oddest first, and what is known of all of them.

It shows scans of people. Whoever may not see these may not see the page.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

import ldm3d
from ldm3d import figures
from ldm3d.config.data import RegistrationConfig
from ldm3d.config.sections import Config
from ldm3d.data.inside import root_of
from ldm3d.data.oddities import cut_remedy, who
from ldm3d.data.placing import grid_of
from ldm3d.data.preparing import Prepared, load_look, tolerated_mm
from ldm3d.data.quality import BINS, FOREGROUND, MEASURES, ODD, deviations, distances
from ldm3d.data.registration import POOR
from ldm3d.data.splits import TEST, TRAIN, VALIDATION
from ldm3d.data.table_one import extra_columns, table_1
from ldm3d.data.tables import write_table
from ldm3d.geometry import Grid
from ldm3d.report.page import Section, command, now, times, write_page

TEMPLATE, QUALITY = "preparation.html", "quality.tsv"
MOST_SHOWN = 4000  # pictures: the page stays below 60 MB
MOST_FIRST = 48  # odd scans above the other sections
MOST_LISTED = 200  # rows of a table
MOST_SITES = 8  # curves in a plot
JPEG_QUALITY = 62

NAMES = {
    "snr": "signal to noise",
    "cnr": "contrast to noise",
    "efc": "entropy focus",
    "foreground": "foreground share",
    "distance": "distance to the median",
}
SOURCES = (
    "Measured on the prepared volumes, to compare the scans of one experiment. The foreground are voxels above a "
    "tenth of the range. Signal to noise: median of the foreground over the noise, which follows from differences "
    "between neighbouring voxels along three axes (Coupé et al. 2010). Contrast to noise: bright minus dark part of "
    "the foreground, parted by Otsu's threshold (1979), over the noise (Magnotta and Friedman 2006). Entropy focus "
    "criterion: ghosts, blur and noise around the head raise it (Atkinson et al. 1997). Distance: root mean square "
    "difference of coarse volumes to their median, over the median's own size; similar to the check of homogeneity in "
    "CAT12 (Gaser et al. 2024). Deviations are robust: distance to the median in units of 1.4826 times the median "
    f"absolute deviation. A scan is called odd from {ODD:g} on (Iglewicz and Hoaglin 1993). Odd is not bad: look at "
    "the picture."
)


@dataclass(frozen=True)
class Card:
    """A scan on the page: its id there, its name, what data.exclude calls it, its picture, and what is odd about it."""

    anchor: str
    name: str
    entry: str
    split: str
    source: str
    why: str


def write_preparation(config: Config, done: Prepared) -> Path:
    """Write report.html and quality.tsv into the folder of prepared scans. Returns the page."""
    looks = [load_look(config, key) for key in done.table["key"]]
    found = judged(done, looks)
    root = root_of(config.data)
    write_table(config.prepared_folder / QUALITY, found.map(lambda x: float(f"{x:.4g}") if isinstance(x, float) else x))
    order = (-found["oddness"]).argsort(kind="stable").tolist()
    alone = ~done.table["subject"].duplicated(keep=False)  # such a subject's scan is named by its subject
    medians = found[list(NAMES)].median()
    cards = [
        _card(f"scan-{rank}", done.table.iloc[i], looks[i], found.iloc[i], medians, root, alone[i])
        for rank, i in enumerate(order[:MOST_SHOWN], 1)
    ]
    odd = int((found["oddness"] > ODD).sum())
    first = min(max(odd, min(6, len(cards))), MOST_FIRST)
    columns = extra_columns(config, done.table)
    sections = [
        *([_failures(done)] if len(done.failed) else []),
        *([_warnings(done)] if done.warnings else []),
        _cut_section(done, grid_of(config.data.grid)),
        *([_registered(done, config.data.registration)] if config.data.registration else []),
        Section(
            "Who is in which split",
            "Numbers of scans, and mean and standard deviation of what is known of them.",
            table_1(done.table, config.schema(), columns),
        ),
        _intensities(looks, columns.get("site")),
        _measures(found),
    ]
    links = {card.name: card.anchor for card in reversed(cards)}  # a name of several scans leads to the oddest
    for section in sections:
        section.links = links
    counts = done.table["split"].value_counts()
    summary = [
        f"{len(done.table)} scans of {done.table['subject'].nunique()} subjects: "
        + ", ".join(f"{counts[split]} {split}" for split in (TRAIN, VALIDATION, TEST) if split in counts),
        f"{len(done.failed)} could not be prepared",
        f"{odd} odd: more than {ODD:g} robust deviations from the others",
    ]
    made = {
        "config": config.name,
        "grid": f"{times(config.data.grid.shape)} voxels of {times(config.data.grid.spacing_mm)} mm",
        "versions": f"ldm3d {ldm3d.__version__}",
        "command": command(),
        "made": now(),
    }
    example = [card.entry for card in cards[: max(1, min(odd, 3))]]
    top = {
        "summary": summary,
        "first": cards[:first],
        "others": cards[first:],
        "hidden": len(order) - len(cards),
        "exclude": config.data.exclude,
        "before": json.dumps(_listed(config.data.exclude)),
        "example": example,
        "lines": lines_of(config.data.exclude, example),
        "command": command(),
        "root": root,
    }
    return write_page(config.prepared_folder, f"Prepared scans: {config.name}", sections, made, template=TEMPLATE, **top)


def judged(done: Prepared, looks: Sequence[Mapping[str, NDArray] | None]) -> pd.DataFrame:
    """A row a scan: who, the measures, cut_mm, oddness (the largest deviation of any measure) and what deviates so much."""
    blank = np.full(len(MEASURES), np.nan)
    found = pd.DataFrame([look["measures"] if look else blank for look in looks], columns=MEASURES)
    there = [i for i, look in enumerate(looks) if look]
    found["distance"] = np.nan
    if there:
        found.loc[there, "distance"] = distances(np.array([looks[i]["coarse"] for i in there]))
    off = deviations(found)
    size = off.abs()
    why = size.idxmax(axis=1)
    result = done.table[["subject", "session", "path", "split"]].join(found)
    result["cut_mm"] = [each["cut_mm"] for each in done.told]
    result["oddness"] = size.max(axis=1)
    result["measure"] = why
    result["deviation"] = [off[name][i] for i, name in enumerate(why)]
    return result


# Sections


def _failures(done: Prepared) -> Section:
    rows = [[who(row), row.reason] for row in done.failed.head(MOST_LISTED).itertuples()]
    more = f" The first {MOST_LISTED} are shown; failed.tsv has them all." if len(done.failed) > MOST_LISTED else ""
    text = f"{len(done.failed)} of {len(done.failed) + len(done.table)} scans could not be prepared and are left out.{more}"
    return Section("Scans that failed", text, {"columns": ["scan", "reason"], "rows": rows}, labels=2)


def _warnings(done: Prepared) -> Section:
    rows = [[*message.split(":\n", 1)] for message in done.warnings]
    return Section("Warnings", "These scans are used.", {"columns": ["what", "which"], "rows": rows}, labels=2)


def _cut_section(done: Prepared, grid: Grid) -> Section:
    tolerance_mm = tolerated_mm(grid)
    cut = pd.Series([each["cut_mm"] for each in done.told])
    lost = cut[cut > tolerance_mm].sort_values(ascending=False)
    text = (
        f"{len(lost)} of {len(cut)} scans lose more than {tolerance_mm:g} mm of their foreground at some side of the grid; "
        f"the most is {cut.max():g} mm. "
    )
    text += f"If that is brain and not only neck, {cut_remedy(grid.place)}." if len(lost) else "Nothing of them is cut off."
    rows = [[who(done.table.iloc[i]), f"{mm:g}"] for i, mm in lost.head(20).items()]
    table = {"columns": ["scan", "cut off, mm"], "rows": rows} if rows else None
    return Section("What the grid cuts off", text, table, note="The 20 largest are listed." if len(lost) > 20 else "")


def _registered(done: Prepared, config: RegistrationConfig) -> Section:
    found = pd.Series([each["correlation"] for each in done.told]).sort_values()
    poor = int((found < POOR).sum())
    text = (
        f"All scans were brought into the space of {config.to} ({config.kind}). Their correlations with it are "
        f"{found.min():.2f} to {found.max():.2f}; {poor} of {len(found)} are below {POOR:g}, which is doubtful. "
    )
    text += "Look at the lowest: is the head upright, and in the middle?"
    rows = [[who(done.table.iloc[i]), f"{value:.2f}"] for i, value in found.head(20).items()]
    note = "The 20 lowest are listed." if len(found) > 20 else ""
    return Section("Registration to the template", text, {"columns": ["scan", "correlation"], "rows": rows}, note=note)


def _intensities(looks: Sequence[Mapping[str, NDArray] | None], sites: Sequence[Any] | None) -> Section:
    """The mean histogram of the foreground of each site; the smallest of many sites together."""
    labels = pd.Series(["no site" if pd.isna(site) else str(site) for site in sites] if sites else ["all scans"] * len(looks))
    counts = labels.value_counts()
    if len(counts) > MOST_SITES:
        labels = labels.where(labels.isin(counts.index[: MOST_SITES - 1]), "others")
    histograms = {}
    for label in labels.value_counts().index:
        group = [look["histogram"] for look, own in zip(looks, labels) if look and own == label]
        if group:
            histograms[f"{label} ({len(group)})"] = np.mean(group, axis=0) * BINS / (1 - FOREGROUND)
    if not histograms:
        return Section("Intensities", "No prepared volume could be read.")
    edges = np.linspace(FOREGROUND, 1, BINS + 1)
    by = "by site" if sites else "of all scans; the table has no column that names a site"
    figure = figures.profiles((edges[1:] + edges[:-1]) / 2, histograms, "prepared intensity", "density")
    text = (
        f"Mean histogram of the foreground, {by}. A model learns what differs between sites: curves that differ call for bias "
        "field correction, for one kind of preprocessing, or for the site as a covariate."
    )
    caption = "Share of voxels by intensity, 0 to 1, above a tenth of the range."
    return Section("Intensities", text, pictures=[{"source": figures.to_data_uri(figure), "caption": caption}])


def _measures(found: pd.DataFrame) -> Section:
    plots = []
    for name, words in NAMES.items():
        values = found[name][np.isfinite(found[name])].to_numpy()
        if len(values):
            source = figures.to_data_uri(figures.histogram(values, words, ""))
            plots.append({"source": source, "caption": f"{words}: median {np.median(values):.3g}"})
    return Section("Measures of all scans", f"The values of every scan are in {QUALITY}.", plots=plots, note=SOURCES)


# Pictures


def _card(
    anchor: str,
    row: pd.Series,
    look: Mapping[str, NDArray] | None,
    found: pd.Series,
    medians: pd.Series,
    root: Path,
    alone: bool,
) -> Card:
    path = Path(row["path"])
    entry = row["subject"] if alone else str(path.relative_to(root) if path.is_relative_to(root) else path)
    why = ""
    if not look:
        why = "its prepared volume cannot be read"
    elif not np.isfinite(found["oddness"]):
        why = "nothing in it could be measured"
    elif found["oddness"] > ODD:
        name = found["measure"]
        why = f"{NAMES[name]} {found[name]:.3g} (typical: {medians[name]:.3g})"
    if found["cut_mm"] > 0:
        why += ("; " if why else "") + f"{found['cut_mm']:g} mm cut off"
    return Card(anchor, who(row), entry, row["split"], jpeg(look["picture"]) if look else "", why)


def jpeg(picture: NDArray) -> str:
    """uint8 (rows, columns) as a data: URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="jpeg", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def lines_of(exclude: str | Sequence[str] | None, entries: Sequence[str]) -> str:
    """Lines of a config that leave out these scans, beside those that are left out already."""
    all_of_them = dict.fromkeys([*_listed(exclude), *entries])
    return f"data:\n  exclude: {json.dumps([*all_of_them], ensure_ascii=False)}"


def _listed(exclude: str | Sequence[str] | None) -> list[str]:
    return [] if exclude is None or isinstance(exclude, str) else list(exclude)
