"""Covariates: the conditions of a volume, and how tables become tensors.

A schema is an ordered list of covariates. Its tensor form, the `context` that a U-Net reads, has one token a covariate:
(N, K, 2), where [..., 0] is the value (standardised, or the index of the category) and [..., 1] is 1 where the value is
given and 0 where it is left open. Open values represent missing cells of a table, covariates left out of a request, and the
unconditional case of classifier-free guidance.
"""

import functools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from ldm3d.errors import SHOWN, InputError, nearest, shown, some
from ldm3d.following import Following
from ldm3d.notation import is_missing, read_number

Value = float | str | None
NAME = r"^[a-z][a-z0-9_]{0,99}$"  # of covariates, in requests, columns and files

# Aliases of the two sexes, for a covariate that has both as categories
_SEXES = (("f", "female", "woman", "women", "girl"), ("m", "male", "man", "men", "boy"))


@dataclass(frozen=True)
class Covariate:
    """One column of the user's table.

    Args:
        name: in requests and columns of written tables.
        kind: "continuous" or "categorical".
        unit: of a continuous one, for labels and messages; "" if it has none.
        range: (lowest, highest) value that makes sense, in `unit`; None for no limits. Continuous only.
        categories: the values a categorical one can take, as strings.
        mean, std: of a continuous one over the training split; set by `CovariateSchema.fit`.
        seen: (lowest, highest) over the training split; a request beyond it draws a warning.
        required: whether it cannot be left open, because the model was trained without open values.
        aliases: other names of a category, {"F": ("2", "femme")}; "female" and its like are known if both sexes are.
        follows: names of covariates that a continuous one follows from: ventricles from age and sex.
        following: how, over the training split; set by `CovariateSchema.fit`.
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
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    follows: tuple[str, ...] = ()
    following: Following | None = None

    # For the check of a file's values by pydantic in `from_dict`
    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 (no field)

    def __post_init__(self) -> None:
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
        if strangers := self.aliases.keys() - set(self.categories):
            raise InputError(f"covariate {self.name!r}: aliases of {some(sorted(strangers))}, which are no categories")
        if self.follows and self.kind != "continuous":
            raise InputError(f"covariate {self.name!r}: only a continuous one can follow from others; drop `follows`")

    @property
    def label(self) -> str:
        """Name in words with its unit, for axes and tables: "ventricular volume (ml)"."""
        return f"{in_words(self.name)} ({self.unit})" if self.unit else in_words(self.name)

    @property
    def answers(self) -> str:
        """The values that can be requested, in words: "0 to 120 years; training saw 21 to 88", "F, M"."""
        if self.kind == "categorical":
            return ", ".join(self.categories)
        text = f"{self.range[0]:g} to {self.range[1]:g} {self.unit}" if self.range else self.unit or "any number"
        return text.rstrip() + (f"; training saw {self.seen[0]:g} to {self.seen[1]:g}" if self.seen else "")

    def parse(self, value: Any) -> Value:
        """An argument of a request, or a value that was read before, as float or category; None if it is left open.

        A request is one number: 26,9 is, 89+ and 35-40 are not.

        Raises:
            InputError: not one number, beyond `range`, none of the categories, or left open though `required`.
        """
        number, kind = self.read(value)
        if kind in ("open-ended", "range"):
            raise InputError(f"{self.name}: {shown(value)} is not one number; write one, for example {number:g}")
        if self.range and isinstance(number, float) and not self.range[0] <= number <= self.range[1]:
            low, high = self.range
            raise InputError(f"{self.name}: {number:g} is outside its range {low:g} to {high:g} {self.unit}".rstrip())
        return number

    def read(self, cell: Any) -> tuple[Value, str]:
        """A cell of a table as published, also beyond `range`, and its kind of notation.

        Returns:
            (value, kind): kind is "missing" (value None), "category", or a kind of `read_number`.

        Raises:
            InputError: no number, none of the categories, or left open though `required`.
        """
        text = "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else str(cell).strip()
        if self.kind == "categorical" and (category := self._category(text)) is not None:
            return category, "category"
        if is_missing(text):
            if self.required:
                raise InputError(f"{self.name}: a value must be given; this model was trained with none of them left open")
            return None, "missing"
        if self.kind == "categorical":
            raise InputError(f"{self.name}: {shown(text)} is not one of {some(self.categories, SHOWN)}")
        try:
            return read_number(text)
        except ValueError as error:
            raise InputError(f"{self.name}: {error}" + (f" (expected {self.unit})" if self.unit else "")) from None

    def _category(self, text: str) -> str | None:
        if text in self.categories:
            return text
        known = self._words.get(text.lower())
        # A column of 0/1 codes with a gap in it is read as 0.0/1.0
        return self._words.get(text[:-2].lower()) if known is None and text.endswith(".0") else known

    @functools.cached_property
    def _words(self) -> dict[str, str]:
        """Category by its names and aliases in lower case."""
        words = {name.lower(): name for name in reversed(self.categories)}
        for category, aliases in self.aliases.items():
            for alias in aliases:
                words.setdefault(alias.lower(), category)
        sexes = [[name for name in self.categories if name.lower() in group] for group in _SEXES]
        if all(len(names) == 1 for names in sexes):
            for (category,), group in zip(sexes, _SEXES):
                for word in group:
                    words.setdefault(word, category)
        return words

    def encode(self, value: Value) -> tuple[float, float]:
        """(standardised value or category index, 1.0), or (0.0, 0.0) for None."""
        if value is None:
            return 0.0, 0.0
        if self.kind == "categorical":
            return float(self.categories.index(value)), 1.0
        return (float(value) - self.mean) / self.std, 1.0


def in_words(text: str) -> str:
    """Names in a text as people write them, without the unit at their end: "ventricular volume" for ventricular_volume_ml."""
    return re.sub(r"\w*[a-z]_\w+", lambda name: re.sub("_(ml|mm2|mm)$", "", name[0]).replace("_", " "), text)


def as_name(text: str) -> str:
    """A valid name of a covariate for any column: "age_at_scan" for "Age at scan"."""
    name = re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")
    return (name if name[:1].isalpha() else f"column_{name or text.encode().hex()}")[:100]


@dataclass(frozen=True)
class CovariateSchema:
    """The covariates of an experiment, in the order of their tokens."""

    covariates: tuple[Covariate, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise InputError(f"covariates must have different names, got {', '.join(self.names)}")
        for place, covariate in enumerate(self.covariates):
            # So there is no circle
            if later := [name for name in covariate.follows if name not in self.names[:place]]:
                raise InputError(
                    f"covariate {covariate.name!r} follows {later[0]!r}, which is none of those before it; list that first"
                )

    def __iter__(self) -> Iterator[Covariate]:
        return iter(self.covariates)

    def __len__(self) -> int:
        return len(self.covariates)

    def __getitem__(self, name: str) -> Covariate:
        for covariate in self.covariates:
            if covariate.name == name:
                return covariate
        close = nearest(name, self.names)
        hint = f"; did you mean {close!r}?" if close else ";"
        raise InputError(f"unknown covariate {shown(name)}{hint} this model knows {', '.join(self.names) or 'none'}")

    @property
    def names(self) -> list[str]:
        return [covariate.name for covariate in self.covariates]

    @property
    def num_categories(self) -> list[int]:
        """Number of categories of each covariate, 0 for continuous ones, as a U-Net takes it."""
        return [len(covariate.categories) for covariate in self.covariates]

    @property
    def required(self) -> list[str]:
        """Names of the covariates that cannot be left open."""
        return [covariate.name for covariate in self.covariates if covariate.required]

    def middle(self) -> dict[str, Value]:
        """For every required covariate the middle of the seen (or else possible) range, or the first category."""
        ranges = {c: c.seen or c.range or (c.mean, c.mean) for c in self.covariates if c.required}
        return {c.name: c.categories[0] if c.categories else (low + high) / 2 for c, (low, high) in ranges.items()}

    def parse(self, row: Mapping[str, Any]) -> dict[str, Value]:
        """One value (or None) for every covariate; a key that is no covariate is an InputError."""
        for name in row:
            self[name]  # raises with the nearest name
        return {covariate.name: covariate.parse(row.get(covariate.name)) for covariate in self.covariates}

    def parse_all(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Value]]:
        """`parse` of each; of several, an InputError says in which row."""
        parsed = []
        for number, row in enumerate(rows, start=1):
            try:
                parsed.append(self.parse(row))
            except InputError as error:
                raise InputError(f"row {number}: {error}" if len(rows) > 1 else str(error)) from None
        return parsed

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
                covariate = replace(
                    covariate, mean=float(numbers.mean()), std=std, seen=(float(numbers.min()), float(numbers.max()))
                )
            fitted.append(covariate)
        return CovariateSchema(tuple(fitted)).following_in(rows, [c.name for c in fitted if c.follows])

    def following_in(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> "CovariateSchema":
        """The same fitted schema, in which these covariates follow from others as they do in `rows`."""
        known = self.parse_all([{name: row.get(name) for name in self.names} for row in rows])
        return CovariateSchema(
            tuple(replace(c, following=self._following(c, known)) if c.name in names else c for c in self.covariates)
        )

    def _following(self, covariate: Covariate, rows: Sequence[Mapping[str, Value]]) -> Following | None:
        """Of a covariate that follows from others, over the rows in which all of them are known; None where these are few."""
        complete = [row for row in rows if all(row[name] is not None for name in (covariate.name, *covariate.follows))]
        x = np.array([self.numbers(covariate.follows, row) for row in complete], dtype=float)
        try:
            return Following.fit(x, np.array([row[covariate.name] for row in complete], dtype=float))
        except InputError as error:
            warnings.warn(
                f"{covariate.name} is to follow {', '.join(covariate.follows)}, and does not where a scan is edited: {error}",
                stacklevel=4,
            )
            return None

    def numbers(self, names: Sequence[str], row: Mapping[str, Value]) -> list[float | None]:
        """Standardised values, and an indicator of each category but the first; None where a value is open."""
        numbers: list[float | None] = []
        for covariate in map(self.__getitem__, names):
            value, given = covariate.encode(row[covariate.name])
            values = [float(value == k) for k in range(1, len(covariate.categories))] if covariate.categories else [value]
            numbers += values if given else [None] * len(values)
        return numbers

    def warn_beyond_seen(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Warn once for every covariate with requests beyond the range of the training split."""
        for covariate in self.covariates:
            if not covariate.seen:
                continue
            low, high = covariate.seen
            values = [v for row in rows if isinstance(v := row.get(covariate.name), int | float)]
            beyond = {v for v in values if not low <= v <= high}
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
        items = [asdict(covariate) for covariate in self.covariates]
        for item in items:
            for name in ("aliases", "follows", "following"):  # as in files of versions without them
                if not item[name]:
                    del item[name]
        return items

    @classmethod
    def from_dict(cls, items: Sequence[Mapping[str, Any]]) -> "CovariateSchema":
        """The inverse of `to_dict`; ValueError (pydantic's) where a key or the type of a value is wrong."""
        return cls(TypeAdapter(tuple[Covariate, ...]).validate_python(items))


def describe(row: Mapping[str, Value]) -> str:
    """A request in a line: "age 72, sex F"; of numbers four digits, or all before the point."""

    def text(value: Value) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"

    given = [f"{in_words(name)} {text(v)}" for name, v in row.items() if v is not None]
    return ", ".join(given) or "nothing asked"


def drop_covariates(context: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """Leave covariates open at random, independently for each sample and covariate.

    A chosen sample draws a rate, and each of its covariates is dropped at that rate. Every number of open covariates from 0
    to K is then equally likely. Guidance needs requests for one covariate alone and for none (Ho & Salimans 2022, section
    3.2), which independent drops at one low rate would almost never give.

    Args:
        context: (N, K, 2).
        uniform: (N, K + 2) in [0, 1): whether the sample is chosen, its rate, and one for each covariate.
        probability: that a sample is chosen.
    """
    dropped = (uniform[:, 2:] < uniform[:, 1:2]) & (uniform[:, :1] < probability)
    return context * ~dropped[..., None]
