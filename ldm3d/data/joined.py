"""Covariates from any number of further tables (`data.covariates_tables`), joined on subject and session.

A table with a column for the subject is taken as it is; those of other programs and studies are known (`ldm3d.data.layouts`).
"""

import glob
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ldm3d.config.data import DataConfig
from ldm3d.data.layouts import MM3, Layout, read_stats, recognise
from ldm3d.data.rows import Scan, Table, differ, visits_of, with_scans_labels
from ldm3d.data.tables import check_unique, read_table
from ldm3d.errors import InputError, nearest, some

_ML = {"ml", "cm3", "cm^3", "cc", "millilitres", "milliliters"}  # units of covariates that mean millilitres


def read_joined(data: DataConfig, scans: Sequence[Scan]) -> list[Table]:
    """The tables of `data.covariates_tables` in their order; one warning each says which rows and scans have no partner.

    Raises:
        InputError: a table that is missing, cannot be read, has no subjects or the same one twice; or that has a row for
            none of the scans.
    """
    tables = []
    for pattern in data.covariates_tables:
        for path, frame in _read(pattern):
            layout = recognise(frame, data.subject_column, data.session_column)
            if layout is None:
                raise InputError(_unknown(path, frame, data))
            tables.append(_joined(path, frame, layout, scans))
    return tables


def _read(pattern: str) -> list[tuple[Path, pd.DataFrame]]:
    """The tables that a path or a glob names; aseg.stats files, one a subject, make one table."""
    names = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    paths = [Path(os.path.abspath(name)) for name in names]
    if not paths:
        raise InputError(f"data.covariates_tables: no file is called {pattern}")
    stats = [path for path in paths if path.suffix == ".stats"]
    found = [(path, read_table(path)) for path in paths if path.suffix != ".stats"]
    if stats:
        rows = [{"Measure:volume": subject, **volumes} for subject, volumes in map(read_stats, stats)]
        frame = pd.DataFrame(rows, index=range(1, len(rows) + 1), dtype=object).fillna("")  # "line" 3: the third file
        found.append((Path(pattern), frame))
    return found


def _unknown(path: Path, frame: pd.DataFrame, data: DataConfig) -> str:
    close = nearest(data.subject_column.lower(), {name.lower(): name for name in frame}, cutoff=0.5)
    return (
        f"{path}: whose rows are they? It has no column {data.subject_column!r} (data.subject_column)"
        + (f", but {close!r}" if close else "")
        + f", and is no table of FreeSurfer, SynthSeg, ADNI or OASIS that is known. Its columns: {some(frame, 30)}"
    )


def _joined(path: Path, frame: pd.DataFrame, layout: Layout, scans: Sequence[Scan]) -> Table:
    """The table with its rows by the labels of the scans."""
    visits = visits_of(scans)
    subjects = [next((name for name in names if name in visits), names[0]) for names in layout.subjects]
    sessions = [
        next((name for name in names if name in visits.get(subject, ())), names[0])
        for subject, names in zip(subjects, layout.sessions)
    ]
    lines = list(frame.index)
    by_session = any(sessions)
    hint = "" if by_session else "; a row a session needs a column of sessions (data.session_column)"
    check_unique(path, lines, [f"sub-{s}" + (f" ses-{v}" if v else "") for s, v in zip(subjects, sessions)], hint)
    rows: dict[str, dict[str, int]] = {}
    for row, (subject, session) in enumerate(zip(subjects, sessions)):
        rows.setdefault(subject, {})[session] = row
    # Of rows a session, what never differs within a subject is the subject's (sex); if none has two, all is the session's
    several = any(len(at) > 1 for at in rows.values())
    dated = {
        name
        for name, cells in layout.columns.items()
        if by_session and (not several or any(differ(cells, at.values()) for at in rows.values()))
    }
    table = Table(path, layout.columns, lines, with_scans_labels(rows, scans), dated, layout.units)
    _tell(table, layout.name, scans)
    return table


def _tell(table: Table, name: str, scans: Sequence[Scan]) -> None:
    """Say how many scans and rows have no partner; an InputError if none has."""
    title = f"{table.path}" + (f" (a table of {name})" if name else "")
    visits = visits_of(scans)
    lonely = sorted({subject for subject, *_ in scans if subject not in table.rows})
    spare = [
        f"sub-{subject}" + (f" ses-{session}" if session else "")
        for subject, at in table.rows.items()
        for session in at
        if subject not in visits or (session and session not in visits[subject] and visits[subject] != {""})
    ]
    if len(lonely) == len(visits):
        raise InputError(
            f"{title} has a row for none of the {len(visits)} subjects: it has {some(f'sub-{name}' for name in table.rows)}, "
            f"the scans are of {some(f'sub-{name}' for name in visits)}; are the labels the same?"
        )
    parts = [f"no row for {len(lonely)} of {len(visits)} subjects ({some(f'sub-{name}' for name in lonely)})"] * bool(lonely)
    parts += [f"{len(spare)} of {len(table.lines)} rows that match no scan ({some(spare)})"] * bool(spare)
    if parts:
        warnings.warn(f"{title} has {' and '.join(parts)}", stacklevel=6)


def in_unit(cell: str, given: str | None, wanted: str) -> str:
    """A volume's cell in millilitres, where the covariate is in ml and the column in mm3; any other cell as it is."""
    if given != MM3 or wanted.strip().lower() not in _ML:
        return cell
    try:
        return f"{float(cell) / 1000:.10g}"
    except ValueError:
        return cell


def tell_units(converted: Mapping[str, str], kept: Mapping[str, str]) -> None:
    """Say which covariates were divided by 1000, and which stay in mm3 though their unit does not say so.

    Args:
        converted, kept: "column of table" by the covariate's name.
    """
    if converted:
        listed = "; ".join(f"{name} from {source}" for name, source in converted.items())
        warnings.warn(f"volumes in mm3 are divided by 1000, as their covariate is in ml: {listed}", stacklevel=5)
    if kept:
        listed = "; ".join(f"{name} from {source}" for name, source in kept.items())
        warnings.warn(f"volumes stay in mm3: {listed}; with `unit: ml` they are divided by 1000", stacklevel=5)
