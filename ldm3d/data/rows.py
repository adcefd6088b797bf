"""Rows of tables and the scans that they belong to: labels that match, and the row that holds a scan's value."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm3d.errors import some
from ldm3d.notation import is_missing

Scan = tuple[str, str, str]  # subject, session, path


@dataclass(frozen=True)
class Table:
    """A table, with the subject and session of its rows.

    Args:
        path: of the file.
        columns: cells by the column's name.
        lines: of the file, for each row.
        rows: subject -> session -> number of the row; the session is "" where the table has a row a subject.
        dated: columns whose values belong to a session, not to its subject.
        units: of columns, where they are known: "mm3" or "ml".
    """

    path: Path
    columns: Mapping[str, Sequence[str]]
    lines: Sequence[int]
    rows: Mapping[str, Mapping[str, int]]
    dated: Collection[str]
    units: Mapping[str, str] = field(default_factory=dict)

    def row(self, subject: str, session: str, column: str) -> int | None:
        """The row that holds a column's value for a scan; None if there is none for its session, or its subject."""
        sessions = self.rows.get(subject)
        if sessions is None:
            return None
        if column in self.dated and (session or len(sessions) > 1):
            return sessions.get(session)
        rows = sorted(sessions.values(), key=lambda row: row != sessions.get(session))  # its own first
        return next((row for row in rows if not is_missing(self.columns[column][row])), rows[0])


def differ(cells: Sequence[str], rows: Iterable[int]) -> bool:
    """Whether these rows hold different values."""
    return len({cells[row] for row in rows if not is_missing(cells[row])}) > 1


def matched(wanted: Collection[str], known: Collection[str]) -> dict[str, str]:
    """For each wanted label the same known one, or the only one that differs by leading zeros, if that is mutual."""
    found = {label: label for label in wanted if label in known}
    alike = [without_zeros(labels) for labels in (wanted, known)]
    for label in wanted:
        groups = [group.get(label.lstrip("0"), []) for group in alike]
        if label not in found and all(len(group) == 1 for group in groups):
            found[label] = groups[1][0]
    return found


def without_zeros(labels: Iterable[str]) -> dict[str, list[str]]:
    """The labels by what is left of them without leading zeros."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(label.lstrip("0"), []).append(label)
    return groups


def visits_of(scans: Sequence[Scan]) -> dict[str, set[str]]:
    """The sessions of each subject."""
    visits: dict[str, set[str]] = {}
    for subject, session, _ in scans:
        visits.setdefault(subject, set()).add(session)
    return visits


def with_scans_labels(rows: Mapping[str, Mapping[str, int]], scans: Sequence[Scan]) -> dict[str, dict[str, int]]:
    """The rows by the subjects and sessions of their scans; rows without a scan keep their own labels."""
    visits = visits_of(scans)
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
