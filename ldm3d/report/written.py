"""Volumes that were measured by another program: a dataset's participants.tsv against a table or label maps of its scans.

For SynthSeg, FreeSurfer and their like, which are not called from here: they measure a folder that `ldm3d generate` wrote, or
a folder of real scans, and what they found is compared with what was asked, or with what the table says.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import ldm3d
from ldm3d import figures
from ldm3d.covariates import Covariate, CovariateSchema, Value, as_name, is_missing
from ldm3d.data.label_maps import LabelMaps, count_volumes
from ldm3d.data.nifti import read_volume
from ldm3d.data.tables import read_table
from ldm3d.errors import InputError
from ldm3d.evaluation import fairness
from ldm3d.evaluation.comparison import Comparison, compare
from ldm3d.geometry import spacing_of
from ldm3d.report.page import METRICS, Section, command, now, plain, write_page
from ldm3d.report.sections import agreements, fairness_sections

CUBIC_MM_TO_ML = 1e-3
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")


def read_participants(folder: Path) -> tuple[CovariateSchema, dict[str, dict[str, Value]]]:
    """Covariates of every participant of a BIDS dataset, by participant_id.

    A column of numbers is continuous, with the unit that participants.json gives; any other is categorical. Names become
    those of covariates: a column "Age at scan" is the covariate age_at_scan.

    Raises:
        InputError: no participants.tsv, or one without participant_id.
    """
    table = read_table(folder / "participants.tsv").map(lambda cell: "" if is_missing(cell) else cell)
    if "participant_id" not in table:
        raise InputError(f"{folder / 'participants.tsv'} has no column participant_id")
    described = folder / "participants.json"
    known = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    covariates = []
    for column in table.columns.drop("participant_id"):
        cells, name = table[column][table[column] != ""], as_name(column)
        if cells.empty:
            continue
        numbers = pd.to_numeric(cells, errors="coerce")
        if numbers.notna().all():
            covariates.append(Covariate(name, "continuous", known.get(column, {}).get("Units", "")))
        else:
            covariates.append(Covariate(name, "categorical", categories=tuple(sorted(set(cells)))))
    schema = CovariateSchema(tuple(covariates))
    table = table.rename(columns=as_name)
    rows = table[["participant_id", *schema.names]].to_dict("records")
    return schema, {row.pop("participant_id"): schema.parse(row) for row in rows}


def read_volumes(
    path: Path, columns: Mapping[str, Sequence[str]], to_ml: float = CUBIC_MM_TO_ML
) -> dict[str, dict[str, float]]:
    """Volumes in ml from a table such as SynthSeg's --vol, by participant_id.

    Args:
        path: CSV or TSV; its first column names the scan, with "sub-..." somewhere in it.
        columns: quantity -> columns whose sum it is.
        to_ml: ml of one unit of the table; SynthSeg and FreeSurfer write cubic mm.

    Raises:
        InputError: a missing column, a name without "sub-...", one subject twice, or a cell that is no number.
    """
    table = read_table(path)
    table.columns = [name.strip() for name in table.columns]
    wanted = [column for group in columns.values() for column in group]
    if missing := [column for column in wanted if column not in table]:
        raise InputError(f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(table.columns[1:])}")
    found: dict[str, dict[str, float]] = {}
    for line, row in table.iterrows():
        name = _SUBJECT.search(row.iloc[0])
        if not name:
            raise InputError(f"{path}, line {line}: {row.iloc[0]!r} names no subject; sub-... must be in the first column")
        if name[0] in found:
            raise InputError(f"{path}, line {line}: {name[0]} stands there twice; keep one scan of each")
        try:
            found[name[0]] = {key: sum(float(row[c]) for c in group) * to_ml for key, group in columns.items()}
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
    return found


def count_labels(
    maps: LabelMaps, participants: Sequence[str], groups: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Volumes in ml counted on label maps, by participant_id; `groups`: quantity -> labels.

    Participants without a label map are left out.
    """
    found = {}
    for name in participants:
        subject = name.removeprefix("sub-")
        if maps.find(subject):
            labels, affine = read_volume(maps.one(subject))
            found[name] = count_volumes(labels, spacing_of(affine), groups)
    return found


