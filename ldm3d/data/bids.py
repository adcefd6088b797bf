"""Subject tables in, a BIDS derivative out.

In: which scans there are, whose they are and what the table says of them, from a BIDS dataset or from any CSV or TSV.
Out: the files around generated volumes that make a folder a BIDS derivative dataset.
"""

import difflib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ldm3d.config import CovariateConfig, DataConfig, SplitConfig
from ldm3d.covariates import Covariate, Value
from ldm3d.errors import InputError

BIDS_VERSION = "1.10.0"
_SHOWN = 10  # of many like problems, those that a message spells out


@dataclass(frozen=True)
class _Scan:
    """One scan and the cells of its covariates, not yet read; `lines` says where each cell stands."""

    subject: str
    session: str
    path: str
    cells: Mapping[str, str]  # by the covariate's name
    lines: Mapping[str, str]


def read_scans(data: DataConfig, covariates: Sequence[CovariateConfig]) -> pd.DataFrame:
    """Every scan with its covariates.

    BIDS: scans are the files of `data.suffix`, derivatives aside; their covariates come from participants.tsv, and from
    sub-XX/sub-XX_sessions.tsv where that has the column too (an age differs between sessions). Table: one row a scan.
    Identifiers may carry "sub-" and "ses-" or not. A number beyond its covariate's range counts as missing, with a
    warning.

    Returns:
        One row a scan in the order of (subject, session, path): subject and session (labels without prefix, session ""
        if there is none), path (absolute), and a column for every covariate: float with NaN, or category with None.

    Raises:
        InputError: dataset, table, column or every scan missing; duplicate rows; cells that hold no valid value.
    """
    columns = {c.name: c.column or c.name for c in covariates}
    scans = _scans_of_bids(data, columns) if data.bids else _scans_of_table(data, columns)
    scans.sort(key=lambda scan: (scan.subject, scan.session, scan.path))
    frame = pd.DataFrame({key: [getattr(scan, key) for scan in scans] for key in ("subject", "session", "path")})
    parsed = [Covariate(**c.model_dump(exclude={"column"})) for c in covariates]
    values = _parse(scans, parsed)
    for covariate in parsed:
        kind = float if covariate.kind == "continuous" else object
        frame[covariate.name] = pd.Series(values[covariate.name], dtype=kind)
    return frame


def assign_splits(subjects: Iterable[str], splits: SplitConfig) -> dict[str, str]:
    """Split every subject into "train", "validation" or "test", all of its scans together.

    Subjects are ranked by a hash of seed and name, so the same subjects are split alike in whatever order they come.
    From three subjects on, no split that has a share is empty.
    """
    ranked = sorted(set(subjects), key=lambda subject: hashlib.sha256(f"{splits.seed}:{subject}".encode()).hexdigest())
    count = {}
    for name, share in (("test", splits.test), ("validation", splits.validation)):
        count[name] = max(round(share * len(ranked)), 1 if share > 0 and len(ranked) >= 3 else 0)
    while ranked and sum(count.values()) > len(ranked) - 1:  # someone has to train
        count[max(count, key=count.__getitem__)] -= 1
    names = ["test"] * count["test"] + ["validation"] * count["validation"]
    names += ["train"] * (len(ranked) - len(names))
    return dict(zip(ranked, names))


