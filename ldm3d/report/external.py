"""Volumes that another program measured: a dataset's participants.tsv against a table or label maps of its scans.

SynthSeg, FreeSurfer and similar programs measure a folder that `ldm3d generate` wrote, or a folder of real scans. Their
results are compared with the requests, or with the table of the real subjects.
"""

import collections
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

import ldm3d
from ldm3d import figures
from ldm3d.covariates import Covariate, CovariateSchema, Value, as_name
from ldm3d.data.labels import LabelMaps, count_volumes
from ldm3d.data.nifti import read_volume
from ldm3d.data.tables import read_table
from ldm3d.errors import InputError
from ldm3d.evaluation import subgroups
from ldm3d.files import checked_name
from ldm3d.geometry import spacing_of
from ldm3d.notation import is_missing, read_number
from ldm3d.report.page import METRICS, Section, command, now, write_json, write_page
from ldm3d.report.sections.fidelity import agreement_table
from ldm3d.report.sections.subgroups import subgroup_sections
from ldm3d.statistics.agreement import Comparison, compare

CUBIC_MM_TO_ML = 1e-3
MAX_CATEGORIES = 30  # of a column that people are grouped by, and at most half as many as people; others are free text
_SCAN = re.compile(r"(?P<subject>sub-[A-Za-z0-9]+)(?:[_/](?P<session>ses-[A-Za-z0-9]+))?")


