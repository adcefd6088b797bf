"""What a page asks for: covariates and sampling, read from JSON and checked, within limits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm3d.covariates import Value
from ldm3d.description import Sampling
from ldm3d.errors import InputError, choose, shown
from ldm3d.pipeline import Pipeline

FIELDS = ("covariates", "seed", "sampler", "steps", "guidance", "coarse")
MAX_SEED = 2**53 - 1  # a browser's numbers are exact up to there


@dataclass(frozen=True)
class Limits:
    """What a page may ask of this machine.

    Args:
        body: bytes of a request.
        waiting: requests at once, the one that is computed included.
        seconds: of computing, for one request; looked at between sampling steps.
        reading: seconds in which a request's body must have arrived.
        steps: of the sampler.
        scan: bytes of a scan that is dropped onto the page; it may take ten times `reading`.
        scan_voxels: of a scan.
        scans: that are kept in memory, of all users together.
        uploads: scans that arrive at the same time.
        kept: bytes of finished volumes that are kept, so that a download need not wait again.
    """

    body: int = 64 * 1024
    waiting: int = 256
    seconds: float = 600.0
    reading: float = 10.0
    steps: int = 200
    kept: int = 64 * 2**20
    scan: int = 128 * 2**20
    scan_voxels: int = 400**3
    scans: int = 4
    uploads: int = 2


@dataclass(frozen=True)
class Asked:
    """One volume.

    Attributes:
        covariates: (name, value or None) of each.
        sampling: how; its `steps` are few where the volume is coarse.
        coarse: a preview: few steps, a batch of one.
    """

    covariates: tuple[tuple[str, Value], ...]
    sampling: Sampling
    coarse: bool = False

    @property
    def row(self) -> dict[str, Value]:
        return dict(self.covariates)


def read_asked(text: bytes | str, pipeline: Pipeline, limits: Limits, preview_steps: int) -> Asked:
    """A request from JSON: {"covariates": {...}, "seed": 0, "sampler": ..., "steps": ..., "guidance": ..., "coarse": false}.

    All keys may be left out.

    Raises:
        InputError: no such JSON, an unknown key, or a value that the model or the limits do not allow.
    """
    values = read_object(text, ("covariates",))
    for key in values:
        choose("key of a request", key, FIELDS)
    if not isinstance(coarse := values.get("coarse", False), bool):
        raise InputError(f"coarse is {shown(coarse)}; use true or false")
    numbers = {
        "seed": number(values, "seed", 0, MAX_SEED, whole=True),
        "steps": number(values, "steps", 1, limits.steps, whole=True),
        "guidance": number(values, "guidance", 0, 100),
    }
    sampling = pipeline.sampling.replace(sampler=_sampler(values), **numbers)
    if coarse:
        sampling = sampling.replace(steps=min(sampling.steps, preview_steps))
    pipeline.check_sampling(sampling)
    row = pipeline.schema.parse(values.get("covariates", {}))
    return Asked(tuple(row.items()), sampling, coarse)


def _sampler(values: Mapping[str, Any]) -> str | None:
    name = values.get("sampler")
    if name is not None and not isinstance(name, str):
        raise InputError(f"sampler is {shown(name)}; give a name")
    return name


def read_object(text: bytes | str, objects: Sequence[str]) -> dict[str, Any]:
    """A JSON object; those of its values that `objects` names must be objects, too, where they are there.

    Raises:
        InputError: anything else.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("the request is no JSON") from None
    if not isinstance(values, dict) or not all(isinstance(values.get(key, {}), dict) for key in objects):
        names = " and ".join(f"`{name}`" for name in objects)
        raise InputError(f"the request is no JSON object with {names} as {'objects' if len(objects) > 1 else 'an object'}")
    return values


def whole_number(values: Mapping[str, Any], key: str, low: int, high: int) -> int | None:
    """The value of a key, or None; InputError unless it is a whole number within these limits."""
    return number(values, key, low, high, whole=True)


def number(values: Mapping[str, Any], key: str, low: float, high: float, whole: bool = False) -> Any:
    """The value of a key within its limits, or None."""
    value = values.get(key)
    if value is None:
        return None
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise InputError(f"{key} is {shown(value)}; give a {'whole ' if whole else ''}number from {low:g} to {high:g}")
    return value