def start_derivative(folder: Path | str, name: str, generated_by: Sequence[Mapping[str, Any]], readme: str) -> None:
    """Make the folder of a BIDS derivative dataset, with dataset_description.json and README.

    Args:
        folder: must be empty or not there yet.
        name: of the dataset.
        generated_by: BIDS GeneratedBy, each {"Name": ..., "Version": ..., "Description": ...}.
        readme: what the README says.

    Raises:
        InputError: the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} {'is not empty' if folder.is_dir() else 'is a file'}; generated volumes go into a folder of "
            "their own: name a new one, or delete this one first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "Name": name,
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [dict(entry) for entry in generated_by],
    }
    _write_json(folder / "dataset_description.json", description)
    (folder / "README").write_text(readme.rstrip() + "\n", encoding="utf-8")


def synthetic_path(folder: Path | str, i: int) -> Path:
    """Where the volume of sample i (from 0) goes; its subject is syn0001 for i = 0."""
    subject = f"sub-syn{i + 1:04d}"
    return Path(folder) / subject / "anat" / f"{subject}_desc-synthetic_T1w.nii.gz"


def finish_derivative(folder: Path | str, participants: pd.DataFrame, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Write participants.tsv and the participants.json that explains it.

    Args:
        folder: from `start_derivative`.
        participants: one row a subject; participant_id ("sub-syn0001") is its first column. Missing values become n/a.
        columns: {"Description": ..., "Units": ...} or {"Description": ..., "Levels": {...}} for each other column.
    """
    if participants.columns[0] != "participant_id":
        raise ValueError(f"the first column must be participant_id, got {list(participants.columns)}")
    write_table(Path(folder) / "participants.tsv", participants)
    described = {"participant_id": {"Description": "Identifier of the synthetic subject"}}
    _write_json(Path(folder) / "participants.json", {**described, **{key: dict(v) for key, v in columns.items()}})


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a TSV as BIDS has them (missing values are n/a); the file appears whole or not at all."""
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    frame.to_csv(unfinished, sep="\t", index=False, na_rep="n/a", lineterminator="\n", encoding="utf-8")
    os.replace(unfinished, path)


def read_table(path: Path) -> pd.DataFrame:
    """A CSV or TSV as strings, "" where a cell is empty; the index is the line in the file.

    Tabs separate the columns of a .tsv; otherwise comma, semicolon or tab, whichever its first line has most of.

    Raises:
        InputError: missing, empty, no text, or rows of different lengths.
    """
    if not path.is_file():
        raise InputError(f"no table {path}")
    try:
        with open(path, encoding="utf-8-sig") as file:  # Excel starts its CSV files with a byte order mark
            head = file.readline()
        separator = "\t" if path.suffix == ".tsv" else max(",;\t", key=head.count)
        frame = pd.read_csv(
            path,
            sep=separator,
            header=None,  # with a header, pandas shifts or cuts rows that are longer than it
            dtype=str,  # a label "0012" must stay one
            keep_default_na=False,
            skip_blank_lines=False,
            encoding="utf-8-sig",
        )
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8; save it as CSV (UTF-8)") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty; its first line must name the columns") from None
    except pd.errors.ParserError as error:
        raise InputError(f"{path} is no regular table: {' '.join(str(error).split())}") from None
    frame = frame.fillna("").apply(lambda column: column.str.strip())
    frame.columns, frame.index = frame.iloc[0], frame.index + 1
    twice = frame.columns[frame.columns.duplicated() & (frame.columns != "")]
    if len(twice):
        raise InputError(f"{path} has several columns {twice[0]!r}; rename all but one")
    return frame[(frame != "").any(axis=1)].iloc[1:]


def _scans_of_bids(data: DataConfig, columns: Mapping[str, str]) -> list[_Scan]:
    root = Path(os.path.abspath(data.bids))
    files = _find_files(root, data.suffix)
    if not columns:
        return [_Scan(subject, session, path, {}, {}) for subject, session, path in files]

    table_path = root / "participants.tsv"
    table = read_table(table_path)
    _check_column(table_path, table, data.subject_column, "data.subject_column")
    rows = {}  # subject -> (line, cells)
    _check_unique(table_path, [(line, f"sub-{_label(value)}") for line, value in table[data.subject_column].items()])
    for line, row in table.iterrows():
        rows[_label(row[data.subject_column])] = (line, row)

    known = [(subject, session, path) for subject, session, path in files if subject in rows]
    strangers = sorted({subject for subject, _, _ in files} - set(rows))
    if strangers:
        names = _some(f"sub-{s}" for s in strangers)
        message = f"{table_path} has no row for {len(strangers)} subjects that have scans ({names})"
        if not known:
            raise InputError(f"{message}; it has rows for {_some(f'sub-{s}' for s in rows)}")
        warnings.warn(f"{message}; their scans are left out", stacklevel=4)
    scanless = sorted(set(rows) - {subject for subject, _, _ in files})
    if scanless:
        names = _some(f"sub-{s}" for s in scanless)
        warnings.warn(f"{table_path} has {len(scanless)} subjects without a {data.suffix} scan ({names})", stacklevel=4)

    sessions = {subject: _session_rows(root, subject, data.session_column) for subject in {s for s, _, _ in known}}
    in_sessions = {column for rows_ in sessions.values() for _, row in rows_.values() for column in row.index}
    for name, column in columns.items():
        if column not in in_sessions:
            _check_column(table_path, table, column, f"covariate {name}")

    scans = []
    for subject, session, path in known:
        cells, lines = {}, {}
        for name, column in columns.items():
            line, row = sessions[subject].get(session, (0, {}))
            source = f"sub-{subject}_sessions.tsv"
            if column not in row:
                (line, row), source = rows[subject], "participants.tsv"
            cells[name] = row.get(column, "")
            lines[name] = f"{source} line {line} (sub-{subject}), column {column!r}"
        scans.append(_Scan(subject, session, path, cells, lines))
    return scans


def _find_files(root: Path, suffix: str) -> list[tuple[str, str, str]]:
    """(subject, session, path) of every scan of a BIDS dataset."""
    if not root.is_dir():
        raise InputError(f"no folder {root} (data.bids)")
    logging.getLogger("bids").setLevel(logging.ERROR)
    from bids import BIDSLayout, BIDSLayoutIndexer  # takes half a second: not for those who bring a table

    # Without metadata, which nobody asks for here: 2 s instead of 6 s for 1,000 subjects with 2 sessions
    indexer = BIDSLayoutIndexer(validate=False, index_metadata=False)
    try:
        layout = BIDSLayout(root, validate=False, config=["bids", "derivatives"], indexer=indexer)
        found = layout.get(suffix=suffix, extension=[".nii", ".nii.gz"])
    except Exception as error:  # PyBIDS lets through whatever a broken dataset sets off, SQL errors among it
        raise InputError(f"{root} cannot be read as a BIDS dataset: {' '.join(str(error).split())}") from error
    files = []
    for file in found:
        entities = file.get_entities()
        if "subject" in entities:
            files.append((str(entities["subject"]), str(entities.get("session", "")), file.path))
    if not files:
        raise InputError(
            f"no scan found in {root}: looked for sub-*/[ses-*/]anat/sub-*_{suffix}.nii or .nii.gz; "
            "check data.bids and data.suffix"
        )
    return files


def _session_rows(root: Path, subject: str, column: str) -> dict[str, tuple[int, pd.Series]]:
    """Session -> (line, cells) of sub-XX_sessions.tsv; empty where there is none."""
    path = root / f"sub-{subject}" / f"sub-{subject}_sessions.tsv"
    if not path.is_file():
        return {}
    table = read_table(path)
    _check_column(path, table, column, "data.session_column")
    _check_unique(path, [(line, f"ses-{_label(value)}") for line, value in table[column].items()])
    return {_label(row[column]): (line, row) for line, row in table.iterrows()}


def _scans_of_table(data: DataConfig, columns: Mapping[str, str]) -> list[_Scan]:
    path = Path(os.path.abspath(data.table))
    table = read_table(path)
    _check_column(path, table, data.subject_column, "data.subject_column")
    _check_column(path, table, data.path_column, "data.path_column")
    for name, column in columns.items():
        _check_column(path, table, column, f"covariate {name}")
    if "session_column" in data.model_fields_set:
        _check_column(path, table, data.session_column, "data.session_column")
    has_sessions = data.session_column in table
    if table.empty:
        raise InputError(f"{path} has a header but no rows")

    scans, named, files, pathless = [], [], [], []
    folder = Path(os.path.abspath(data.root)) if data.root else path.parent
    for line, row in table.iterrows():
        subject = _label(row[data.subject_column])
        session = _label(row[data.session_column]) if has_sessions else ""
        if not subject:
            raise InputError(f"{path} line {line}: {data.subject_column!r} is empty; every scan needs its subject")
        who = f"sub-{subject}" + (f" ses-{session}" if session else "")
        named.append((line, who))
        if row[data.path_column].lower() in ("", "n/a"):
            pathless.append(who)
            continue
        # abspath and not resolve: DataLad keeps files behind links, whose targets have no proper name
        file = os.path.abspath(folder / row[data.path_column])
        files.append((line, file))
        lines = {name: f"{path.name} line {line} ({who}), column {column!r}" for name, column in columns.items()}
        scans.append(_Scan(subject, session, file, {name: row[c] for name, c in columns.items()}, lines))
    hint = "" if has_sessions else f"; several sessions need a column {data.session_column!r} (data.session_column)"
    _check_unique(path, named, hint)
    _check_unique(path, files, "; one file cannot be two scans")
    if pathless:
        message = f"{path}: column {data.path_column!r} is empty for {len(pathless)} rows ({_some(pathless)})"
        if not scans:
            raise InputError(f"{message}, so there is no scan")
        warnings.warn(f"{message}; they are left out", stacklevel=4)
    return scans


def _parse(scans: Sequence[_Scan], covariates: Sequence[Covariate]) -> dict[str, list[Value]]:
    """Values of every covariate; all unreadable cells end up in one error, all numbers beyond range in one warning."""
    values, bad, beyond = {}, {}, {}
    for covariate in covariates:
        values[covariate.name] = []
        unlimited = replace(covariate, range=None)
        for scan in scans:
            value, line = None, scan.lines[covariate.name]
            try:
                value = unlimited.parse(scan.cells[covariate.name])
            except InputError as error:
                bad[line] = str(error).removeprefix(f"{covariate.name}: ")
            if covariate.range and value is not None and not covariate.range[0] <= value <= covariate.range[1]:
                low, high = covariate.range
                beyond[line] = f"{value:g} is not within {low:g} to {high:g} {covariate.unit}".rstrip()
                value = None
            values[covariate.name].append(value)
    if bad:
        raise InputError(
            f"{len(bad)} cells cannot be used:\n{_listed(bad)}\ncorrect them, or leave them empty for a missing value"
        )
    if beyond:
        warnings.warn(f"{len(beyond)} cells are out of range and count as missing:\n{_listed(beyond)}", stacklevel=3)
    return values


def _check_column(path: Path, table: pd.DataFrame, column: str, purpose: str) -> None:
    if column not in table:
        names = {name.lower(): name for name in table.columns}
        close = difflib.get_close_matches(column.lower(), names, n=1, cutoff=0.5)
        hint = f"did you mean {names[close[0]]!r}? " if close else ""
        raise InputError(f"{path} has no column {column!r} ({purpose}); {hint}Its columns: {', '.join(table.columns)}")


def _check_unique(path: Path, named: Iterable[tuple[int, str]], hint: str = "") -> None:
    """Raise InputError unless every name stands on one line only."""
    lines: dict[str, list[int]] = {}
    for line, name in named:
        lines.setdefault(name, []).append(line)
    twice = [f"{name} on lines {', '.join(map(str, at))}" for name, at in lines.items() if len(at) > 1]
    if twice:
        raise InputError(f"{path} has {len(twice)} duplicates: {_some(twice)}; keep one row each{hint}")


def _label(value: str) -> str:
    """The bare label: "01" for "sub-01" as for "01"."""
    for prefix in ("sub-", "ses-"):
        value = value.removeprefix(prefix)
    return "" if value.lower() == "n/a" else value


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _listed(problems: Mapping[str, str]) -> str:
    lines = [f"  {where}: {what}" for where, what in problems.items()]
    return "\n".join(lines[:_SHOWN] + ([f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
