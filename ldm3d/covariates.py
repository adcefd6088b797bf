"""Covariates: what a volume is asked to show, and how tables become tensors.

A schema is an ordered list of covariates. Its tensor form, the `context` that a U-Net reads, has one token a covariate:
(N, K, 2), where [..., 0] is the value (standardised, or the index of the category) and [..., 1] is 1 where the value is
given and 0 where it is left open. Open values serve a missing cell of the table, a covariate left out of a request and
classifier-free guidance alike.
"""

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ldm3d.errors import InputError, shown

Value = float | str | None
NAME = r"^[a-z][a-z0-9_]{0,99}$"  # how requests, columns and files can be called


@dataclass(frozen=True)
class Covariate:
    """One column of the user's table.

    Args:
        name: how requests and columns of written tables call it.
        kind: "continuous" or "categorical".
        unit: of a continuous one, for labels and messages; "" if it has none.
        range: (lowest, highest) value that makes sense, in `unit`; None for no limits. Continuous only.
        categories: the values a categorical one can take, as strings.
        mean, std: of a continuous one over the training split; set by `CovariateSchema.fit`.
        seen: (lowest, highest) over the training split; a request beyond it draws a warning.
        required: whether it cannot be left open: a model that was trained without open values has no answer to them.
    """

    name: str
    kind: str
    unit: str = ""
    range: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    seen: tuple[float, float] | None = None
    required: bool = False

    # How `from_dict` has pydantic check what a file says
    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 (no field)

    def __post_init__(self):
        if not re.fullmatch(NAME.rstrip("$"), self.name):  # $ lets a line break follow
            raise InputError(
                f"covariate {shown(self.name)}: a name begins with a small letter and goes on with small letters, digits and "
                "_, at most 100; rename it (`column:` says what it is called in the table)"
            )
        if self.kind not in ("continuous", "categorical"):
            raise InputError(f"covariate {self.name!r}: kind is {self.kind!r}; use continuous or categorical")
        if (self.kind == "categorical") != bool(self.categories):
            raise InputError(f"covariate {self.name!r} ({self.kind}): `categories` goes with categorical, and only there")
        if self.range and self.range[0] >= self.range[1]:
            raise InputError(f"covariate {self.name!r}: range {self.range[0]:g} to {self.range[1]:g} must rise")
        if self.std <= 0:
            raise InputError(f"covariate {self.name!r}: std {self.std:g} must be positive")

    @property
    def label(self) -> str:
        """Name with its unit, for axes and tables."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def answers(self) -> str:
        """What it can be asked for, in words: "0 to 120 years; training saw 21 to 88", "F, M"."""
        if self.kind == "categorical":
            return ", ".join(self.categories)
        text = f"{self.range[0]:g} to {self.range[1]:g} {self.unit}" if self.range else self.unit or "any number"
        return text.rstrip() + (f"; training saw {self.seen[0]:g} to {self.seen[1]:g}" if self.seen else "")

    def parse(self, value: Any) -> Value:
        """A cell of a table or an argument of a request as float or category; None if it is left open.

        Raises:
            InputError: not a number, beyond `range`, none of the categories, or left open though `required`.
        """
        text = "" if value is None else str(value).strip()
        if text.lower() in ("", "n/a", "na", "nan", "none", "null"):
            if self.required:
                raise InputError(f"{self.name}: a value must be given; this model was trained with none of them left open")
            return None
        if self.kind == "categorical":
            return self._parse_category(text)
        try:
            number = float(text)
        except ValueError:
            raise InputError(f"{self.name}: {shown(text)} is not a number (expected {self.unit or 'a number'})") from None
        if not math.isfinite(number):
            raise InputError(f"{self.name}: {shown(text)[1:-1]} is not finite; leave the cell empty for a missing value")
        if self.range and not self.range[0] <= number <= self.range[1]:
            low, high = self.range
            raise InputError(f"{self.name}: {number:g} is outside its range {low:g} to {high:g} {self.unit}".rstrip())
        return number

    def _parse_category(self, text: str) -> str:
        for category in self.categories:
            if text.lower() == category.lower():
                return category
        # A column of 0/1 codes with a gap in it is read as 0.0/1.0
        if text.endswith(".0") and text[:-2] in self.categories:
            return text[:-2]
        raise InputError(f"{self.name}: {shown(text)} is not one of {', '.join(self.categories)}")

    def encode(self, value: Value) -> tuple[float, float]:
        """(standardised value or category index, 1.0), or (0.0, 0.0) for None."""
        if value is None:
            return 0.0, 0.0
        if self.kind == "categorical":
            return float(self.categories.index(value)), 1.0
        return (value - self.mean) / self.std, 1.0


def as_name(text: str) -> str:
    """A name that a covariate may have, for a column of any name: "age_at_scan" for "Age at scan"."""
    name = re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")
    return (name if name[:1].isalpha() else f"column_{name or text.encode().hex()}")[:100]


@dataclass(frozen=True)
class CovariateSchema:
    """The covariates of an experiment, in the order of their tokens."""

    covariates: tuple[Covariate, ...]

    def __post_init__(self):
        if len(set(self.names)) != len(self.names):
            raise InputError(f"covariates must have different names, got {', '.join(self.names)}")

    def __iter__(self):
        return iter(self.covariates)

    def __len__(self) -> int:
        return len(self.covariates)

    def __getitem__(self, name: str) -> Covariate:
        for covariate in self.covariates:
            if covariate.name == name:
                return covariate
        close = difflib.get_close_matches(name[:100], self.names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise InputError(f"unknown covariate {shown(name)}{hint} this model knows {', '.join(self.names) or 'none'}")

    @property
    def names(self) -> list[str]:
        return [covariate.name for covariate in self.covariates]

    @property
    def num_categories(self) -> list[int]:
        """Number of categories of each covariate, 0 for continuous ones: what a U-Net needs to know of the schema."""
        return [len(covariate.categories) for covariate in self.covariates]

    @property
    def required(self) -> list[str]:
        """Names of the covariates that cannot be left open."""
        return [covariate.name for covariate in self.covariates if covariate.required]

    def middle(self) -> dict[str, Value]:
        """For every covariate that cannot be left open the middle of what training saw, or the first category."""
        return {
            c.name: c.categories[0] if c.categories else (c.seen[0] + c.seen[1]) / 2 for c in self.covariates if c.required
        }

    def parse(self, row: Mapping[str, Any]) -> dict[str, Value]:
        """One value (or None) for every covariate; a key that is no covariate is an InputError."""
        for name in row:
            self[name]  # raises with the nearest name
        return {covariate.name: covariate.parse(row.get(covariate.name)) for covariate in self.covariates}

    def fit(self, rows: Sequence[Mapping[str, Any]]) -> "CovariateSchema":
        """The same schema with mean, std and seen range of `rows`, the training split."""
        fitted = []
        for covariate in self.covariates:
            values = [v for row in rows if (v := covariate.parse(row.get(covariate.name))) is not None]
            if not values:
                raise InputError(f"covariate {covariate.name!r} has no value in the training split; drop it from the config")
            if covariate.kind == "continuous":
                numbers = torch.tensor(values, dtype=torch.float64)
                std = float(numbers.std(correction=0))
                if std == 0:
                    raise InputError(
                        f"covariate {covariate.name!r} is {values[0]:g} for every training subject, so nothing can be "
                        "learnt from it; drop it from the config"
                    )
                covariate = replace(covariate, mean=float(numbers.mean()), std=std, seen=(min(values), max(values)))
            fitted.append(covariate)
        return CovariateSchema(tuple(fitted))

    def warn_beyond_seen(self, rows: Iterable[Mapping[str, Value]]) -> None:
        """Warn once for every covariate that is asked beyond what the training split held."""
        rows = list(rows)
        for covariate in self.covariates:
            if not covariate.seen:
                continue
            low, high = covariate.seen
            beyond = {v for row in rows if (v := row.get(covariate.name)) is not None and not low <= v <= high}
            if beyond:
                asked = ", ".join(f"{v:g}" for v in sorted(beyond)[:5])
                warnings.warn(
                    f"{covariate.name} {asked} {covariate.unit}: training saw {low:g} to {high:g} only; "
                    "what is generated there is extrapolation",
                    stacklevel=3,
                )

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Context tensor (N, K, 2) of rows of raw values; see the top of this file."""
        encoded = [[self[name].encode(value) for name, value in self.parse(row).items()] for row in rows]
        return torch.tensor(encoded, dtype=torch.float32).reshape(len(rows), len(self), 2)

    def to_dict(self) -> list[dict]:
        return [asdict(covariate) for covariate in self.covariates]

    @classmethod
    def from_dict(cls, items: Sequence[Mapping[str, Any]]) -> "CovariateSchema":
        """The inverse of `to_dict`; ValueError (pydantic's) where a key or the type of a value is wrong."""
        return cls(TypeAdapter(tuple[Covariate, ...]).validate_python(items))


def describe(row: Mapping[str, Value]) -> str:
    """A request in a line: "age 72, sex F"."""

    def text(value: Value) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    given = [f"{name.removesuffix('_ml').replace('_', ' ')} {text(v)}" for name, v in row.items() if v is not None]
    return ", ".join(given) or "nothing asked"


def drop_covariates(context: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """Leave covariates open at random, per sample and each on its own.

    A chosen sample draws a rate, and each of its covariates is dropped at that rate. Every number of open covariates from 0
    to K is then equally likely: the network sees requests for one covariate alone and for none, which guidance needs
    (Ho & Salimans 2022, section 3.2), and which independent drops at one low rate would almost never show.

    Args:
        context: (N, K, 2).
        uniform: (N, K + 2) in [0, 1): whether the sample is chosen, its rate, and one for each covariate.
        probability: that a sample is chosen.
    """
    dropped = (uniform[:, 2:] < uniform[:, 1:2]) & (uniform[:, :1] < probability)
    return context * ~dropped[..., None]
