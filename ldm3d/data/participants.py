"""Covariates of each scan in the tables of a BIDS dataset: participants.tsv, a row a subject or a session,
sub-XX_sessions.tsv, and further tables that are joined (`ldm3d.data.joined`).

A value belongs to a subject (sex) or to a session (age). BIDS does not mark which, so the tables decide: a column of
sub-XX_sessions.tsv, or one that differs between rows of a subject in participants.tsv, belongs to the session. A session
without a row then has no value; another session's is never taken instead.
"""

import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from ldm3d.config.data import DataConfig
from ldm3d.data.inside import check_inside, tables_root_of
from ldm3d.data.joined import in_unit, read_joined, tell_units
from ldm3d.data.layouts import MM3, label_of
from ldm3d.data.rows import Scan, Table, differ, matched, visits_of, with_scans_labels, without_zeros
from ldm3d.data.tables import check_column, check_unique, read_table
from ldm3d.errors import InputError, some
from ldm3d.files import checked_name


def cells_of(
    data: DataConfig, scans: Sequence[Scan], columns: Mapping[str, str], units: Mapping[str, str]
) -> tuple[list[Scan], dict[str, list[str]], dict[str, list[str]]]:
    """The cells of every covariate for the scans of a BIDS dataset.

    A column is taken from the first that has it: the subject's sessions table, the table of participants, those of
    `data.covariates_tables` in their order.

    Args:
        data: where the dataset is and what the columns of identifiers are called.
        scans: files, as found.
        columns: column of the table by the covariate's name.
        units: of each covariate, by its name.

    Returns:
        The scans that the tables list; for each covariate their cells, "" for no value; and the location of each, for
        messages.

    Raises:
        InputError: a table that is needed is missing or cannot be read, has no such column or a subject twice; or no scan has
            a row.
    """
    table = _participants(data, scans)
    if table:
        scans = _known(table, scans, data)
    sessions = {subject: _sessions(data, subject, visits, columns.values()) for subject, visits in visits_of(scans).items()}
    further = read_joined(data, scans)
    _check_columns(data, table, [visits for visits in sessions.values() if visits], further, columns)
    own = {subject: [each for each in (visits, table) if each] for subject, visits in sessions.items()}
    return list(scans), *look_up(scans, columns, units, own, further)


