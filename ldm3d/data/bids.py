"""Subject tables in, a BIDS derivative out.

In: which scans there are, whose they are and what the table says of them, from a BIDS dataset or from any CSV or TSV.
Out: the files around generated volumes that make a folder a BIDS derivative dataset.
"""

import collections
import csv
import difflib
import hashlib
import itertools
import json
import logging
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ldm3d.config import CovariateConfig, DataConfig, SplitConfig
from ldm3d.covariates import Covariate, Value
from ldm3d.data.nifti import files_of
from ldm3d.data.selection import Candidate, choose_scans
from ldm3d.errors import InputError, shown

BIDS_VERSION = "1.10.0"
_SHOWN = 10  # of many like problems, those that a message spells out


MAX_TABLE_BYTES = 2**30
_PAIR = re.compile(r"\.(hdr|img)(\.gz|\.bz2)?$", re.IGNORECASE)
_FORMULA = re.compile(r"'*[=+\-@](?=.)")  # how a cell begins that a spreadsheet may run; a lone + or - is a value
# What BIDS files metadata of whole folders under; PyBIDS would take patterns to match file names with from it
_NO_LAYOUT_FILE = ".no-such-file"


@dataclass(frozen=True)
class _Scans:
    """Scans and the cells of their covariates, not yet read; columns of equal length, for tables of a million rows."""

    subject: Sequence[str]
    session: Sequence[str]
    path: Sequence[str]
    cells: Mapping[str, Sequence[str]]  # by the covariate's name
    where: Callable[[int, str], str]  # (number of the scan, name of the covariate) -> where the cell stands, for messages


def read_scans(data: DataConfig, covariates: Sequence[CovariateConfig]) -> pd.DataFrame:
    """Every scan with its covariates.

    BIDS: scans are files of `data.suffix`, derivatives aside, one a session (`ldm3d.data.selection`); their covariates come
    from participants.tsv, and from sub-XX/sub-XX_sessions.tsv where that has the column too (an age differs between
    sessions). Table: one row a scan. Identifiers may carry "sub-" and "ses-" or not. A number beyond its covariate's range
    counts as missing, with a warning.

    Returns:
        One row a scan in the order of (subject, session, path): subject and session (labels without prefix, session ""
        if there is none), path (absolute), and a column for every covariate: float with NaN, or category with None.

    Raises:
        InputError: dataset, table, column or every scan missing; duplicate rows; cells that hold no valid value; anything
            that leads out of `data.root` (by default the dataset, or the table's folder), links followed.
    """
    columns = {c.name: c.column or c.name for c in covariates}
    scans = _scans_of_bids(data, columns) if data.bids else _scans_of_table(data, columns)
    parsed = [Covariate(**c.model_dump(exclude={"column"})) for c in covariates]
    values = _parse(scans, parsed)
    keys = list(zip(scans.subject, scans.session, scans.path))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    frame = pd.DataFrame([keys[i] for i in order], columns=["subject", "session", "path"])
    for covariate in parsed:
        kind = float if covariate.kind == "continuous" else object
        frame[covariate.name] = pd.Series([values[covariate.name][i] for i in order], dtype=kind)
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


def derivative_files(name: str, generated_by: Sequence[Mapping[str, Any]], readme: str) -> dict[str, str]:
    """What makes a folder a BIDS derivative dataset: the content of dataset_description.json and README, by name.

    Args:
        name: of the dataset.
        generated_by: BIDS GeneratedBy, each {"Name": ..., "Version": ..., "Description": ...}.
        readme: what the README says.
    """
    description = {
        "Name": name,
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [dict(entry) for entry in generated_by],
    }
    return {"dataset_description.json": as_json(description), "README": readme.rstrip() + "\n"}


def synthetic_path(folder: Path | str, i: int, volumes: int = 1, suffix: str = "T1w") -> Path:
    """Where the volume of sample i (from 0) of a dataset of so many volumes goes; its subject is syn0001 for i = 0.

    Subjects of one dataset have numbers of one width, four digits or more, so that they sort by name.
    """
    subject = f"sub-syn{i + 1:0{max(4, len(str(volumes)))}d}"
    return Path(folder) / subject / "anat" / f"{subject}_desc-synthetic_{suffix}.nii.gz"


