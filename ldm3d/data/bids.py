"""The scans of a BIDS dataset, or of any CSV or TSV, with their subjects, sessions and covariates."""

import functools
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ldm3d.config.data import CovariateConfig, DataConfig
from ldm3d.covariates import as_name
from ldm3d.data import exclusion
from ldm3d.data.cells import Where, read_cells, warn_of_constant_ages
from ldm3d.data.from_dicom import holds_dicom
from ldm3d.data.inside import check_inside, dataset_of, root_of, tables_root_of
from ldm3d.data.joined import read_joined
from ldm3d.data.layouts import label_of
from ldm3d.data.participants import cells_of, look_up, purpose_of, way_out_of
from ldm3d.data.people import split_columns
from ldm3d.data.selection import Candidate, choose_scans
from ldm3d.data.tables import check_column, check_unique, read_table
from ldm3d.errors import SHOWN, InputError, itemised, shown, some

# Instead of layout files in the dataset, from which PyBIDS would take patterns of file names
_NO_LAYOUT_FILE = ".no-such-file"
IMAGES = [".nii", ".nii.gz"]


@dataclass(frozen=True)
class _Scans:
    """Scans and the cells of their covariates, not yet read; columns of equal length, for tables of a million rows."""

    subject: Sequence[str]
    session: Sequence[str]
    path: Sequence[str]
    cells: Mapping[str, Sequence[str]]  # by the covariate's name
    where: Where


def read_scans(data: DataConfig, covariates: Sequence[CovariateConfig]) -> pd.DataFrame:
    """Every scan with its covariates.

    BIDS: scans are files of `data.suffix`, one a session (`ldm3d.data.selection`), of the dataset, or of `data.derivatives`
    instead. Their covariates come from participants.tsv, a row a subject or a session, and from sub-XX/sub-XX_sessions.tsv
    where that has the column too (an age differs between sessions). Table: one row a scan. Identifiers may have the prefixes
    "sub-" and "ses-" or not, and may have lost leading zeros. 89+, 35-40 and 26,9 are read as 89, 37.5 and 26.9, and a
    number beyond its covariate's range counts as missing, with a warning. Scans that `data.exclude` names are left out,
    whatever their cells are.

    Returns:
        One row a scan in the order of (subject, session, path): subject and session (labels without prefix, session ""
        if there is none), path (absolute), a column for every covariate: float with NaN, or category with None; and the cells
        of `split_columns`, as they are.

    Raises:
        InputError: dataset, table, column or every scan missing; duplicate rows; cells that hold no valid value; numbers
            that look like codes of a missing value (-9999), unless the config calls them values or missing; paths that lead
            out of `data.root` (by default the dataset, or the table's folder), links followed; an unclear `data.exclude`.
    """
    extra = split_columns(data, covariates)
    columns = {c.name: c.column or c.name for c in covariates} | extra
    if isinstance(data.exclude, str):
        columns[exclusion.COLUMN] = data.exclude
    units = dict.fromkeys(columns, "") | {c.name: c.unit for c in covariates}
    scans = (_scans_of_bids if data.bids else _scans_of_table)(data, columns, units)
    if data.exclude:
        scans = _without_excluded(data, scans)
    values = read_cells(scans.cells, covariates, data.missing, scans.where)
    warn_of_constant_ages(scans.subject, scans.session, values, covariates)
    keys = list(zip(scans.subject, scans.session, scans.path))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    frame = pd.DataFrame([keys[i] for i in order], columns=["subject", "session", "path"])
    for covariate in covariates:
        kind = float if covariate.kind == "continuous" else object
        frame[covariate.name] = pd.Series([values[covariate.name][i] for i in order], dtype=kind)
    for name in extra:
        frame[name] = pd.Series([scans.cells[name][i] for i in order], dtype=object)
    return frame