def look_up(
    scans: Sequence[Scan],
    columns: Mapping[str, str],
    units: Mapping[str, str],
    own: Mapping[str, Sequence[Table]],
    further: Sequence[Table],
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Cells and locations as in `cells_of`: of the first table with the column, of the subject's `own`, then of `further`."""
    cells: dict[str, list[str]] = {name: [] for name in columns}
    locations: dict[str, list[str]] = {name: [] for name in columns}
    absent: dict[str, list[str]] = {}
    converted: dict[str, str] = {}
    kept: dict[str, str] = {}
    for subject, session, _ in scans:
        for name, column in columns.items():
            source = next((each for each in (*own.get(subject, ()), *further) if column in each.columns), None)
            row = source.row(subject, session, column) if source else None
            if row is None:
                absent.setdefault(name, []).append(f"sub-{subject} ses-{session}" if session else f"sub-{subject}")
                cells[name].append("")
                locations[name].append("no table")
                continue
            given, cell = source.units.get(column), source.columns[column][row]
            cells[name].append(in_unit(cell, given, units[name]))
            if given == MM3 and cells[name][-1] != cell:
                converted[name] = f"{column!r} of {source.path.name}"
            elif given == MM3 and not units[name]:
                kept[name] = f"{column!r} of {source.path.name}"
            locations[name].append(f"{source.path.name} line {source.lines[row]}")
    for name, who in absent.items():
        warnings.warn(
            f"{name} counts as missing for {len(who)} scans, whose subject or session has no row in a table that gives it "
            f"({some(who)})",
            stacklevel=6,
        )
    tell_units(converted, kept)
    return cells, locations


def _participants(data: DataConfig, scans: Sequence[Scan]) -> Table | None:
    """The table of participants with the rows of the scans' subjects; None if there is none."""
    path = Path(os.path.abspath(data.participants or data.bids / "participants.tsv"))
    if not data.participants and not os.path.lexists(path):
        return None
    if not data.participants:  # one that the config names may lie anywhere
        check_inside(path, tables_root_of(data))
    frame = read_table(path)
    check_column(path, frame, data.subject_column, "data.subject_column")
    subjects = [label_of(cell) for cell in frame[data.subject_column]]
    columns = {column: frame[column].tolist() for column in frame}
    several = len(set(subjects)) < len(subjects)
    if several and data.session_column in columns:
        sessions = [label_of(cell) for cell in columns[data.session_column]]
        check_unique(path, frame.index, [f"sub-{s}" + (f" ses-{v}" if v else "") for s, v in zip(subjects, sessions)])
    else:
        hint = f"; a row a session needs a column {data.session_column!r} (data.session_column)"
        check_unique(path, frame.index, [f"sub-{subject}" for subject in subjects], hint)
        sessions = [""] * len(subjects)
    rows: dict[str, dict[str, int]] = {}
    for row, (subject, session) in enumerate(zip(subjects, sessions)):
        rows.setdefault(subject, {})[session] = row
    dated = {c for c, cells in columns.items() if several and any(differ(cells, at.values()) for at in rows.values())}
    return Table(path, columns, list(frame.index), with_scans_labels(rows, scans), dated)


def _known(table: Table, scans: Sequence[Scan], data: DataConfig) -> list[Scan]:
    """The scans whose subjects have rows; warns of subjects with only a scan or only a row."""
    known = [scan for scan in scans if scan[0] in table.rows]
    with_scans = {subject for subject, *_ in scans}
    if strangers := sorted(with_scans - set(table.rows)):
        message = f"{table.path} has no row for {len(strangers)} subjects that have scans ({_subjects(strangers)})"
        rows = without_zeros(table.rows)
        if unclear := [s for s in strangers if s.lstrip("0") in rows]:
            message += (
                f"; for {_subjects(unclear)}, several labels differ by leading zeros alone, so rows cannot be matched: write "
                "the labels in full"
            )
        if not known:
            raise InputError(f"{message}; it has rows for {_subjects(table.rows)}")
        warnings.warn(f"{message}; their scans are left out", stacklevel=6)
    if scanless := sorted(set(table.rows) - with_scans):
        message = f"{table.path} has {len(scanless)} subjects without a {data.suffix} scan ({_subjects(scanless)})"
        warnings.warn(message, stacklevel=6)
    return known


def _sessions(data: DataConfig, subject: str, visits: Collection[str], wanted: Collection[str]) -> Table | None:
    """sub-XX_sessions.tsv; None if there is none, or one without sessions that has nothing of what is wanted."""
    name = f"sub-{checked_name(subject, 'subject')}"
    folder = Path(os.path.abspath(data.sessions or data.bids))
    paths = [folder / name / f"{name}_sessions.tsv", folder / f"{name}_sessions.tsv"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    if not data.sessions:  # a folder that the config names may lie anywhere
        check_inside(path, tables_root_of(data))
    frame = read_table(path)
    if data.session_column not in frame and not {*wanted} & {*frame}:
        return None
    check_column(path, frame, data.session_column, "data.session_column")
    sessions = [label_of(cell) for cell in frame[data.session_column]]
    check_unique(path, frame.index, [f"ses-{session}" for session in sessions])
    ours = {theirs: ours for ours, theirs in matched(visits, sessions).items()}
    rows = {subject: {ours.get(session, session): row for row, session in enumerate(sessions)}}
    columns = {column: frame[column].tolist() for column in frame}
    return Table(path, columns, list(frame.index), rows, set(columns))


def _check_columns(
    data: DataConfig,
    table: Table | None,
    sessions: Sequence[Table],
    further: Sequence[Table],
    columns: Mapping[str, str],
) -> None:
    """Raise InputError for a column that no table has."""
    there = {column for each in (*sessions, *further) for column in each.columns}
    lacking = {name: column for name, column in columns.items() if column not in there}
    if table or further:
        main = table or further[0]
        others = [each for each in further if each is not main]
        for name, column in lacking.items():
            purpose = purpose_of(name) + (f"; nor has {some(each.path.name for each in others)}" if others else "")
            check_column(main.path, main.columns, column, purpose, way_out_of(name))
    elif lacking:
        wanted = some(lacking.values(), 10)
        raise InputError(
            f"{data.bids} has no participants.tsv, where {wanted} would stand; write one, a row a subject with "
            f"{data.subject_column}, {wanted}, or name a table that lies elsewhere with `data.participants: PATH`"
            f"{_tables_beside(data, lacking.values())}. Without any covariates (`covariates: []`) the scans are enough"
        )


def _tables_beside(data: DataConfig, columns: Iterable[str]) -> str:
    """Tables of the dataset with a column of subjects and one that is asked for, in words; "" for none."""
    found = []
    for path in [*sorted(data.bids.glob("*.tsv")), *sorted(data.bids.glob("phenotype/*.tsv"))] if data.bids else []:
        if path.is_file() and not path.is_symlink():
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                header = {cell.strip() for cell in file.readline(2**16).split("\t")}
            has = [column for column in columns if column in header]
            if data.subject_column in header and has:
                found.append(f"{path.relative_to(data.bids)} has {' and '.join(has)}")
    return f" ({some(found)})" if found else ""


def purpose_of(name: str) -> str:
    """What needs a column: a covariate, or the setting of that name."""
    return name if name.startswith("data.") else f"covariate {name}"


def way_out_of(name: str) -> str:
    """What can be done where no table has a covariate's column; "" for a setting's."""
    if name.startswith("data."):
        return ""
    return "name the right one with `column: COLUMN` in the covariate, add it to the table, or leave the covariate out"


def _subjects(labels: Iterable[str]) -> str:
    return some(f"sub-{label}" for label in labels)