def participants_files(participants: pd.DataFrame, columns: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The content of participants.tsv and of the participants.json that explains it, by name.

    Args:
        participants: one row a subject; participant_id ("sub-syn0001") is its first column. Missing values become n/a.
        columns: {"Description": ..., "Units": ...} or {"Description": ..., "Levels": {...}} for each other column.
    """
    if participants.columns[0] != "participant_id":
        raise ValueError(f"the first column must be participant_id, got {list(participants.columns)}")
    described = {"participant_id": {"Description": "Identifier of the synthetic subject"}}
    described |= {key: dict(value) for key, value in columns.items()}
    return {"participants.json": as_json(described), "participants.tsv": _as_tsv(participants)}


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a TSV as BIDS has them (missing values are n/a); the file appears whole or not at all.

    Text that a spreadsheet might run as a formula gets an apostrophe in front, which `read_table` takes off again.
    """
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    unfinished.write_text(_as_tsv(frame), encoding="utf-8", newline="\n")
    os.replace(unfinished, path)


def read_table(path: Path) -> pd.DataFrame:
    """A CSV or TSV as strings, "" where a cell is empty; the index is the line in the file.

    Tabs separate the columns of a .tsv; otherwise comma, semicolon or tab, whichever its first line has most of. Columns
    with neither name nor cells, which spreadsheets leave behind, are dropped.

    Raises:
        InputError: missing, too large, empty, no text, or rows of different lengths; control characters.
    """
    if not path.is_file():
        raise InputError(f"no table {path}")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes; at most {MAX_TABLE_BYTES:,}: keep the columns of interest"
        )
    try:
        # Excel starts its CSV files with a byte order mark; and csv, not pandas, which takes a millisecond for each column
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline(2**16)
            file.seek(0)
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else max(",;\t", key=head.count))
            columns, lines = [], []
            for row in reader:
                if not "".join(row).strip():
                    continue
                columns = columns or [[] for _ in row]
                if len(row) != len(columns):
                    if any(row[len(columns) :]):
                        raise csv.Error(f"Expected {len(columns)} fields in line {reader.line_num}, saw {len(row)}")
                    row = [*row, *[""] * len(columns)]
                for column, cell in zip(columns, row):  # a million lists of cells would be too much for the memory's keeper
                    column.append(cell)
                lines.append(reader.line_num)
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8; save it as CSV (UTF-8)") from None
    except csv.Error as error:
        raise InputError(f"{path} is no regular table: {error} (line {reader.line_num})") from None
    except MemoryError:
        raise InputError(f"{path} is larger than this machine's memory; keep the columns of interest") from None
    if not lines:
        raise InputError(f"{path} is empty; its first line must name the columns")
    columns = [_clean(cells, lines, path) for cells in columns]
    names = [column[0] for column in columns]
    twice = [name for name, count in collections.Counter(names).items() if name and count > 1]
    if twice:
        raise InputError(f"{path} has several columns {shown(twice[0])}; rename all but one")
    kept = {name: column[1:] for name, column in zip(names, columns) if name or any(column)}
    return pd.DataFrame(kept, index=lines[1:], dtype=object)


def _clean(cells: Sequence[str], lines: Sequence[int], path: Path) -> list[str]:
    """A column's cells without blanks around them, nor the apostrophe that `write_table` puts before formulas."""
    cells = [cell.strip() for cell in cells]
    everything = "".join(cells)  # a million cells are looked at one by one only where there is something to find
    if not everything.isprintable():
        for line, cell in zip(lines, cells):
            if any(unicodedata.category(letter) == "Cc" for letter in cell):
                raise InputError(
                    f"{path} line {line}: {shown(cell)} holds a line break or another control character; "
                    "is a quotation mark missing?"
                )
    if "'" in everything:
        cells = [cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell for cell in cells]
    return cells


