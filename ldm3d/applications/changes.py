"""What an edit is asked for, from text to covariates: "age=72,sex=F", "age=+10", "age=50:90:5"."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ldm3d.covariates import CovariateSchema, Value
from ldm3d.errors import InputError, shown

MAX_TARGETS = 100  # of a trajectory
_NUMBER = r"\d+(?:\.\d+)?"
_RELATIVE = re.compile(rf"[+-]{_NUMBER}")
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER}):({_NUMBER})")


def parse_pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """["age=62,sex=F", "group=a"] -> {"age": "62", "sex": "F", "group": "a"}; commas within a value stay.

    Raises:
        InputError: a part without a name, or a name twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        for part in re.split(r",(?=\s*[A-Za-z][\w-]*\s*=)", text):
            name, separator, value = (each.strip() for each in part.partition("="))
            name = name.replace("-", "_")
            if not separator or not name or not value:
                raise InputError(f"{option} {shown(text)}: write NAME=VALUE,NAME=VALUE, such as {option} age=62,sex=F")
            if name in pairs:
                raise InputError(f"{option}: {shown(name)} is there twice; keep one")
            pairs[name] = value
    return pairs


def targets_of(schema: CovariateSchema, source: Mapping[str, Value], to: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The covariates that an edit aims at: those of the scan with the changes, one for each point of a trajectory.

    Args:
        schema: of the model.
        source: the scan's own, None where not known.
        to: changes: a value; text "+10" or "-5", which is added to the scan's own; text "50:90:5", a trajectory from 50 to 90
            in steps of 5, for one covariate at most.

    Raises:
        InputError: nothing to change, an unknown covariate, a relative change of what is not known or is no number, or a
            trajectory that never ends.
    """
    if not to:
        raise InputError("nothing is changed; say what the scan is to become, such as age=+10")
    changed, steps = dict(source), None
    for name, value in to.items():
        text, covariate = str(value).strip(), schema[name]
        if covariate.kind == "continuous" and _RELATIVE.fullmatch(text) and isinstance(value, str):
            own = source.get(name)
            if own is None:
                raise InputError(f"{name}={text} is relative to the scan's own {name}, which is not given; give that")
            changed[name] = float(own) + float(text)
        elif covariate.kind == "continuous" and (found := _RANGE.fullmatch(text)):
            if steps:
                raise InputError(f"{steps[0]} and {name}: a trajectory is along one covariate; give a value for the other")
            steps = name, _points(name, *(float(number) for number in found.groups()))
        else:
            changed[name] = value
    return [changed | {steps[0]: point} for point in steps[1]] if steps else [changed]


def with_followers(
    schema: CovariateSchema,
    own: Mapping[str, Value],
    targets: Sequence[Mapping[str, Value]],
    held: Collection[str],
    look: Callable[[], Mapping[str, float]],
) -> tuple[dict[str, Value], list[dict[str, Value]]]:
    """Own covariates, with those that are to follow; and the targets with what they follow to.

    Args:
        schema: of the model.
        own, targets: of the scan and of its edits, None where open.
        held: covariates that do not follow.
        look: finds covariates on the scan, called where one is to follow and not known. What is not found, or cannot be,
            stays open.
    """
    known = dict(own)
    moving = [
        covariate
        for covariate in schema
        if covariate.following
        and covariate.name not in held
        and any(target[name] != own[name] for target in targets for name in covariate.follows)
    ]
    if any(own[covariate.name] is None for covariate in moving):
        found = look()
        for covariate in moving:
            value, (low, high) = found.get(covariate.name, math.nan), covariate.range or (-math.inf, math.inf)
            if own[covariate.name] is None and math.isfinite(value) and low <= value <= high:
                known[covariate.name] = float(value)
    return known, [followed(schema, known, {**target, **{c.name: known[c.name] for c in moving}}, held) for target in targets]


def followed(
    schema: CovariateSchema, before: Mapping[str, Value], after: Mapping[str, Value], held: Collection[str] = ()
) -> dict[str, Value]:
    """`after`, with what follows from changed covariates changed as well, within its range.

    Args:
        schema: fitted.
        before, after: of one person, a value or None for every covariate.
        held: covariates that do not follow.
    """
    found = dict(after)
    for covariate in schema:
        value = before[covariate.name]
        moves = any(before[name] != found[name] for name in covariate.follows)
        if covariate.following is None or covariate.name in held or not moves or value is None:
            continue
        points = schema.numbers(covariate.follows, before), schema.numbers(covariate.follows, found)
        low, high = covariate.range or (-math.inf, math.inf)
        found[covariate.name] = min(max(covariate.following.moved(float(value), *points), low), high)
    return found


def _points(name: str, first: float, last: float, step: float) -> list[float]:
    count = int((last - first) / step + 1e-9) + 1 if step > 0 else 0
    if not 2 <= count <= MAX_TARGETS:
        raise InputError(
            f"{name}={first:g}:{last:g}:{step:g} is FIRST:LAST:STEP with {count} points; give a step above 0 and 2 to "
            f"{MAX_TARGETS} points"
        )
    return [first + k * step for k in range(count)]