def read_participants(folder: Path) -> tuple[CovariateSchema, dict[str, dict[str, Value]]]:
    """Covariates of every scan of a BIDS dataset, by "sub-01", or "sub-01_ses-M12" where there is a row for each session.

    Rows of sessions are in participants.tsv, with a column session_id, or in sub-01/sub-01_sessions.tsv, whose columns take
    precedence over those of participants.tsv. A column of numbers (89+ is 89) is continuous, with the unit that
    participants.json gives; any other is categorical, but for one of more than `MAX_CATEGORIES` different texts, or of more
    than half as many as there are people, which is left out with a warning. Names become those of covariates: a column "Age
    at scan" is the covariate age_at_scan.

    Raises:
        InputError: no participants.tsv, one without participant_id, or one scan in two rows.
    """
    table = read_table(folder / "participants.tsv").map(_present)
    if "participant_id" not in table:
        raise InputError(f"{folder / 'participants.tsv'} has no column participant_id")
    described = folder / "participants.json"
    known = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    rows = _with_sessions(folder, table)
    scans = [_scan_name(row.pop("participant_id"), row.pop("session_id", "")) for row in rows]
    if twice := [name for name, times in collections.Counter(scans).items() if times > 1]:
        raise InputError(f"{folder / 'participants.tsv'}: {twice[0]} has several rows; a column session_id distinguishes them")
    people = len({_person(name) for name in scans})
    covariates, left_out = [], []
    for column in dict.fromkeys(column for row in rows for column in row):
        cells, name = [cell for row in rows if (cell := row.get(column, ""))], as_name(column)
        categories = tuple(sorted(set(cells)))
        if not cells:
            continue
        if all(_number(cell) is not None for cell in categories):
            covariates.append(Covariate(name, "continuous", known.get(column, {}).get("Units", "")))
        elif len(categories) <= max(2, min(MAX_CATEGORIES, people // 2)):
            covariates.append(Covariate(name, "categorical", categories=categories))
        else:
            left_out.append(f"{name} ({len(categories)})")
    if left_out:
        warnings.warn(f"columns with too many different texts to group people by: {', '.join(left_out)}", stacklevel=2)
    schema = CovariateSchema(tuple(covariates))
    kinds = {c.name: c.kind for c in schema}
    rows = [{as_name(column): cell for column, cell in row.items()} for row in rows]
    parsed = [
        {name: _number(row.get(name, "")) if kind == "continuous" else row.get(name, "") for name, kind in kinds.items()}
        for row in rows
    ]
    return schema, {name: schema.parse(row) for name, row in zip(scans, parsed)}


def _with_sessions(folder: Path, table: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of participants.tsv; of participants with a table of sessions, one row for each session."""
    found = []
    for row in table.to_dict("records"):
        name = checked_name(_scan_name(row["participant_id"], ""), "participant")
        path = folder / name / f"{name}_sessions.tsv"
        if "session_id" in row or not path.is_file():
            found.append(row)
            continue
        found += [row | each for each in read_table(path).map(_present).to_dict("records")]
    return found


def _scan_name(participant: str, session: str) -> str:
    """ "01" or "sub-01", with "M12" or "ses-M12": "sub-01_ses-M12"; without a session "sub-01"."""
    subject = f"sub-{participant.removeprefix('sub-')}"
    return f"{subject}_ses-{session.removeprefix('ses-')}" if session else subject


def _person(scan: str) -> str:
    return scan.partition("_")[0]


def _present(cell: str) -> str:
    """The cell, "" for a missing value."""
    return "" if is_missing(cell) else cell


def _number(cell: str) -> float | None:
    """A cell as a number; None for anything else."""
    try:
        return read_number(cell)[0]
    except ValueError:
        return None


def read_volumes(
    path: Path, columns: Mapping[str, Sequence[str]], to_ml: float = CUBIC_MM_TO_ML
) -> dict[str, dict[str, float]]:
    """Volumes in ml from a table such as SynthSeg's --vol, by scan: "sub-01" or "sub-01_ses-M12".

    Args:
        path: CSV or TSV; its first column names the scan, with "sub-..." and, if there are any, "_ses-..." somewhere in it.
        columns: quantity -> columns whose sum it is.
        to_ml: ml of one unit of the table; SynthSeg and FreeSurfer write cubic mm.

    Raises:
        InputError: a missing column, a name without "sub-...", one subject (and session) twice, or a cell that is no number.
    """
    table = read_table(path)
    table.columns = [name.strip() for name in table.columns]
    wanted = [column for group in columns.values() for column in group]
    if missing := [column for column in wanted if column not in table]:
        raise InputError(f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(table.columns[1:])}")
    found: dict[str, dict[str, float]] = {}
    for line, row in table.iterrows():
        scan = _SCAN.search(row.iloc[0])
        if not scan:
            raise InputError(f"{path}, line {line}: {row.iloc[0]!r} has no subject; sub-... must be in the first column")
        name = _scan_name(scan["subject"], scan["session"] or "")
        if name in found:
            raise InputError(f"{path}, line {line}: {name} occurs twice; keep one scan of each subject and session")
        try:
            found[name] = {key: sum(float(row[c]) for c in group) * to_ml for key, group in columns.items()}
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
    return found


def count_labels(maps: LabelMaps, scans: Sequence[str], groups: Mapping[str, Sequence[int]]) -> dict[str, dict[str, float]]:
    """Volumes in ml counted on label maps, by scan; `groups`: quantity -> labels.

    Scans, as `read_participants` names them, without a label map are left out.
    """
    found = {}
    for name in scans:
        subject, _, session = name.removeprefix("sub-").partition("_ses-")
        if maps.find(subject, session):
            labels, affine = read_volume(maps.one(subject, session))
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
) -> tuple[list[Comparison], list[subgroups.Gap], list[Section]]:
    """Measurements of another program against participants.tsv.

    Args:
        folder: dataset with participants.tsv.
        measured: scan -> quantity -> value; quantities are named as columns of participants.tsv. A scan of a session that has
            no row of its own is compared with its participant's.

    Returns:
        The comparisons, the gaps between groups of people, and the sections of a page.

    Raises:
        InputError: no quantity is a column, or too few participants were measured.
    """
    schema, rows = read_participants(folder)
    measured = {scan: {as_name(name): value for name, value in values.items()} for scan, values in measured.items()}
    if not len(schema):
        raise InputError(f"{folder / 'participants.tsv'} has no covariates to compare with: these volumes have no requests")
    matched = {name: row for name in measured if (row := rows.get(name, rows.get(_person(name))))}
    scans, own = list(matched), list(matched.values())
    people = [_person(name) for name in scans]
    quantities = [c.name for c in schema if c.kind == "continuous" and any(c.name in values for values in measured.values())]
    if not quantities or not scans:
        given = sorted({name for values in measured.values() for name in values})
        raise InputError(
            f"{len(scans)} measured scans are in participants.tsv of {folder}, which has {len(rows)} rows, and of "
            f"{', '.join(given) or 'nothing'} only {', '.join(quantities) or 'nothing'} is a column of numbers there "
            f"({', '.join(schema.names)})"
        )
    found, scores = [], []
    for name in quantities:
        values = [measured[scan].get(name, float("nan")) for scan in scans]
        c = compare(name, "measured", [row[name] for row in own], values, people)
        found.append(c)
        error = c.errors(len(scans))
        scores += subgroups.error_scores(name, abs(error), error, own, people, subgroups.tolerance(c))
    gaps = subgroups.gaps(schema, subgroups.groupings(schema, own), scores)
    plots = []
    for c in found:
        title = schema[c.covariate].label
        picture = figures.scatter(c.reference, c.measured, f"table: {title}", f"measured: {title}", "", c.band)
        plots.append({"source": figures.to_data_uri(picture), "caption": c.covariate})
    section = Section(
        "Agreement with the table",
        f"{len(scans)} scans of {len(set(people))} people in {folder.name} were measured; the table has {len(rows)} rows. "
        "Perfect agreement has r and slope 1, bias and mean absolute error (MAE) 0. In brackets 95% intervals, by "
        "bootstrap over people; in the plots, of the fitted line.",
        agreement_table(found, schema, ("measured",)),
        plots=plots,
    )
    return found, gaps, [section, *subgroup_sections(gaps)]


def write_comparison(
    folder: Path, title: str, found: Sequence[Comparison], gaps: Sequence[subgroups.Gap], sections: Sequence[Section]
) -> Path:
    """Write report.html and metrics.json of the result of `compare_written`."""
    made = {"command": command(), "ldm3d": ldm3d.__version__, "made": now()}
    folder.mkdir(parents=True, exist_ok=True)
    values = {"comparisons": [c.to_dict() for c in found], "fairness": [gap.to_dict() for gap in gaps], "provenance": made}
    write_json(folder / METRICS, values)
    return write_page(folder, title, sections, made)
