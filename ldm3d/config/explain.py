"""What is wrong with a config, in words: the key's full name, the value, and the nearest valid key."""

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import Tag, ValidationError
from pydantic_core import ErrorDetails

from ldm3d.config.base import Section
from ldm3d.config.networks import MonaiLibrary
from ldm3d.config.sections import Config
from ldm3d.errors import SHOWN, nearest, shown


def explain(error: ValidationError, root: type[Section] = Config) -> str:
    """What is wrong with the values of a section, in words."""
    problems = [_explain(problem, root) for problem in error.errors()]
    return "; ".join(problems[:SHOWN]) + (f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")


def _explain(problem: ErrorDetails, root: type[Section]) -> str:
    """One of pydantic's errors as a sentence with the key's full name."""
    location, section = _resolve(problem["loc"], root)
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        fields = [*section.model_fields, *(["recipe"] if section is Config else [])]
        close = nearest(location[-1], fields, cutoff=0.5)
        hint = f"did you mean {close!r}?" if close else f"valid keys here: {', '.join(fields)}"
        return f"unknown key {shown(where)}; {hint}"
    if problem["type"] == "union_tag_invalid":
        known = ", ".join(("ldm3d", *get_args(MonaiLibrary)))
        return f"{where}.kind is {shown(problem['ctx']['tag'])}: use one of {known}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing" and where in ("autoencoder", "diffusion"):
        return f"{where}: this section is missing; `recipe: brains-3mm` takes it from a config that comes with ldm3d"
    if problem["type"] in ("missing", "value_error"):
        return f"{where}: {message}" if where else message
    return f"{where} is {shown(problem['input'])}: {message}"


def _resolve(location: Sequence[str | int], root: type[Section]) -> tuple[list[str], type[Section]]:
    """(the keys of pydantic's `location` as written in the file, the section that holds the last of them)."""
    choices: dict[Any, Any] = {}
    keys, section = [], root
    for part in location:
        if part in choices:  # the tag of a kind of section, not a key of the file
            section, choices = choices[part], {}
            continue
        keys.append(str(part))
        if part in section.model_fields and part != location[-1]:
            section, choices = _sections(section.model_fields[part].annotation, section)
    return keys, section


def _sections(annotation: Any, default: type[Section]) -> tuple[type[Section], dict[str | int, type[Section]]]:
    """The section that a field holds (`default` if none), and all of them by tag where a `kind` decides."""
    found, choices = default, dict[str | int, type[Section]]()
    for candidate in (annotation, *get_args(annotation)):
        plain, *extra = get_args(candidate) if get_args(candidate) else (candidate,)
        if isinstance(plain, type) and issubclass(plain, Section):
            found = plain
            choices |= {tag.tag: plain for tag in extra if isinstance(tag, Tag)}
    return found, choices