def read_columns(data: DataConfig, scans: pd.DataFrame, wanted: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Cells, as text, of columns that are no covariates and need not be there.

    Args:
        data: what `read_scans` has read without an error.
        scans: its result.
        wanted: names that the header of the column may have, in the form of `as_name`, the first that is there.

    Returns:
        By the key of `wanted` a cell for each scan, "" for none; without columns that no table has.

    Raises:
        InputError: a table cannot be used, which only shows here where no covariate is read from it.
    """
    path = data.table or data.participants or data.bids / "participants.tsv"
    if not (data.table or data.participants):
        check_inside(path, tables_root_of(data))
    files = [*zip(scans["subject"], scans["session"], scans["path"])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said already, when scans were read
        header = list(read_table(path)) if path.is_file() else []
        header += [column for each in read_joined(data, files) for column in each.columns]
        found = {key: [c for name in names for c in header if as_name(c) == name] for key, names in wanted.items()}
        columns = {key: names[0] for key, names in found.items() if names}
        if not columns:
            return {}
        units = dict.fromkeys(columns, "")
        if data.bids:
            files, cells, _ = cells_of(data, files, columns, units)
            paths = [path for *_, path in files]
        else:
            table = _scans_of_table(data, columns, units)
            paths, cells = table.path, table.cells
    row = {path: i for i, path in enumerate(paths)}
    return {key: [cells[key][row[path]] if path in row else "" for path in scans["path"]] for key in columns}


def _without_excluded(data: DataConfig, scans: _Scans) -> _Scans:
    """The scans that `data.exclude` leaves in; one message says how many it leaves out."""
    if isinstance(data.exclude, str):
        where = functools.partial(scans.where, name=exclusion.COLUMN)
        out = exclusion.marked(scans.cells[exclusion.COLUMN], data.exclude, where)
    else:
        out = exclusion.named(data.exclude, scans.subject, scans.path, root_of(data))
    kept = [i for i, is_out in enumerate(out) if not is_out]
    names = some(f"sub-{s}" + (f" ses-{v}" if v else "") for s, v, is_out in zip(scans.subject, scans.session, out) if is_out)
    if not kept:
        raise InputError(f"data.exclude leaves out all {len(out)} scans ({names}); leave some in")
    if len(kept) < len(out):
        warnings.warn(f"data.exclude leaves out {len(out) - len(kept)} of {len(out)} scans ({names})", stacklevel=3)
    subject, session, path = ([each[i] for i in kept] for each in (scans.subject, scans.session, scans.path))
    cells = {name: [each[i] for i in kept] for name, each in scans.cells.items() if name != exclusion.COLUMN}
    return _Scans(subject, session, path, cells, lambda i, name: scans.where(kept[i], name))


def _scans_of_bids(data: DataConfig, columns: Mapping[str, str], units: Mapping[str, str]) -> _Scans:
    files = _find_files(data)
    if not columns:
        return _Scans(*map(list, zip(*files)), {}, lambda i, name: files[i][2])

    files, cells, locations = cells_of(data, files, columns, units)

    def where(i: int, name: str) -> str:
        return f"{locations[name][i]} (sub-{files[i][0]}), column {columns[name]!r}"

    return _Scans(*map(list, zip(*files)), cells, where)


def _check_folders(dataset: Path, root: Path) -> None:
    """Raise InputError for a link to a folder outside of the root, or to one that holds the link.

    Files are checked when they are opened.
    """
    for folder, names, _ in os.walk(dataset):
        names[:] = [name for name in names if not name.startswith(".")]
        for path in (Path(folder, name) for name in names):
            if path.is_symlink():
                check_inside(path, root)
                if path.parent.resolve().is_relative_to(path.resolve()):
                    raise InputError(f"{path} links to a folder that holds it; remove the link")


def _find_files(data: DataConfig) -> list[tuple[str, str, str]]:
    """(subject, session, path) of every scan of a BIDS dataset, or of its derivatives; nothing outside of its root is read."""
    dataset, root, suffix = dataset_of(data), root_of(data), data.suffix
    setting = "data.derivatives" if data.derivatives else "data.bids"
    if not dataset.is_dir():
        raise InputError(f"no folder {dataset} ({setting})")
    _check_folders(dataset, root)
    check_inside(dataset / "dataset_description.json", root)
    logging.getLogger("bids").setLevel(logging.ERROR)
    from bids import BIDSLayout, BIDSLayoutIndexer  # takes half a second, which a table does not need

    # Without metadata, which is not needed: 2 s instead of 6 s for 1,000 subjects with 2 sessions
    indexer = BIDSLayoutIndexer(validate=False, index_metadata=False, config_filename=_NO_LAYOUT_FILE)
    try:
        layout = BIDSLayout(dataset, validate=False, config=["bids", "derivatives"], indexer=indexer)
        found = layout.get(suffix=suffix, extension=IMAGES)
        others = [] if any("subject" in file.get_entities() for file in found) else layout.get(extension=IMAGES)
    except Exception as error:  # a broken dataset can raise anything in PyBIDS, even SQL errors
        raise InputError(f"{dataset} cannot be read as a BIDS dataset: {' '.join(str(error).split())}") from error
    named = [(file.path, entities) for file in found if "subject" in (entities := file.get_entities())]
    if not named:
        message = f"no scan found in {dataset}: looked for sub-*/[ses-*/]anat/sub-*_{suffix}.nii or .nii.gz; "
        if file := holds_dicom(dataset):
            raise InputError(f"{message}there is DICOM ({file}): run `ldm3d import-dicom {dataset} --out DATASET` first")
        images = [(file.path, file.get_entities()) for file in others]
        raise InputError(f"{message}check {setting} and data.suffix{_what_there_is(images, suffix)}")
    chosen = choose_scans([Candidate.of(*each) for each in named], data.filter, suffix)
    return [(scan.subject, scan.session, scan.path) for scan in chosen]


def _what_there_is(images: Sequence[tuple[str, Mapping[str, Any]]], suffix: str) -> str:
    """Suffixes of the images of subjects, and images of the suffix that are of no subject, in words; "" for neither."""
    suffixes = sorted({str(entities["suffix"]) for _, entities in images if {"subject", "suffix"} <= entities.keys()})
    said = f"; the images of subjects there have the suffixes {some(suffixes, 10)}" if suffixes else ""
    nobodys = [path for path, entities in images if entities.get("suffix") == suffix and "subject" not in entities]
    if nobodys:
        said += f"; {some(nobodys, 1)} is of no subject (sub-): name such files in a table (data.table) to use them"
    return said


def _scans_of_table(data: DataConfig, columns: Mapping[str, str], units: Mapping[str, str]) -> _Scans:
    path = Path(os.path.abspath(data.table))
    table = read_table(path)
    check_column(path, table, data.subject_column, "data.subject_column")
    check_column(path, table, data.path_column, "data.path_column")
    if not data.covariates_tables:
        for name, column in columns.items():
            check_column(path, table, column, purpose_of(name), way_out_of(name))
    if "session_column" in data.model_fields_set:
        check_column(path, table, data.session_column, "data.session_column")
    has_sessions = data.session_column in table
    if table.empty:
        raise InputError(f"{path} has a header but no rows")

    subjects = [label_of(cell) for cell in table[data.subject_column]]
    sessions = [label_of(cell) for cell in table[data.session_column]] if has_sessions else [""] * len(table)
    if not all(subjects):
        line = table.index[subjects.index("")]
        raise InputError(f"{path} line {line}: {data.subject_column!r} is empty; every scan needs its subject")
    who = [f"sub-{subject}" + (f" ses-{session}" if session else "") for subject, session in zip(subjects, sessions)]
    hint = "" if has_sessions else f"; several sessions need a column {data.session_column!r} (data.session_column)"
    check_unique(path, table.index, who, hint)

    cells = table[data.path_column].tolist()
    kept = [i for i, cell in enumerate(cells) if cell.lower() not in ("", "n/a")]
    if len(kept) < len(cells):
        pathless = [name for name, cell in zip(who, cells) if cell.lower() in ("", "n/a")]
        message = f"{path}: column {data.path_column!r} is empty for {len(pathless)} rows ({some(pathless)})"
        if not kept:
            raise InputError(f"{message}, so there is no scan")
        warnings.warn(f"{message}; they are left out", stacklevel=4)
        table = table.iloc[kept]
        subjects, sessions, who, cells = ([each[i] for i in kept] for each in (subjects, sessions, who, cells))
    root = str(root_of(data))
    # normpath and not realpath: DataLad keeps files behind links, whose targets have no proper name
    files = [os.path.normpath(os.path.join(root, cell)) for cell in cells]
    check_unique(path, table.index, files, "; one file cannot be two scans")
    below = root.rstrip(os.sep) + os.sep
    outside = [i for i, file in enumerate(files) if not file.startswith(below) and not _is_alias(file, root)]
    if outside:
        listed = itemised({f"line {table.index[i]}": shown(cells[i]) for i in outside[:SHOWN]}, len(outside))
        raise InputError(
            f"{path}: {len(outside)} scans lie outside of {root}:\n{listed}\nset data.root (evaluate: --root) to the folder "
            "that holds all scans; relative paths start there"
        )

    given = {name: table[column].tolist() for name, column in columns.items() if column in table}
    lacking = {name: column for name, column in columns.items() if name not in given}
    locations: dict[str, list[str]] = {}
    if data.covariates_tables:
        scans = list(zip(subjects, sessions, files))
        further = read_joined(data, scans)
        for name, column in lacking.items():
            if not any(column in each.columns for each in further):
                purpose = f"{purpose_of(name)}; nor has {some(each.path.name for each in further)}"
                check_column(path, table, column, purpose, way_out_of(name))
        joined, locations = look_up(scans, lacking, units, {}, further)
        given |= joined

    def where(i: int, name: str) -> str:
        line = locations[name][i] if name in locations else f"{path.name} line {table.index[i]}"
        return f"{line} ({who[i]}), column {columns[name]!r}"

    return _Scans(subjects, sessions, files, given, where)


def _is_alias(file: str, root: str) -> bool:
    """Whether a path lies below the root under another name of it."""
    return os.path.realpath(file).startswith(os.path.realpath(root) + os.sep)
