"""Tables that other programs and studies publish, recognised by their columns: whose rows they are, and in which units.

FreeSurfer's `aseg.stats`, `asegstats2table` and `aparcstats2table`; SynthSeg's `--vol`; ADNIMERGE; the tables of OASIS-1 to 3.
Volumes stay as they are, in mm3: `ldm3d.data.joined` converts them to the unit of their covariate.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ldm3d.errors import InputError
from ldm3d.notation import is_missing

MM3, ML = "mm3", "ml"
_IN_MM3, _IN_ML = re.compile(r"mm\^?(3|³)\W*$|mm_?cubed$", re.I), re.compile(r"(^|[\W_])(ml|cm\^?3|cc)\W*$", re.I)
# FreeSurfer's columns that are no volumes
_NO_VOLUMES = re.compile(r"to-eTIV|Holes|thickness|Thickness|meancurv|foldind|curvind|gauscurv|area|Area")
_FREESURFER = re.compile(r"Measure:\w+|[lr]h\.[\w.-]+\.(volume|thickness|area)")  # its first column, of names
_SYNTHSEG = {"subject", "left cerebral white matter", "left lateral ventricle"}
_FLUID = re.compile(r"ventricle|csf|total intracranial|subject|background", re.I)
_LATERAL = {
    "Left-Lateral-Ventricle": ("Left-Lateral-Ventricle", "Left-Inf-Lat-Vent", "Right-Lateral-Ventricle", "Right-Inf-Lat-Vent"),
    "left lateral ventricle": (
        *("left lateral ventricle", "left inferior lateral ventricle"),
        *("right lateral ventricle", "right inferior lateral ventricle"),
    ),
}


@dataclass
class Layout:
    """A table whose rows are known.

    Attributes:
        name: of the layout, for messages; "" if it is none of those that are known.
        subjects, sessions: of each row, all labels under which a dataset may have them, the likeliest first; ("",) for a
            row without a session.
        columns: cells by the column's name, and quantities that follow from several columns.
        units: of columns, where they are known: "mm3" or "ml".
    """

    name: str
    subjects: Sequence[tuple[str, ...]]
    sessions: Sequence[tuple[str, ...]]
    columns: dict[str, list[str]]
    units: dict[str, str] = field(default_factory=dict)


def recognise(frame: pd.DataFrame, subject_column: str, session_column: str) -> Layout | None:
    """The layout of a table; None if it is none of the known ones and has no `subject_column`."""
    columns = {name: frame[name].tolist() for name in frame}
    for fits, read in _LAYOUTS:
        if fits(columns):
            layout = read(columns)
            break
    else:
        if subject_column not in columns:
            return None
        sessions = columns.get(session_column, [""] * len(frame))
        layout = Layout("", *_by_name(columns[subject_column]), columns)
        if session_column in columns:
            layout.sessions = [(label_of(cell),) for cell in sessions]
    for name in columns:
        if name not in layout.units and (_IN_MM3.search(name) or _IN_ML.search(name)):
            layout.units[name] = MM3 if _IN_MM3.search(name) else ML
    return layout


def label_of(value: str) -> str:
    """The bare label: "01" for "sub-01" as for "01"."""
    for prefix in ("sub-", "ses-"):
        value = value.removeprefix(prefix)
    return "" if value.lower() == "n/a" else value


def _by_name(cells: Sequence[str]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Subjects and sessions of names such as "sub-01_ses-a_T1w", "sub-01/ses-a" or "sub-01_ses-a.long.base"."""
    subjects, sessions = [], []
    for cell in cells:
        name = re.sub(r"\.long\..*$", "", cell.strip().rstrip("/"))
        found = re.search(r"(?:^|/)sub-([A-Za-z0-9+]+)(?:[_/]ses-([A-Za-z0-9+]+))?", name)
        subject, session = found.groups(default="") if found else (label_of(name.rpartition("/")[2]), "")
        subjects.append((subject,))
        sessions.append((session,))
    return subjects, sessions


