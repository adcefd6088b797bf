"""Covariates of each scan in the tables of a BIDS dataset: participants.tsv, a row a subject or a session, and
sub-XX_sessions.tsv.

A value belongs to a subject (sex) or to a session (age). BIDS does not mark which, so the tables decide: a column of
sub-XX_sessions.tsv, or one that differs between rows of a subject in participants.tsv, belongs to the session. A session
without a row then has no value; another session's is never taken instead.
"""

import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm3d.config.data import DataConfig
from ldm3d.covariates import is_missing
from ldm3d.data.inside import check_inside, root_of
from ldm3d.data.tables import check_column, check_unique, read_table
from ldm3d.errors import InputError, some
from ldm3d.files import checked_name

Scan = tuple[str, str, str]  # subject, session, path


def label(value: str) -> str:
    """The bare label: "01" for "sub-01" as for "01"."""
    for prefix in ("sub-", "ses-"):
        value = value.removeprefix(prefix)
    return "" if value.lower() == "n/a" else value


def matched(wanted: Collection[str], known: Collection[str]) -> dict[str, str]:
    """For each wanted label the same known one, or the only one that differs by leading zeros, if that is mutual."""
    found = {label: label for label in wanted if label in known}
    alike = [_without_zeros(labels) for labels in (wanted, known)]
    for label in wanted:
        groups = [group.get(label.lstrip("0"), []) for group in alike]
        if label not in found and all(len(group) == 1 for group in groups):
            found[label] = groups[1][0]
    return found


