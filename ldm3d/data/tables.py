"""Tables read and written as text: every cell is a string, whose meaning is not known here."""

import collections
import csv
import re
import unicodedata
import warnings
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pandas as pd

from ldm3d.errors import InputError, nearest, shown, some
from ldm3d.files import write_atomic

MAX_TABLE_BYTES = 2**30
_WORKBOOKS = (".xlsx", ".xlsm")
# Names that a column has elsewhere, in small letters
_ALSO = {
    "sex": ("gender",),
    "gender": ("sex",),
    "age": ("age_at_scan", "age_years", "ageatscan"),
    "participant_id": ("subject_id",),
}
_FORMULA = re.compile(r"'*[=+\-@](?=.)")  # the beginning of a formula in a spreadsheet; a lone + or - is a value


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a TSV as BIDS has them (missing values are n/a); the write is atomic.

    Text that a spreadsheet might run as a formula gets an apostrophe in front, which `read_table` removes.
    """
    write_atomic(path, as_tsv(frame))


def read_table(path: Path) -> pd.DataFrame:
    """A CSV, TSV or XLSX as strings, "" where a cell is empty; the index is the line in the file.

    Tabs separate the columns of a .tsv; otherwise comma, semicolon or tab, whichever its first line has most of. Of a
    workbook, the first sheet is read. Columns with neither name nor cells, which spreadsheets may append, are dropped.

    Raises:
        InputError: missing, too large, empty, no text, or rows of different lengths; control characters; a workbook that
            cannot be read.
    """
    if not path.is_file():
        raise InputError(f"no table {path}")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes; at most {MAX_TABLE_BYTES:,}: keep the columns of interest"
        )
    columns: list[list[str]] = []
    lines = []
    try:
        for line, row in _rows_of_workbook(path) if path.suffix.lower() in _WORKBOOKS else _rows_of_text(path):
            if not "".join(row).strip():
                continue
            columns = columns or [[] for _ in row]
            if len(row) != len(columns):
                if any(row[len(columns) :]):
                    raise InputError(
                        f"{path} is no regular table: Expected {len(columns)} fields in line {line}, saw {len(row)} "
                        f"(line {line})"
                    )
                row = [*row, *[""] * len(columns)]
            for column, cell in zip(columns, row):  # by columns: a million lists would slow the garbage collector
                column.append(cell)
            lines.append(line)
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


def _rows_of_text(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of a CSV or TSV."""
    try:
        # Excel starts CSV files with a byte order mark. Not by pandas, which takes a millisecond for each column
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline(2**16)
            file.seek(0)
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else max(",;\t", key=head.count))
            for row in reader:
                yield reader.line_num, row
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; save it as CSV (UTF-8)") from None
    except csv.Error as error:
        raise InputError(f"{path} is no regular table: {error} (line {reader.line_num})") from None


def _rows_of_workbook(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(row, cells) of the first sheet of an Excel workbook; formulas as the values that were saved with them."""
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(part.file_size for part in packed.infolist())
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as a workbook ({error}); save it anew as .xlsx, or as CSV") from None
    if size > MAX_TABLE_BYTES:
        raise InputError(f"{path} unpacks to {size:,} bytes; at most {MAX_TABLE_BYTES:,}: keep the columns of interest")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and extensions that say nothing of values
            frame = pd.read_excel(path, header=None, dtype=object, keep_default_na=False, na_filter=False)
    except MemoryError:
        raise
    except Exception as error:  # a broken workbook sets off whatever in the libraries that read it
        raise InputError(
            f"{path} cannot be read as a workbook ({' '.join(str(error).split())[:200]}); save it anew as .xlsx, or as CSV"
        ) from None
    for line, row in enumerate(frame.itertuples(index=False, name=None), 1):
        yield line, [_cell_text(cell) for cell in row]


def _cell_text(cell: object) -> str:
    """A cell of a workbook as text: 72 for 72.0, which is how a spreadsheet shows it; a date as 2024-05-31."""
    if isinstance(cell, float):
        return "" if cell != cell else f"{cell:.15g}"
    text = "" if cell is None else str(cell)
    return text.removesuffix(" 00:00:00")


def _clean(cells: Sequence[str], lines: Sequence[int], path: Path) -> list[str]:
    """A column's cells without blanks around them, nor the apostrophe that `write_table` puts before formulas."""
    cells = [cell.strip() for cell in cells]
    everything = "".join(cells)  # one look at all; single cells only if there is something to find
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


def check_column(path: Path, columns: Collection[str], column: str, purpose: str, way_out: str = "") -> None:
    """Raise InputError, with the nearest name, unless the table has the column; `purpose` is the setting that needs it."""
    if column not in columns:
        names = {name.lower(): name for name in columns if len(name) < 100}
        also = (*_ALSO.get(column, ()), *(name for name in names if name.startswith(f"{column.lower()}_")))
        close = next((name for name in also if name in names), None) or nearest(column.lower(), names, cutoff=0.5)
        hint = f"did you mean {names[close]!r}? " if close else ""
        listed = some((shown(name)[1:-1] for name in columns), 30)
        way_out = way_out or (f"name the right one with `{purpose}: COLUMN`" if purpose.startswith("data.") else "")
        raise InputError(
            f"{path} has no column {column!r} ({purpose}); {hint}{way_out}{'. ' if way_out else ''}Its columns: {listed}"
        )


def check_unique(path: Path, lines: Sequence[int], names: Sequence[str], hint: str = "") -> None:
    """Raise InputError unless the names on these lines are all different."""
    if len(set(names)) == len(names):
        return
    at: dict[str, list[int]] = {}
    for line, name in zip(lines, names):
        at.setdefault(name, []).append(line)
    twice = [f"{shown(name)[1:-1]} on lines {some(map(str, found))}" for name, found in at.items() if len(found) > 1]
    raise InputError(f"{path} has {len(twice)} duplicates: {some(twice)}; keep one row each{hint}")


def as_tsv(frame: pd.DataFrame) -> str:
    """The content of a TSV as `write_table` writes it."""
    frame = frame.map(lambda cell: f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell)
    return frame.to_csv(sep="\t", index=False, na_rep="n/a", lineterminator="\n")