def _sum(columns: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[str]:
    """Sums of columns row by row; "" where one is missing or no number."""

    def added(cells: Sequence[str]) -> str:
        try:
            return "" if any(map(is_missing, cells)) else f"{sum(map(float, cells)):.10g}"
        except ValueError:
            return ""

    return [added(cells) for cells in zip(*(columns[name] for name in names))]


def _with_volumes(layout: Layout, brain: Sequence[str]) -> Layout:
    """With ldm3d's own two quantities: both lateral ventricles with their temporal horns; grey and white matter."""
    for first, names in _LATERAL.items():
        if first in layout.columns:
            given = [name for name in names if name in layout.columns]
            layout.columns.setdefault("ventricular_volume_ml", _sum(layout.columns, given))
            layout.units.setdefault("ventricular_volume_ml", MM3)
    if brain:
        layout.columns.setdefault("brain_volume_ml", _sum(layout.columns, brain))
        layout.units.setdefault("brain_volume_ml", MM3)
    return layout


def _freesurfer(columns: dict[str, list[str]]) -> Layout:
    first = next(iter(columns))
    units = {} if not first.endswith("volume") else {name: MM3 for name in columns if not _NO_VOLUMES.search(name)}
    units.pop(first, None)
    whole = [name for name in ("BrainSegVolNotVent", "BrainSegNotVent") if name in columns][:1]
    return _with_volumes(Layout("FreeSurfer", *_by_name(columns[first]), columns, units), whole)


def _synthseg(columns: dict[str, list[str]]) -> Layout:
    units = {name: MM3 for name in columns if name != "subject"}
    tissue = [name for name in columns if not _FLUID.search(name)]
    return _with_volumes(Layout("SynthSeg", *_by_name(columns["subject"]), columns, units), tissue)


def _adnimerge(columns: dict[str, list[str]]) -> Layout:
    """PTID 011_S_0002 is sub-ADNI011S0002 (Clinica) or sub-011S0002; VISCODE bl is ses-M000, ses-M00 or ses-bl."""
    bare = ["".join(re.findall("[A-Za-z0-9]", cell)) for cell in columns["PTID"]]
    subjects = [(f"ADNI{name}", name) for name in bare]
    sessions = []
    for code in columns["VISCODE"]:
        month = 0 if code.lower() == "bl" else int(code[1:]) if re.fullmatch("[mM][0-9]+", code) else None
        sessions.append((code,) if month is None else (f"M{month:03d}", f"M{month:02d}", f"m{month:02d}", code))
    names = ("Ventricles", "Hippocampus", "WholeBrain", "Entorhinal", "Fusiform", "MidTemp", "ICV")
    units = {name: MM3 for name in columns if name.removesuffix("_bl") in names}
    if {"AGE", "Years_bl"} <= set(columns):  # AGE is that of the first visit, in every row
        columns.setdefault("age", _sum(columns, ("AGE", "Years_bl")))
    if "PTGENDER" in columns:
        columns.setdefault("sex", columns["PTGENDER"])
    return Layout("ADNIMERGE", subjects, sessions, columns, units)


def _oasis(columns: dict[str, list[str]]) -> Layout:
    """OAS1_0001_MR1, OAS2_0001_MR2 and OAS30001_MR_d0129: the subject, and MR1 or d0129 as session.

    Subjects are sub-OAS10001, or sub-OASIS10001 as Clinica has them, whose sessions are ses-M000 (or M00) in OASIS-1.
    """
    ids = next(columns[name] for name in ("MRI ID", "MR ID", "ID", "OASIS_session_label", "OASISID") if name in columns)
    subjects, sessions = [], []
    for row, cell in enumerate(ids):
        found = re.match(r"OAS([123])_?([0-9]{4})(?:_\w*?(MR[0-9]+|d[0-9]+))?", cell)
        study, number, visit = found.groups(default="") if found else ("", cell, "")
        days = columns["days_to_visit"][row] if "days_to_visit" in columns else ""
        visit = visit or (f"d{int(float(days)):04d}" if re.fullmatch(r"[0-9]+(\.0+)?", days) else "")
        subjects.append((f"OAS{study}{number}", f"OASIS{study}{number}") if found else (cell,))
        sessions.append((visit, "M000", "M00") if study == "1" and visit == "MR1" else (visit,))
    for name, given in (("age", ("Age", "age at visit")), ("sex", ("M/F",))):
        for column in given:
            if column in columns:
                columns.setdefault(name, columns[column])
    units = {name: ML for name in columns if name == "eTIV"}  # in cm3
    return Layout("OASIS", subjects, sessions, columns, units)


_LAYOUTS: tuple[tuple[Callable[[Mapping], bool], Callable[[dict[str, list[str]]], Layout]], ...] = (
    (lambda c: bool(_FREESURFER.fullmatch(next(iter(c), ""))), _freesurfer),
    (lambda c: set(c) >= _SYNTHSEG, _synthseg),
    (lambda c: set(c) >= {"RID", "PTID", "VISCODE"}, _adnimerge),
    (lambda c: "OASISID" in c or "OASIS_session_label" in c or {"ID", "M/F"} <= set(c) or {"MRI ID", "M/F"} <= set(c), _oasis),
)


def read_stats(path: Path) -> tuple[str, dict[str, str]]:
    """Name of the subject and volumes in mm3 of one of FreeSurfer's `aseg.stats`, by the names of `asegstats2table`.

    Raises:
        InputError: it cannot be read, or holds no volumes.
    """
    found: dict[str, str] = {}
    subject = path.absolute().parents[1].name  # SUBJECT/stats/aseg.stats
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as FreeSurfer's stats ({error})") from None
    for line in lines:
        if line.startswith("# Measure "):
            parts = [part.strip() for part in line.removeprefix("# Measure ").split(",")]
            if len(parts) == 5 and parts[4] == "mm^3":
                found[parts[1]] = parts[3]
        elif line and not line.startswith("#"):
            cells = line.split()
            if len(cells) >= 5 and cells[0].isdecimal():
                found[cells[4]] = cells[3]
    if not found:
        raise InputError(f"{path} holds no volumes as FreeSurfer's aseg.stats has them")
    return subject, found
