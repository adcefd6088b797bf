"""Which of a session's files is its scan: one of them, magnitude, in native space, unless `data.filter` asks for others.

BIDS names describe a file by entities, `acq-mprage` or `run-2` (`ldm3d.config.data.ENTITIES`). The choice does not depend on
the order of files:

1. `data.filter` keeps the files that it describes.
2. All scans are of one kind: magnitudes, in native space, without contrast agent; if no file is in native space (or none
   is without agent), of the kind that most sessions have. A session without a file of this kind has no scan.
3. Of the remaining files of a session, the first in the order of `_ORDER`.

Rules 2 and 3 decide entities that the filter does not mention; one with a list of values gives a scan for each value.
"""

import collections
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm3d.config.data import ENTITIES
from ldm3d.errors import InputError, some

# PyBIDS's names for these
_LONG = {"acq": "acquisition", "ce": "ceagent", "dir": "direction", "mod": "modality", "rec": "reconstruction"}
_LONG |= {"seg": "segmentation", "ses": "session", "stain": "staining", "trc": "tracer"}
# Names of native space as BIDS and pipelines have them
_NATIVE = ("", "individual", "orig", "T1w")
_PLAIN = {"part": ("", "mag"), "space": _NATIVE, "ce": ("",)}
_ONLY = {
    "part": "only magnitudes are used",
    "space": "only scans in native space are used",
    "ce": "only scans without contrast agent are used",
}
_RULES = {
    "desc": "a scan without desc goes first, then desc-preproc",
    "rec": "a scan without rec goes first",
    "res": "a scan without res goes first",
    "echo": "the first echo is used",
    "run": "the lowest run is used",
    "chunk": "the lowest chunk is used, which is a part of the image; join the chunks first",
}
_TWIN = "another file with the same entities"
_FIRST, _LAST = ("desc", "rec", "res"), ("echo", "run", "chunk")
_ORDER = (*_FIRST, *(e for e in ENTITIES if e not in {*_PLAIN, *_RULES, "ses"}), *_LAST)


@dataclass(frozen=True)
class Candidate:
    """A file that may be a session's scan; `entities` by their names in file names, as text ("run": "1")."""

    subject: str
    session: str
    path: str
    entities: Mapping[str, str]

    @classmethod
    def of(cls, path: str, entities: Mapping[str, Any]) -> "Candidate":
        """From a path and what PyBIDS reads off it."""
        found = {name: as_text(entities[_LONG.get(name, name)]) for name in ENTITIES if _LONG.get(name, name) in entities}
        return cls(str(entities["subject"]), str(entities.get("session", "")), path, found)

    def has(self, entity: str) -> str:
        """The entity as in the name, "run-1"; "no run" if it is not there."""
        return f"{entity}-{self.entities[entity]}" if entity in self.entities else f"no {entity}"


def choose_scans(candidates: Sequence[Candidate], wanted: Mapping[str, Any], suffix: str) -> list[Candidate]:
    """One file a session, in a fixed order; one warning tells which files are not used and how to select them.

    Args:
        candidates: the dataset's files of one suffix, at least one.
        wanted: `data.filter`.
        suffix: of the files, for messages.

    Raises:
        InputError: no file matches the filter.
    """
    asked = {entity: values_of(value) for entity, value in wanted.items()}
    kept = [c for c in candidates if all(c.entities.get(entity, "") in values for entity, values in asked.items())]
    if not kept:
        described = ", ".join(f"{entity}: {' or '.join(value or 'null' for value in asked[entity])}" for entity in asked)
        raise InputError(
            f"data.filter ({described}) leaves none of {len(candidates)} {suffix} files; they have {_inventory(candidates)}"
        )
    sessions = {(c.subject, c.session) for c in kept}
    why: dict[str, str] = {}  # path -> reason why it is not used
    for entity in (entity for entity in _PLAIN if entity not in asked):
        kept = _of_one_kind(kept, entity, why)
    if not kept:
        raise InputError(
            f"none of {len(candidates)} {suffix} files is a magnitude image; they have {_inventory(candidates)}. "
            "To use others all the same, set data.filter, such as {part: phase}"
        )
    order = _ranking(kept)
    several = [entity for entity, values in asked.items() if len(values) > 1]

    def scan(c: Candidate) -> tuple:
        return c.subject, c.session, *(c.entities.get(entity, "") for entity in several)

    chosen = []
    for _, group in itertools.groupby(sorted(kept, key=lambda c: (scan(c), order(c))), key=scan):
        first, *others = group
        chosen.append(first)
        why |= {other.path: _difference(first, other) for other in others}
    if why:
        scanless = sorted(sessions - {(c.subject, c.session) for c in chosen})
        warnings.warn(_not_used([c for c in candidates if c.path in why], why, scanless, suffix), stacklevel=5)
    return chosen