def parse_columns(texts: Sequence[str]) -> dict[str, list[str]]:
    """["ml=left lateral ventricle+right lateral ventricle"] -> {"ml": ["left lateral ventricle", "right lateral "
    "ventricle"]}."""
    found = {}
    for text in texts:
        name, separator, columns = text.partition("=")
        if not separator:
            raise InputError(
                f"{text!r}: write NAME=COLUMN+COLUMN, such as 'ml=left lateral ventricle+right lateral ventricle'"
            )
        found[name.strip()] = [column.strip() for column in columns.split("+")]
    return found


def compare_written(
    folder: Path, measured: Mapping[str, Mapping[str, float]]
) -> tuple[list[Comparison], list[fairness.Gap], list[Section]]:
    """What another program measured, against participants.tsv.

    Args:
        folder: dataset with participants.tsv.
        measured: participant_id -> quantity -> value; quantities are named as columns of participants.tsv.

    Returns:
        The comparisons, the gaps between groups of people, and the sections of a page.

    Raises:
        InputError: no quantity is a column, or too few participants were measured.
    """
    schema, rows = read_participants(folder)
    measured = {person: {as_name(name): value for name, value in values.items()} for person, values in measured.items()}
    people = [name for name in rows if name in measured]
    quantities = [c.name for c in schema if c.kind == "continuous" and any(c.name in values for values in measured.values())]
    if not quantities or not people:
        given = sorted({name for values in measured.values() for name in values})
        raise InputError(
            f"{len(people)} of {len(rows)} participants of {folder} were measured, and of {', '.join(given) or 'nothing'} "
            f"only {', '.join(quantities) or 'nothing'} is a column of numbers in participants.tsv ({', '.join(schema.names)})"
        )
    own = [rows[name] for name in people]
    found, figures_by_person = [], []
    for name in quantities:
        values = [measured[person].get(name, float("nan")) for person in people]
        c = compare(name, "measured", [row[name] for row in own], values, people)
        found.append(c)
        error = np.full(len(people), np.nan)
        error[c.volumes] = c.error
        tolerance = fairness.tolerance(c)
        figures_by_person.append(fairness.Judged(f"{name}: MAE", abs(error), own, people, "low", tolerance))
        figures_by_person.append(fairness.Judged(f"{name}: bias", error, own, people, "neither", tolerance))
    gaps = fairness.gaps(schema, fairness.groupings(schema, own), figures_by_person)
    plots = []
    for c in found:
        title = schema[c.covariate].label
        picture = figures.scatter(c.reference, c.measured, f"table: {title}", f"measured: {title}", "", c.band)
        plots.append({"source": figures.to_data_uri(picture), "caption": c.covariate})
    section = Section(
        "The table, and what was measured",
        f"{len(people)} of {len(rows)} participants of {folder.name} were measured. A perfect answer has r and slope 1, bias "
        "and mean absolute error (MAE) 0. In brackets 95% intervals, by bootstrap over people; in the plots, of the fitted "
        "line.",
        agreements(found, schema, ("measured",)),
        plots=plots,
    )
    return found, gaps, [section, *fairness_sections(gaps)]


def write_comparison(
    folder: Path, title: str, found: Sequence[Comparison], gaps: Sequence[fairness.Gap], sections: Sequence[Section]
) -> Path:
    """Write report.html and metrics.json of what `compare_written` found."""
    made = {"command": command(), "ldm3d": ldm3d.__version__, "made": now()}
    folder.mkdir(parents=True, exist_ok=True)
    values = {"comparisons": [c.to_dict() for c in found], "fairness": [gap.to_dict() for gap in gaps], "provenance": made}
    (folder / METRICS).write_text(json.dumps(plain(values), indent=2, allow_nan=False) + "\n")
    return write_page(folder, title, sections, made)