def root_of(data: DataConfig) -> Path:
    """The folder that every file of a dataset lies below."""
    return Path(os.path.abspath(data.root or data.bids or data.table.parent))


def check_inside(path: Path | str, root: Path) -> None:
    """Raise InputError unless a file lies below the dataset's root, links followed; both files of a pair .hdr and .img."""
    for file in files_of(Path(path)):
        real = Path(os.path.realpath(file))
        if not real.is_relative_to(os.path.realpath(root)):
            raise InputError(f"{path}: leads to {real}, outside of {root}; copy it there, or set data.root (evaluate: --root)")


def _scans_of_bids(data: DataConfig, columns: Mapping[str, str]) -> _Scans:
    root = Path(os.path.abspath(data.bids))
    files = _find_files(root, data.suffix, root_of(data), data.filter)
    if not columns:
        return _Scans(*map(list, zip(*files)), {}, lambda i, name: files[i][2])

    table_path = root / "participants.tsv"
    check_inside(table_path, root_of(data))
    table = read_table(table_path)
    _check_column(table_path, table, data.subject_column, "data.subject_column")
    subjects = [_label(value) for value in table[data.subject_column]]
    _check_unique(table_path, table.index, [f"sub-{subject}" for subject in subjects])
    rows = dict(zip(subjects, range(len(subjects))))

    known = [(subject, session, path) for subject, session, path in files if subject in rows]
    strangers = sorted({subject for subject, _, _ in files} - set(rows))
    if strangers:
        names = _some(f"sub-{s}" for s in strangers)
        message = f"{table_path} has no row for {len(strangers)} subjects that have scans ({names})"
        if not known:
            raise InputError(f"{message}; it has rows for {_some(f'sub-{s}' for s in rows)}")
        warnings.warn(f"{message}; their scans are left out", stacklevel=4)
    scanless = sorted(rows.keys() - {subject for subject, _, _ in files})
    if scanless:
        names = _some(f"sub-{s}" for s in scanless)
        warnings.warn(f"{table_path} has {len(scanless)} subjects without a {data.suffix} scan ({names})", stacklevel=4)

    sessions = {subject: _session_rows(data, subject) for subject in {subject for subject, _, _ in known}}
    in_sessions = {column for rows_ in sessions.values() for _, row in rows_.values() for column in row.index}
    for name, column in columns.items():
        if column not in in_sessions:
            _check_column(table_path, table, column, f"covariate {name}")

    cells, lines = {name: [] for name in columns}, {name: [] for name in columns}
    for subject, session, _ in known:
        line_of_session, of_session = sessions[subject].get(session, (0, {}))
        for name, column in columns.items():
            if column in of_session:
                cells[name].append(of_session[column])
                lines[name].append(f"sub-{subject}_sessions.tsv line {line_of_session}")
            else:
                cells[name].append(table[column].iloc[rows[subject]] if column in table else "")
                lines[name].append(f"participants.tsv line {table.index[rows[subject]]}")

    def where(i: int, name: str) -> str:
        return f"{lines[name][i]} (sub-{known[i][0]}), column {columns[name]!r}"

    return _Scans(*map(list, zip(*known)), cells, where)


def _check_folders(dataset: Path, root: Path) -> None:
    """Raise InputError for a link to a folder that leads out, or back to where one would come by it again.

    Files are checked when they are opened.
    """
    for folder, names, _ in os.walk(dataset):
        names[:] = [name for name in names if not name.startswith(".")]
        for path in (Path(folder, name) for name in names):
            if path.is_symlink():
                check_inside(path, root)
                if path.parent.resolve().is_relative_to(path.resolve()):
                    raise InputError(f"{path} links to a folder that it lies in itself; remove the link")


