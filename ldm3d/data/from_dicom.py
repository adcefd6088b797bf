"""A folder of DICOM files as a BIDS dataset: dcm2niix (Li et al. 2016) converts, one series of each session is taken.

Names, dates of birth and all else that DICOM files say of a person stay out, except age and sex.
"""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from ldm3d.data.nifti import read_volume
from ldm3d.data.tables import write_table
from ldm3d.errors import InputError, some
from ldm3d.files import write_atomic

PROGRAM, TIMEOUT_S = "dcm2niix", 3600
T1W = "t1|mprage|mp-rage|spgr|bravo|tfe|vibe"  # in usual descriptions of T1w series
_LEAST_SLICES = 8  # of a scan; localisers have fewer
_MAGIC_AT, _MAGIC = 128, b"DICM"


@dataclass(frozen=True)
class Series:
    """One file that dcm2niix wrote: its description, and what its sidecar says."""

    path: Path
    description: str
    told: dict[str, Any]


def holds_dicom(folder: Path, most: int = 200) -> Path | None:
    """The first DICOM file among the first files below a folder; None if there is none."""
    for i, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
        if i == most:
            return None
        with open(path, "rb") as file:
            file.seek(_MAGIC_AT)
            if file.read(4) == _MAGIC:
                return path
    return None


def convert(folder: Path, out: Path, series: str = T1W, suffix: str = "T1w", sessions: bool = False) -> pd.DataFrame:
    """Convert DICOM files into a BIDS dataset; a person whose files cannot be converted is named and left out.

    Args:
        folder: with a folder for each person and, with `sessions`, one for each session in it.
        out: dataset to write, empty or absent.
        series: regular expression that the description of the wanted series holds, in any case.
        suffix: BIDS suffix of the scans.
        sessions: whether the folders of people hold one for each session.

    Returns:
        A row a scan: participant_id, session_id ("" without sessions), age in years and sex as the files say, path.

    Raises:
        InputError: dcm2niix is not installed, no such folder, `out` is not empty, no person could be converted.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise InputError(
            f"there is no program {PROGRAM} on PATH; install it (apt-get install dcm2niix, conda install -c conda-forge "
            f"dcm2niix, or pip install dcm2niix) and run this command again. To convert by hand: {PROGRAM} -z y -f %s_%d "
            f"-o OUT {folder}"
        )
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; choose another folder")
    people = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    work = [(person, visit) for person in people for visit in (_visits(person) if sessions else [person])]
    if not work:
        raise InputError(f"{folder} has no folders; put the DICOM files of each person into one of their own")
    labels = {path: re.sub(r"[^A-Za-z0-9]", "", path.name) for path in (*people, *(visit for _, visit in work))}
    if twice := {label for label in labels.values() if [labels[person] for person in people].count(label) > 1}:
        raise InputError(
            f"several folders of {folder} become sub-{some(sorted(twice))}; rename them (letters and digits count)"
        )
    rows, failed = [], []
    for person, visit in work:
        session = labels[visit] if sessions else ""
        try:
            rows.append(_one(program, visit, out, labels[person], session, series, suffix))
        except InputError as error:
            failed.append(f"  {visit.relative_to(folder)}: {error}")
    if failed:
        message = f"{len(failed)} of {len(work)} folders were not converted:\n" + "\n".join(failed[:20])
        if not rows:
            raise InputError(message)
        print(message)
    table = pd.DataFrame(rows)
    _write_dataset(out, table, sessions)
    return table


def _visits(person: Path) -> Iterable[Path]:
    return sorted(path for path in person.iterdir() if path.is_dir() and not path.name.startswith("."))


def _one(program: str, visit: Path, out: Path, subject: str, session: str, pattern: str, suffix: str) -> dict[str, Any]:
    """Convert the files of one session and keep the wanted series."""
    with tempfile.TemporaryDirectory(prefix="ldm3d-dicom-") as name:
        made = _convert(program, visit, Path(name))
        wanted = [each for each in made if re.search(pattern, each.description, re.IGNORECASE)]
        if not wanted:
            raise InputError(f"no series is called {pattern!r}; there are {_inventory(made)}. Choose one with --series")
        scans = [each for each in wanted if _is_scan(each.path)]
        if not scans:
            raise InputError(f"no volume in {_inventory(wanted)}")
        if len({each.description for each in scans}) > 1:
            print(f"sub-{subject}: {scans[0].description!r} is taken of {_inventory(scans)}; choose others with --series")
        chosen = scans[0]
        stem = f"sub-{subject}" + (f"_ses-{session}" if session else "")
        folder = out / f"sub-{subject}" / (f"ses-{session}" if session else "") / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stem}_{suffix}.nii.gz"
        shutil.copyfile(chosen.path, path)
    return {
        "participant_id": f"sub-{subject}",
        "session_id": f"ses-{session}" if session else "",
        "age": _age(chosen.told),
        "sex": str(chosen.told.get("PatientSex", "")) or None,
        "path": str(path),
    }


def _convert(program: str, visit: Path, folder: Path) -> list[Series]:
    """Everything that dcm2niix makes of a folder, by its series' numbers."""
    words = [program, "-z", "y", "-b", "y", "-ba", "n", "-f", "%s_%d", "-o", str(folder), str(visit)]
    try:
        done = subprocess.run(words, capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{PROGRAM} did not run ({error})") from None
    made = []
    for path in folder.glob("*.nii.gz"):
        sidecar = path.with_name(path.name.removesuffix(".nii.gz") + ".json")
        try:
            told = json.loads(sidecar.read_text(encoding="utf-8", errors="replace"))
        except (FileNotFoundError, ValueError):
            told = {}
        made.append(Series(path, str(told.get("SeriesDescription") or told.get("ProtocolName") or path.name), told))
    if not made:
        lines = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()
        raise InputError(f"{PROGRAM} made nothing of it: {lines[-1] if lines else 'it said nothing'}")
    return sorted(made, key=lambda each: (each.told.get("SeriesNumber", 0), each.path.name))


def _is_scan(path: Path) -> bool:
    try:
        return min(read_volume(path)[0].shape[1:]) >= _LEAST_SLICES
    except InputError:
        return False


def _inventory(made: Sequence[Series]) -> str:
    return some(dict.fromkeys(repr(each.description) for each in made), 8)


def _age(told: dict[str, Any]) -> float | None:
    """Years at the scan, with one decimal."""
    born, scanned = (str(told.get(key, ""))[:10] for key in ("PatientBirthDate", "AcquisitionDateTime"))
    try:
        return round((date.fromisoformat(scanned) - date.fromisoformat(born)).days / 365.25, 1)
    except ValueError:
        pass
    if match := re.fullmatch(r"0*(\d+)Y?", str(told.get("PatientAge", ""))):
        return float(match[1])
    return None


def _write_dataset(out: Path, table: pd.DataFrame, sessions: bool) -> None:
    description = {"Name": out.resolve().name, "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    write_atomic(out / "dataset_description.json", json.dumps(description, indent=2) + "\n")
    columns = ["participant_id", *(["session_id"] if sessions else []), "age", "sex"]
    write_table(out / "participants.tsv", table[columns])
