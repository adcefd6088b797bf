"""Which scans `data.exclude` leaves out: by their subjects, by their paths, or by a column of the table."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ldm3d.data.layouts import label_of
from ldm3d.data.rows import matched
from ldm3d.errors import SHOWN, InputError, itemised, nearest, shown, some

COLUMN = "data.exclude"  # stands for the column beside those of covariates, none of which can have this name

_OUT = {"exclude", "excluded", "fail", "failed", "reject", "rejected", "bad"}
_IN = {"include", "included", "pass", "passed", "accept", "accepted", "good", "ok"}
_YES, _NO = {"1", "1.0", "true", "yes", "y", "x"}, {"0", "0.0", "false", "no", "n"}  # in a column of who is left out
_OF_WHO_STAYS = re.compile(r"(^|[^a-z])(includ|keep|kept|pass|usable|use|used|good|ok|valid|accept)", re.IGNORECASE)


def named(exclude: Sequence[str], subjects: Sequence[str], paths: Sequence[str], root: Path) -> list[bool]:
    """Whether each scan is left out by a list.

    Args:
        exclude: subjects, with "sub-" or without it; and paths of scans, or of folders that hold them, absolute or from `root`
            on.
        subjects, paths: of every scan; paths are absolute.
        root: of the dataset.

    Raises:
        InputError: an entry that names no scan. A misspelt one would leave in what was to be left out.
    """
    known = matched({label_of(entry) for entry in exclude}, set(subjects))
    labels = {known[label_of(entry)] for entry in exclude if label_of(entry) in known}
    others = [entry for entry in exclude if label_of(entry) not in known]
    folders = {os.path.normpath(os.path.join(root, entry)) for entry in others}
    # Every scan's path and the folders above it; a comparison of each entry with each scan would take minutes for many
    above = [{path, *map(str, Path(path).parents)} & folders for path in paths]
    found = set().union(*above)
    if unknown := [entry for entry in others if os.path.normpath(os.path.join(root, entry)) not in found]:
        names = {*subjects, *(os.path.relpath(path, root) for path in paths)}
        close = nearest(label_of(unknown[0]), names)
        hint = f"; did you mean {close!r}?" if close else "."
        raise InputError(
            f"data.exclude: {some(map(shown, unknown))}: neither a subject nor the path of a scan in {root}{hint} Correct it, "
            "or drop it from the list"
        )
    return [subject in labels or bool(folder) for subject, folder in zip(subjects, above)]


def marked(cells: Sequence[str], column: str, where: Callable[[int], str]) -> list[bool]:
    """Whether each scan is left out by its cell in a column; an empty one leaves it in.

    Args:
        cells: one a scan: exclude, fail, reject or bad, or their opposites; 1, true, yes or x, or 0, false, no.
        column: its name.
        where: number of a scan -> where its cell stands, for messages.

    Raises:
        InputError: other words; or 1 and 0 in a column that by its name says who stays.
    """
    words = [cell.lower() for cell in cells]
    unknown = {i: word for i, word in enumerate(words) if word not in {*_OUT, *_IN, *_YES, *_NO, "", "n/a"}}
    if unknown:
        listed = itemised({where(i): shown(cells[i]) for i in list(unknown)[:SHOWN]}, len(unknown))
        raise InputError(
            f"data.exclude: column {column!r} does not say of {len(unknown)} scans whether they are left out:\n{listed}\n"
            "write exclude or include there, or 1 or 0; or list subjects or paths: `exclude: [...]`"
        )
    if _OF_WHO_STAYS.search(column) and {*words} & (_YES | _NO):
        raise InputError(
            f"data.exclude: column {column!r} seems to say who stays, and data.exclude asks who is left out. Write exclude or "
            "include in its cells, or name a column where 1 means left out"
        )
    return [word in _OUT | _YES for word in words]