def _without_zeros(labels: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(label.lstrip("0"), []).append(label)
    return groups


def purpose(name: str) -> str:
    """What a column is for, in messages: a covariate, unless it stands for a setting (`data.exclude`)."""
    return name if "." in name else f"covariate {name}"


@dataclass(frozen=True)
class _Table:
    """A table, with the subject and session of its rows.

    Args:
        path: of the file.
        columns: cells by the column's name.
        lines: of the file, for each row.
        rows: subject -> session -> number of the row; the session is "" where the table has a row a subject.
        dated: columns whose values belong to a session, not to its subject.
    """

    path: Path
    columns: Mapping[str, Sequence[str]]
    lines: Sequence[int]
    rows: Mapping[str, Mapping[str, int]]
    dated: Collection[str]

    def row(self, subject: str, session: str, column: str) -> int | None:
        """The row that holds a column's value for a scan; None if there is none for its session."""
        sessions = self.rows[subject]
        if column in self.dated and (session or len(sessions) > 1):
            return sessions.get(session)
        rows = sorted(sessions.values(), key=lambda row: row != sessions.get(session))  # its own first
        return next((row for row in rows if not is_missing(self.columns[column][row])), rows[0])


def cells_of(
    data: DataConfig, scans: Sequence[Scan], columns: Mapping[str, str]
) -> tuple[list[Scan], dict[str, list[str]], dict[str, list[str]]]:
    """The cells of every covariate for the scans of a BIDS dataset.

    Args:
        data: where the dataset is and what the columns of identifiers are called.
        scans: files, as found.
        columns: column of the table by the covariate's name.

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
    sessions = {subject: _sessions(data, subject, visits) for subject, visits in _visits(scans).items()}
    _check_columns(data, table, [visits for visits in sessions.values() if visits], columns)
    cells: dict[str, list[str]] = {name: [] for name in columns}
    locations: dict[str, list[str]] = {name: [] for name in columns}
    absent: dict[str, list[str]] = {}
    for subject, session, _ in scans:
        for name, column in columns.items():
            source = next((each for each in (sessions[subject], table) if each and column in each.columns), None)
            row = source.row(subject, session, column) if source else None
            if row is None:
                absent.setdefault(name, []).append(f"sub-{subject} ses-{session}" if session else f"sub-{subject}")
            cells[name].append("" if row is None else source.columns[column][row])
            locations[name].append("no table" if row is None else f"{source.path.name} line {source.lines[row]}")
    for name, who in absent.items():
        warnings.warn(
            f"{name} counts as missing for {len(who)} scans, whose session has no row in a table that gives it ({some(who)})",
            stacklevel=5,
        )
    return list(scans), cells, locations


def _participants(data: DataConfig, scans: Sequence[Scan]) -> _Table | None:
    """The table of participants with the rows of the scans' subjects; None if there is none."""
    root = Path(os.path.abspath(data.bids))
    path = Path(os.path.abspath(data.participants or root / "participants.tsv"))
    if not data.participants and not os.path.lexists(path):
        return None
    if not data.participants:  # one that the config names may lie anywhere
        check_inside(path, root_of(data))
    frame = read_table(path)
    check_column(path, frame, data.subject_column, "data.subject_column")
    subjects = [label(cell) for cell in frame[data.subject_column]]
    columns = {column: frame[column].tolist() for column in frame}
    several = len(set(subjects)) < len(subjects)
    if several and data.session_column in columns:
        sessions = [label(cell) for cell in columns[data.session_column]]
        check_unique(path, frame.index, [f"sub-{s}" + (f" ses-{v}" if v else "") for s, v in zip(subjects, sessions)])
    else:
        hint = f"; a row a session needs a column {data.session_column!r} (data.session_column)"
        check_unique(path, frame.index, [f"sub-{subject}" for subject in subjects], hint)
        sessions = [""] * len(subjects)
    rows: dict[str, dict[str, int]] = {}
    for row, (subject, session) in enumerate(zip(subjects, sessions)):
        rows.setdefault(subject, {})[session] = row
    dated = {c for c, cells in columns.items() if several and any(_differ(cells, at.values()) for at in rows.values())}
    return _Table(path, columns, list(frame.index), _with_scans_labels(rows, scans), dated)


def _differ(cells: Sequence[str], rows: Iterable[int]) -> bool:
    return len({cells[row] for row in rows if not is_missing(cells[row])}) > 1


def _with_scans_labels(rows: Mapping[str, Mapping[str, int]], scans: Sequence[Scan]) -> dict[str, dict[str, int]]:
    """The rows by the subjects and sessions of their scans; rows without a scan keep their own labels."""
    visits = _visits(scans)
    found = matched(visits, rows)
    loose = {subject: known for subject, known in found.items() if subject != known}
    if loose:
        pairs = some(f"sub-{subject} with {known}" for subject, known in loose.items())
        warnings.warn(
            f"{len(loose)} subjects are matched with rows of the table that differ by leading zeros only ({pairs})",
            stacklevel=7,
        )
    named = {subject: dict(at) for subject, at in rows.items() if subject not in set(found.values())}
    for subject, known in found.items():
        sessions = {theirs: ours for ours, theirs in matched(visits[subject], rows[known]).items()}
        named[subject] = {sessions.get(session, session): row for session, row in rows[known].items()}
    return named


def _visits(scans: Sequence[Scan]) -> dict[str, set[str]]:
    """The sessions of each subject."""
    visits: dict[str, set[str]] = {}
    for subject, session, _ in scans:
        visits.setdefault(subject, set()).add(session)
    return visits


def _known(table: _Table, scans: Sequence[Scan], data: DataConfig) -> list[Scan]:
    """The scans whose subjects have rows; warns of subjects with only a scan or only a row."""
    known = [scan for scan in scans if scan[0] in table.rows]
    with_scans = {subject for subject, *_ in scans}
    if strangers := sorted(with_scans - set(table.rows)):
        message = f"{table.path} has no row for {len(strangers)} subjects that have scans ({_subjects(strangers)})"
        rows = _without_zeros(table.rows)
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


def _sessions(data: DataConfig, subject: str, visits: Collection[str]) -> _Table | None:
    """sub-XX_sessions.tsv; None if there is none."""
    name = f"sub-{checked_name(subject, 'subject')}"
    path = Path(os.path.abspath(data.bids)) / name / f"{name}_sessions.tsv"
    if not path.is_file():
        return None
    check_inside(path, root_of(data))
    frame = read_table(path)
    check_column(path, frame, data.session_column, "data.session_column")
    sessions = [label(cell) for cell in frame[data.session_column]]
    check_unique(path, frame.index, [f"ses-{session}" for session in sessions])
    ours = {theirs: ours for ours, theirs in matched(visits, sessions).items()}
    rows = {subject: {ours.get(session, session): row for row, session in enumerate(sessions)}}
    columns = {column: frame[column].tolist() for column in frame}
    return _Table(path, columns, list(frame.index), rows, set(columns))


def _check_columns(data: DataConfig, table: _Table | None, sessions: Sequence[_Table], columns: Mapping[str, str]) -> None:
    """Raise InputError for a column that no table has."""
    in_sessions = {column for visits in sessions for column in visits.columns}
    lacking = {name: column for name, column in columns.items() if column not in in_sessions}
    if table:
        for name, column in lacking.items():
            check_column(table.path, table.columns, column, purpose(name))
    elif lacking:
        wanted = some(lacking.values(), 10)
        raise InputError(
            f"{data.bids} has no participants.tsv, where {wanted} would stand; write one, a row a subject with "
            f"{data.subject_column}, {wanted}, or name a table that lies elsewhere with `data.participants: PATH`. Without "
            "any covariates (`covariates: []`) the scans are enough"
        )


def _subjects(labels: Iterable[str]) -> str:
    return some(f"sub-{label}" for label in labels)