def _of_one_kind(candidates: Sequence[Candidate], entity: str, why: dict[str, str]) -> list[Candidate]:
    """Candidates without an entity, or, if all have it, with its most common value; `why` gets the reasons for the others."""
    values, reason = _PLAIN[entity], _ONLY[entity]
    if entity != "part" and candidates and not any(c.entities.get(entity, "") in values for c in candidates):
        values = (_by_frequency(candidates, entity)[0],)
        reason = f"most sessions have {entity}-{values[0]}, and only that is used"
    kept = [c for c in candidates if c.entities.get(entity, "") in values]
    why |= {c.path: f"{c.has(entity)}: {reason}" for c in candidates if c.entities.get(entity, "") not in values}
    return kept


def _by_frequency(candidates: Sequence[Candidate], entity: str) -> list[str]:
    """Values of an entity ("" for without), the most common first; equally common ones by number or name, "" first."""
    sessions = {(c.subject, c.session, c.entities.get(entity, "")) for c in candidates}
    count = collections.Counter(value for _, _, value in sessions)
    return sorted(count, key=lambda value: (-count[value], _natural(value)))


def _ranking(candidates: Sequence[Candidate]) -> Any:
    """Key by which the candidates of a session are sorted, the one to use first."""
    common = {e: {v: i for i, v in enumerate(_by_frequency(candidates, e))} for e in _ORDER if e not in _RULES}

    def key(c: Candidate) -> tuple:
        values = [(e, c.entities.get(e, "")) for e in _ORDER]
        return *(common[e][v] if e in common else (v not in ("", "preproc"), _natural(v)) for e, v in values), c.path

    return key


def _difference(first: Candidate, other: Candidate) -> str:
    """Why the first is used and not the other."""
    for entity in _ORDER:
        if first.entities.get(entity) != other.entities.get(entity):
            rule = _RULES.get(entity, f"the {entity} that most sessions have goes first, of equals the first by name")
            return f"{other.has(entity)}: {rule}"
    return f"{_TWIN}: the first by path is used"


def _not_used(files: Sequence[Candidate], why: Mapping[str, str], scanless: Sequence[tuple], suffix: str) -> str:
    """The warning: how many files of which kind are not used, why, and how to select them."""
    lines = [f"  {reason} ({count} files)" for reason, count in collections.Counter(why.values()).most_common(5)]
    if scanless:
        names = some(f"sub-{subject}" + (f" ses-{session}" if session else "") for subject, session in scanless)
        lines.append(f"  {len(scanless)} sessions have no other scan and are left out: {names}")
    example = next((file for file in files if not why[file.path].startswith(_TWIN)), files[0])
    entity, _, value = why[example.path].partition(":")[0].removeprefix("no ").partition("-")
    way = (
        f"set data.filter, such as {{{entity}: {value or 'null'}}}; null asks for files without an entity, and a list for a "
        "scan of each value"
    )
    if why[example.path].startswith(_TWIN):
        way = "name these in data.exclude"
    return (
        f"{len(files)} {suffix} files are left aside, because each session gives one scan:\n"
        + "\n".join(lines)
        + f"\n  such as {example.path}\nto use others, {way}"
    )


def _inventory(candidates: Sequence[Candidate]) -> str:
    """The values of every entity in the names of the files."""
    found = []
    for entity in ENTITIES:
        values = _by_frequency(candidates, entity)
        if values != [""]:
            found.append(f"{entity}: {some(value or 'null' for value in values)}")
    return "; ".join(found) or "no entity but their subject"


def values_of(value: Any) -> tuple[str, ...]:
    """The values that a filter allows for one entity, "" for without."""
    return tuple("" if each is None else as_text(each) for each in (value if isinstance(value, list | tuple) else (value,)))


def as_text(value: Any) -> str:
    """An entity's value; leading zeros of a number do not count."""
    text = str(value)
    return str(int(text)) if text.isdecimal() else text


def _natural(value: str) -> tuple[int, int, str]:
    """Nothing, numbers in their order, other text."""
    return (0, 0, "") if not value else (1, int(value), "") if value.isdecimal() else (2, 0, value)