def _find_files(dataset: Path, suffix: str, root: Path, wanted: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(subject, session, path) of every scan of a BIDS dataset that reads nothing outside of `root`."""
    if not dataset.is_dir():
        raise InputError(f"no folder {dataset} (data.bids)")
    _check_folders(dataset, root)
    check_inside(dataset / "dataset_description.json", root)
    logging.getLogger("bids").setLevel(logging.ERROR)
    from bids import BIDSLayout, BIDSLayoutIndexer  # takes half a second: not for those who bring a table

    # Without metadata, which nobody asks for here: 2 s instead of 6 s for 1,000 subjects with 2 sessions
    indexer = BIDSLayoutIndexer(validate=False, index_metadata=False, config_filename=_NO_LAYOUT_FILE)
    try:
        layout = BIDSLayout(dataset, validate=False, config=["bids", "derivatives"], indexer=indexer)
        found = layout.get(suffix=suffix, extension=[".nii", ".nii.gz"])
    except Exception as error:  # PyBIDS lets through whatever a broken dataset sets off, SQL errors among it
        raise InputError(f"{dataset} cannot be read as a BIDS dataset: {' '.join(str(error).split())}") from error
    named = [(file.path, entities) for file in found if "subject" in (entities := file.get_entities())]
    if not named:
        raise InputError(
            f"no scan found in {dataset}: looked for sub-*/[ses-*/]anat/sub-*_{suffix}.nii or .nii.gz; "
            "check data.bids and data.suffix"
        )
    chosen = choose_scans([Candidate.of(*each) for each in named], wanted, suffix)
    return [(scan.subject, scan.session, scan.path) for scan in chosen]


def _session_rows(data: DataConfig, subject: str) -> dict[str, tuple[int, pd.Series]]:
    """Session -> (line, cells) of sub-XX_sessions.tsv; empty where there is none."""
    path = Path(os.path.abspath(data.bids)) / f"sub-{subject}" / f"sub-{subject}_sessions.tsv"
    if not path.is_file():
        return {}
    check_inside(path, root_of(data))
    table = read_table(path)
    _check_column(path, table, data.session_column, "data.session_column")
    _check_unique(path, table.index, [f"ses-{_label(value)}" for value in table[data.session_column]])
    return {_label(row[data.session_column]): (line, row) for line, row in table.iterrows()}


def _scans_of_table(data: DataConfig, columns: Mapping[str, str]) -> _Scans:
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

    subjects = [_label(cell) for cell in table[data.subject_column]]
    sessions = [_label(cell) for cell in table[data.session_column]] if has_sessions else [""] * len(table)
    if not all(subjects):
        line = table.index[subjects.index("")]
        raise InputError(f"{path} line {line}: {data.subject_column!r} is empty; every scan needs its subject")
    who = [f"sub-{subject}" + (f" ses-{session}" if session else "") for subject, session in zip(subjects, sessions)]
    hint = "" if has_sessions else f"; several sessions need a column {data.session_column!r} (data.session_column)"
    _check_unique(path, table.index, who, hint)

    cells = table[data.path_column].tolist()
    kept = [i for i, cell in enumerate(cells) if cell.lower() not in ("", "n/a")]
    if len(kept) < len(cells):
        pathless = [name for name, cell in zip(who, cells) if cell.lower() in ("", "n/a")]
        message = f"{path}: column {data.path_column!r} is empty for {len(pathless)} rows ({_some(pathless)})"
        if not kept:
            raise InputError(f"{message}, so there is no scan")
        warnings.warn(f"{message}; they are left out", stacklevel=4)
        table = table.iloc[kept]
        subjects, sessions, who, cells = ([each[i] for i in kept] for each in (subjects, sessions, who, cells))
    root = str(root_of(data))
    # normpath and not realpath: DataLad keeps files behind links, whose targets have no proper name
    files = [os.path.normpath(os.path.join(root, cell)) for cell in cells]
    _check_unique(path, table.index, files, "; one file cannot be two scans")
    below = root.rstrip(os.sep) + os.sep
    outside = [i for i, file in enumerate(files) if not file.startswith(below) and not _is_alias(file, root)]
    if outside:
        listed = _listed({f"line {table.index[i]}": shown(cells[i]) for i in outside[:_SHOWN]}, len(outside))
        raise InputError(
            f"{path}: {len(outside)} scans lie outside of {root}:\n{listed}\nset data.root (evaluate: --root) to the folder "
            "that holds all scans; relative paths start there"
        )

    def where(i: int, name: str) -> str:
        return f"{path.name} line {table.index[i]} ({who[i]}), column {columns[name]!r}"

    return _Scans(subjects, sessions, files, {name: table[column].tolist() for name, column in columns.items()}, where)


def _is_alias(file: str, root: str) -> bool:
    """Whether a path lies below the root under another name of it."""
    return os.path.realpath(file).startswith(os.path.realpath(root) + os.sep)


def _parse(scans: _Scans, covariates: Sequence[Covariate]) -> dict[str, list[Value]]:
    """Values of every covariate; all unreadable cells end up in one error, all numbers beyond range in one warning."""
    values, bad, beyond = {}, {}, {}
    for covariate in covariates:
        values[covariate.name] = parsed = []
        unlimited, limits = replace(covariate, range=None), covariate.range
        for i, cell in enumerate(scans.cells[covariate.name]):
            value = None
            try:
                value = unlimited.parse(cell)
            except InputError as error:
                bad[covariate.name, i] = str(error).removeprefix(f"{covariate.name}: ")
            if limits and value is not None and not limits[0] <= value <= limits[1]:
                beyond[covariate.name, i] = f"{value:g} is not within {limits[0]:g} to {limits[1]:g} {covariate.unit}".rstrip()
                value = None
            parsed.append(value)

    def listed(problems: Mapping[tuple[str, int], str]) -> str:
        return _listed(
            {scans.where(i, name): what for (name, i), what in itertools.islice(problems.items(), _SHOWN)}, len(problems)
        )

    if bad:
        raise InputError(
            f"{len(bad)} cells cannot be used:\n{listed(bad)}\ncorrect them, or leave them empty for a missing value"
        )
    if beyond:
        warnings.warn(f"{len(beyond)} cells are out of range and count as missing:\n{listed(beyond)}", stacklevel=3)
    return values


def _check_column(path: Path, table: pd.DataFrame, column: str, purpose: str) -> None:
    if column not in table:
        names = {name.lower(): name for name in table.columns if len(name) < 100}
        close = difflib.get_close_matches(column.lower()[:100], names, n=1, cutoff=0.5)
        hint = f"did you mean {names[close[0]]!r}? " if close else ""
        columns = _some((shown(name)[1:-1] for name in table.columns), 30)
        raise InputError(f"{path} has no column {column!r} ({purpose}); {hint}Its columns: {columns}")


def _check_unique(path: Path, lines: Sequence[int], names: Sequence[str], hint: str = "") -> None:
    """Raise InputError unless every name, of those on these lines, stands on one line only."""
    if len(set(names)) == len(names):
        return
    at: dict[str, list[int]] = {}
    for line, name in zip(lines, names):
        at.setdefault(name, []).append(line)
    twice = [f"{shown(name)[1:-1]} on lines {_some(map(str, found))}" for name, found in at.items() if len(found) > 1]
    raise InputError(f"{path} has {len(twice)} duplicates: {_some(twice)}; keep one row each{hint}")


def _label(value: str) -> str:
    """The bare label: "01" for "sub-01" as for "01"."""
    for prefix in ("sub-", "ses-"):
        value = value.removeprefix(prefix)
    return "" if value.lower() == "n/a" else value


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _listed(problems: Mapping[str, str], count: int | None = None) -> str:
    """The first _SHOWN problems, a line each, and how many more of `count` (default: of these) there are."""
    count = len(problems) if count is None else count
    lines = [f"  {where}: {what}" for where, what in itertools.islice(problems.items(), _SHOWN)]
    return "\n".join(lines + ([f"  and {count - _SHOWN} more"] if count > _SHOWN else []))


def as_json(values: Mapping[str, Any]) -> str:
    """The content of a JSON file."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _as_tsv(frame: pd.DataFrame) -> str:
    frame = frame.map(lambda cell: f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell)
    return frame.to_csv(sep="\t", index=False, na_rep="n/a", lineterminator="\n")
