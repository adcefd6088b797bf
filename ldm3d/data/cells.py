"""Cells of published tables as values of covariates: read as they are, read with a warning, missing, or refused.

There is one warning or error for all cells of a kind, which lists `SHOWN` of them.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ldm3d.config.data import CovariateConfig
from ldm3d.covariates import Covariate, Value
from ldm3d.data.outliers import implausible
from ldm3d.errors import SHOWN, InputError, itemised, shown, some
from ldm3d.notation import read_number

Where = Callable[[int, str], str]  # (number of the scan, name of the covariate) -> where the cell stands, for messages
_LENIENT = {"open-ended": "open-ended", "range": "ranges", "decimal comma": "with a decimal comma"}


class _Reading(NamedTuple):
    """The value of a cell, and what is wrong with it."""

    value: Value
    kind: str  # one of `Covariate.read`, "beyond" or "bad"
    problem: str = ""


def read_cells(
    cells: Mapping[str, Sequence[str]], covariates: Sequence[CovariateConfig], missing: Sequence[str] | None, where: Where
) -> dict[str, list[Value]]:
    """The values of every covariate.

    Args:
        cells: by the covariate's name, one a scan.
        covariates: what to read them as.
        missing: codes of a missing value, for covariates without their own (`data.missing`).
        where: locates a cell, for messages.

    Raises:
        InputError: cells that hold no valid value; numbers that look like codes for a missing one.
    """
    values: dict[str, list[Value]] = {}
    bad: dict[str, dict[int, _Reading]] = {}
    beyond: dict[tuple[str, int], str] = {}
    lenient, odd = [], []
    for config in covariates:
        column = cells[config.name]
        covariate, codes = config.covariate(), _Codes(config, missing)
        readings = {cell: _read(covariate, codes, cell) for cell in set(column)}  # a million cells are some thousand texts
        values[config.name] = [readings[cell].value for cell in column]
        if any(reading.problem for reading in readings.values()):
            at = {i: reading for i, cell in enumerate(column) if (reading := readings[cell]).problem}
            if failed := {i: reading for i, reading in at.items() if reading.kind == "bad"}:
                bad[config.name] = failed
            beyond |= {(config.name, i): reading.problem for i, reading in at.items() if reading.kind == "beyond"}
        if kinds := _count_kinds(column, readings):
            lenient.append(f"{config.name}: {kinds}")
        numbers = [value for value in values[config.name] if value is not None]
        if covariate.kind == "continuous" and config.missing != () and (found := implausible(numbers)):
            odd.append((config, _describe_odd(config.name, found, numbers, config.missing or missing or ())))
    _refuse(bad, [text for config, text in odd if config.missing is None], {c.name: c for c in covariates}, cells, where)
    if lenient:
        warnings.warn(
            "cells are read as the number that they stand for:\n" + "\n".join(f"  {x}" for x in lenient), stacklevel=4
        )
    if beyond:
        listed = _itemised(beyond, where)
        warnings.warn(f"{len(beyond)} cells are out of range and count as missing:\n{listed}", stacklevel=4)
    for text in [text for config, text in odd if config.missing]:
        warnings.warn(text, stacklevel=4)
    return values


class _Codes:
    """Words and numbers that mean a missing value of one covariate."""

    def __init__(self, config: CovariateConfig, missing: Sequence[str] | None):
        self.words = set(config.missing if config.missing is not None else missing or ())
        self.numbers = set()
        if config.kind == "categorical":  # a category of such a name stays a category
            self.words -= {word for category, aliases in config.categories.items() for word in (category, *aliases)}
            return
        for word in self.words:
            try:
                self.numbers.add(read_number(word)[0])
            except ValueError:
                continue  # a word such as "unknown"


def _read(covariate: Covariate, codes: _Codes, cell: str) -> _Reading:
    if cell in codes.words:
        return _Reading(None, "missing")
    try:
        value, kind = covariate.read(cell)
    except InputError as error:
        return _Reading(None, "bad", str(error).removeprefix(f"{covariate.name}: "))
    if value in codes.numbers:
        return _Reading(None, "missing")
    if covariate.range and value is not None and not covariate.range[0] <= value <= covariate.range[1]:
        low, high = covariate.range
        problem = f"{value:g} is not within {low:g} to {high:g} {covariate.unit}".rstrip()
        return _Reading(None, "beyond", problem)
    return _Reading(value, kind)


def _count_kinds(column: Sequence[str], readings: Mapping[str, _Reading]) -> str:
    """ "30 open-ended (89+ as 89), 10 ranges (35-40 as 37.5)"; empty if all numbers are plain."""
    examples = {reading.kind: (cell, reading.value) for cell, reading in readings.items() if reading.kind in _LENIENT}
    if not examples:
        return ""
    counts = Counter(readings[cell].kind for cell in column)
    return ", ".join(
        f"{counts[kind]} {words} ({examples[kind][0]} as {examples[kind][1]:g})"
        for kind, words in _LENIENT.items()
        if kind in examples
    )


def _describe_odd(name: str, found: Mapping[float, int], numbers: Sequence[float], missing: Sequence[str]) -> str:
    rest = [number for number in numbers if number not in found]
    codes = sorted(found, key=lambda number: -found[number])
    known = ", ".join((*missing, *(f"{code:g}" for code in codes[:SHOWN])))
    cells = some((f"{code:g} in {found[code]} cells" for code in codes), SHOWN)
    return (
        f"{name} is {cells}, while the other {len(rest)} values lie between {min(rest):g} and {max(rest):g}. Does that "
        f"stand for a missing value? Then give the covariate `missing: [{known}]`; if it is a value, `missing: []`"
    )


def _refuse(
    bad: Mapping[str, Mapping[int, _Reading]],
    odd: Sequence[str],
    covariates: Mapping[str, CovariateConfig],
    cells: Mapping[str, Sequence[str]],
    where: Where,
) -> None:
    """One InputError for all unreadable cells and all implausible numbers, with the ways out."""
    parts = []
    if problems := {(name, i): reading.problem for name, found in bad.items() for i, reading in found.items()}:
        parts.append(f"{len(problems)} cells cannot be used:\n{_itemised(problems, where)}")
        parts.append("correct them, leave them empty for a missing value, or list what stands for one: `missing: [...]`")
        for name, found in bad.items():
            if categories := covariates[name].categories:
                words = some((shown(word, 50) for word in dict.fromkeys(cells[name][i] for i in found)), SHOWN)
                form = ", ".join(f"{category}: [...]" for category in list(categories)[:SHOWN])
                parts.append(f"{name}: if {words} stand for categories, write which: `categories: {{{form}}}`")
    if parts or odd:
        raise InputError("\n".join((*parts, *odd)))


def _itemised(problems: Mapping[tuple[str, int], str], where: Where) -> str:
    first = list(problems.items())[:SHOWN]
    return itemised({where(i, name): what for (name, i), what in first}, len(problems))


def warn_of_constant_ages(
    subjects: Sequence[str],
    sessions: Sequence[str],
    values: Mapping[str, Sequence[Value]],
    covariates: Iterable[CovariateConfig],
) -> None:
    """Warn of subjects with the same age at all visits, which is most likely that of the first."""
    of_age = [config for config in covariates if _is_age(config)]
    if not of_age or len(set(sessions)) < 2:
        return
    visits: dict[str, dict[str, int]] = {}
    for i, (subject, session) in enumerate(zip(subjects, sessions)):
        visits.setdefault(subject, {}).setdefault(session, i)
    several = {subject: list(at.values()) for subject, at in visits.items() if len(at) > 1}
    for config in of_age:
        ages = {subject: [values[config.name][i] for i in at] for subject, at in several.items()}
        constant = [subject for subject, found in ages.items() if found[0] is not None and len(set(found)) == 1]
        if constant:
            who = some(f"sub-{subject}: {ages[subject][0]:g} at {len(ages[subject])} visits" for subject in constant)
            warnings.warn(
                f"{config.name} is the same at all visits of {len(constant)} of {len(several)} people with several ({who}); "
                "if the visits lie apart in time, give it for each: in sub-XX_sessions.tsv, or in a row a session",
                stacklevel=4,
            )


def _is_age(config: CovariateConfig) -> bool:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", f"{config.name} {config.column or ''}")
    return config.kind == "continuous" and "age" in (word.lower() for word in words)
