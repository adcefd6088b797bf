"""Sections of the data: where scans and covariates are, the Grid, splits, covariates."""

import math
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_serializer, field_validator, model_validator

from ldm3d.config.base import Fraction, Positive, Section
from ldm3d.covariates import NAME, Covariate
from ldm3d.errors import nearest, shown

MAX_VOXELS = 2**30  # of the grid: 1024^3

# Names that no covariate may have: columns of ldm3d's tables, options of `ldm3d generate`, arguments of a pipeline's call
RESERVED_NAMES = frozenset(
    {
        *("subject", "session", "path", "key", "split", "participant_id", "session_id"),
        *(
            "ask",
            "audit",
            "batch_size",
            "check",
            "compile",
            "device",
            "dicom",
            "group",
            "guidance",
            "help",
            "no_check",
            "num",
            "out",
        ),
        *("precision", "sampler", "seed", "steps", "table", "threads", "volumes"),
        *("guidance_interval", "guidance_rescale", "num_volumes", "progress", "rows", "self", "spacing"),
        *("bids", "condition", "conditions", "image_guidance", "like", "measured", "spread", "stripped", "told"),
    }
)


MNI152 = "mni152"


def _is_none(value: Any) -> bool:
    return value is None


class GridConfig(Section):
    """The grid that every volume is brought to: `shape` voxels (right, anterior, superior) of `spacing_mm`.

    `origin_mm` are the world coordinates (RAS+) of the centre of a grid whose `place` is "world".
    """

    shape: tuple[Positive, Positive, Positive]
    spacing_mm: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

    place: Annotated[Literal["foreground", "world"], Field(exclude_if=lambda place: place == "foreground")] = "foreground"
    origin_mm: Annotated[tuple[float, float, float] | None, Field(exclude_if=_is_none)] = None

    @model_validator(mode="before")
    @classmethod
    def _isotropic(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("spacing_mm"), int | float | str):
            values = {**values, "spacing_mm": [values["spacing_mm"]] * 3}
        return values

    @model_validator(mode="after")
    def _fits_memory(self) -> Self:
        if math.prod(self.shape) > MAX_VOXELS:
            raise ValueError(f"shape {self.shape} has {math.prod(self.shape):,} voxels; at most {MAX_VOXELS:,} are worked on")
        return self

    @model_validator(mode="after")
    def _origin_belongs(self) -> Self:
        if self.origin_mm and self.place != "world":
            raise ValueError("origin_mm is where a grid with `place: world` lies; add that, or drop origin_mm")
        return self


class RegistrationConfig(Section):
    """How scans are brought into the space of a template (`ldm3d.data.registration`)."""

    to: str = MNI152  # or the path of a template, stripped as the scans are
    kind: Literal["rigid", "affine"] = "rigid"  # affine changes the size of brains


# Programs that extract brains, and what they are given beside options of the user's
BRAIN_TOOLS = {
    "mri_synthstrip": "-i {scan} -m {mask}",
    "hd-bet": "-i {scan} -o {folder}/out.nii.gz --save_bet_mask --no_bet_image",
    "bet": "{scan} {folder}/out -m -n",
    "deepbet-cli": "-g -i {scan} -o {folder}/brain.nii.gz -m {mask}",
}


class BrainExtractionConfig(Section):
    """Brain extraction by a program that is installed (`ldm3d.data.extraction`).

    `command` is a name of BRAIN_TOOLS, with further options or without; or a whole command with {scan} for the file that it
    reads, and {mask} or {brain} for the one that it writes.
    """

    command: str

    @field_validator("command")
    @classmethod
    def _says_where(cls, command: str) -> str:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"{shown(command)} is no command ({error}); close its quotes") from None
        if not words:
            raise ValueError(f"the command is empty; use {', '.join(BRAIN_TOOLS)} or a command with {{scan}} and {{mask}}")
        has = [name for name in ("{scan}", "{mask}", "{brain}") if any(name in word for word in words[1:])]
        if not has and words[0] in BRAIN_TOOLS:
            return command
        if "{scan}" not in has or len(has) < 2:
            close = nearest(words[0], BRAIN_TOOLS)
            raise ValueError(
                f"{shown(command)} does not say where the scan and the mask belong: write {{scan}}, and {{mask}} (or "
                f"{{brain}}, if the program writes no mask). {' and '.join(BRAIN_TOOLS)} are known by name"
                + (f"; did you mean {close!r}?" if close else "")
            )
        return command


class SplitConfig(Section):
    """Share of the subjects held out; the rest trains."""

    validation: Fraction = 0.1
    test: Fraction = 0.1
    seed: Annotated[int, Field(ge=0)] = 0  # not the experiment's, so that repeats with other seeds share the split
    # Covariates (categories, ages in years) or columns whose values the splits share alike: [sex, age, site]
    stratify: Annotated[tuple[str, ...], Field(exclude_if=lambda names: not names)] = ()

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave no subject to train on")
        return self


class BalanceConfig(Section):
    """Rare values of covariates are drawn more often (`ldm3d.data.balance`)."""

    by: Annotated[tuple[str, ...], Field(min_length=1)]
    power: Annotated[float, Field(ge=0, le=1)] = 0.5  # 0: as often as they are; 1: all bins and categories alike
    most: Annotated[float, Field(ge=1)] = 5.0  # times as often as the least drawn one
    bins: Annotated[int, Field(ge=2, le=1000)] = 10  # of a number, of equal width


def _texts(values: Any) -> Any:
    """One word or a list of them as a tuple of texts; numbers in their short form."""
    words = list(values) if isinstance(values, list | tuple | dict) else [values]
    for word in words:
        if isinstance(word, bool):
            raise ValueError(f"{str(word).lower()} is not text: YAML reads yes, no, on, off so; put the word in quotes")
        if not isinstance(word, str | int | float):
            raise ValueError(f"{shown(word)} is neither text nor a number")
    texts = tuple(str(word) for word in words)
    if twice := [word for word in texts if texts.count(word) > 1]:
        raise ValueError(f"{shown(twice[0])} is there twice; keep one")
    return texts


Codes = Annotated[tuple[str, ...], BeforeValidator(_texts)]  # words of a table, or one of them

ENTITIES = (  # of BIDS file names, beside sub, in their short form
    *("ses", "acq", "ce", "chunk", "den", "desc", "dir", "echo", "flip", "hemi", "inv", "label", "mod", "mt", "part", "proc"),
    *("rec", "res", "run", "sample", "seg", "space", "stain", "task", "trc"),
)

Suffix = Annotated[str, Field(pattern=r"^[A-Za-z0-9]+$")]  # becomes part of file names
Contrast = Annotated[Suffix, Field(pattern="^[A-Za-z]")]  # the name of an image beside the scans


class DataConfig(Section):
    """Where the scans and covariates are: a BIDS dataset (`bids`), or any CSV or TSV with a column of paths (`table`)."""

    bids: Path | None = None
    table: Path | None = None
    root: Path | None = None  # no scan lies outside; relative paths start here. Default: the table's folder, or `bids`
    # Of the BIDS files, and of the volumes that a model of them generates
    suffix: Suffix = "T1w"
    # Contrasts of one volume, which are coded and made together: [T1w, T2w, FLAIR], the first that of `suffix`; none: one
    channels: Annotated[tuple[Contrast, ...], Field(exclude_if=lambda names: not names)] = ()
    # Which BIDS file of a session is its scan: {space: MNI152NLin2009cAsym, run: 1}; null: without; a list: one scan for each
    filter: dict[str, Any] = Field(default_factory=dict)
    # A BIDS derivative of `bids`, which scans and masks are then taken from; `bids` still gives the tables
    derivatives: Annotated[Path | None, Field(exclude_if=_is_none)] = None
    # Of each scan, by its entities and suffix: {desc: brain, suffix: mask}; `root`: the folder of the masks, if it is another
    mask: Annotated[dict[str, Any] | None, Field(exclude_if=_is_none)] = None
    # Of scans for which no masks are there: by a program that makes them
    brain_extraction: Annotated[BrainExtractionConfig | None, Field(exclude_if=_is_none)] = None
    bias_correction: Annotated[Literal["n4"] | None, Field(exclude_if=_is_none)] = None
    # Into the space of a template, before a scan is placed; None: as it lies
    registration: Annotated[RegistrationConfig | None, Field(exclude_if=_is_none)] = None
    skull_stripped: bool = False  # whether the scans are; BIDS requires it of generated volumes
    path_column: str = "path"
    subject_column: str = "participant_id"
    session_column: str = "session_id"
    participants: Path | None = None  # table of covariates for `bids`, if it is not the dataset's own participants.tsv
    sessions: Annotated[Path | None, Field(exclude_if=_is_none)] = None  # folder of sub-XX_sessions.tsv, if not `bids`
    # Further CSV, TSV or XLSX tables, or globs of them, joined on subject and session (ldm3d.data.layouts)
    covariates_tables: Annotated[tuple[str, ...], Field(exclude_if=lambda tables: not tables)] = ()
    missing: Codes | None = None  # codes of a missing value in any column; a covariate's own list replaces them
    # Scans that are left out: a list of subjects and paths, or the column of the table that says who
    exclude: Annotated[str | Codes | None, Field(exclude_if=_is_none)] = None
    grid: GridConfig
    percentiles: tuple[Annotated[float, Field(ge=0, le=100)], Annotated[float, Field(ge=0, le=100)]] = (0.0, 99.8)
    splits: SplitConfig = SplitConfig()
    split_column: Annotated[str | None, Field(exclude_if=_is_none)] = None  # train, validation or test; empty: by the rule
    group_column: Annotated[str | None, Field(exclude_if=_is_none)] = None  # of families or sites, which share a split
    # What an epoch of training has once: every scan, or one scan of every subject, each in turn
    sample: Annotated[Literal["by-scan", "by-subject"], Field(exclude_if=lambda kind: kind == "by-scan")] = "by-scan"
    # How often each comes up, by its covariates; None: all alike
    balance: Annotated[BalanceConfig | None, Field(exclude_if=_is_none)] = None

    @field_validator("exclude", mode="before")
    @classmethod
    def _column_or_list(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, str | list | tuple):
            raise ValueError(f"{shown(value)} is no list of subjects and paths, nor the name of a column; write [{value}]")
        return (value or None) if isinstance(value, str) or not value else _texts(value)  # an empty list is none

    @model_validator(mode="before")
    @classmethod
    def _brain_mask_strips(cls, values: Any) -> Any:
        """A mask of the brain makes scans skull-stripped, unless the config says otherwise."""
        if isinstance(values, dict):
            masked = isinstance(values.get("mask"), dict) and values["mask"].get("desc") == "brain"
            if masked or values.get("brain_extraction"):
                return {"skull_stripped": True, **values}
        return values

    @field_validator("filter", "mask")
    @classmethod
    def _entities(cls, wanted: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        for entity, value in (wanted or {}).items():
            if entity in ("suffix", "root") and info.field_name == "mask":
                if not isinstance(value, str) or not value:
                    raise ValueError(f"{entity} is {shown(value)}; give text")
                continue
            if entity not in ENTITIES:
                close = {"acquisition": "acq", "session": "ses"}.get(entity) or nearest(entity, ENTITIES)
                hint = f"did you mean {close!r}?" if close else f"use {', '.join(ENTITIES)}"
                raise ValueError(f"{shown(entity)} is no entity of file names that is known; {hint}")
            for each in value if isinstance(value, list) and value else [value]:
                is_text = isinstance(each, str | int) and not isinstance(each, bool)
                if each is not None and not (is_text and re.fullmatch("[A-Za-z0-9+]+", str(each))):
                    raise ValueError(f"{entity} is {shown(each)}; give a label, a list of them, or null for none")
        return wanted

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.bids is None) == (self.table is None):
            raise ValueError("give either `bids: FOLDER` or `table: FILE.csv`")
        for name in ("participants", "sessions", "derivatives", "mask"):
            if getattr(self, name) and not self.bids:
                instead = "; a `table` has the covariates itself" if name in ("participants", "sessions") else ""
                raise ValueError(f"`{name}` goes with `bids`{instead}")
        if self.channels:
            if self.channels[0] != self.suffix or len(set(self.channels)) < max(2, len(self.channels)):
                raise ValueError(
                    f"channels [{', '.join(self.channels)}]: list two or more contrasts, each once, that of the scans "
                    f"(suffix {self.suffix}) first"
                )
            if not self.bids:
                raise ValueError("`channels` goes with `bids`, where the other contrasts of a scan are found")
        if self.mask is not None and self.brain_extraction is not None:
            raise ValueError("give either mask, which are there, or brain_extraction, which makes them")
        if self.mask is not None and not self.mask.keys() - {"root"}:
            raise ValueError("mask is empty; say which files are masks, such as {desc: brain, suffix: mask}")
        if self.percentiles[0] >= self.percentiles[1]:
            raise ValueError(f"percentiles {self.percentiles} must rise")
        return self


class CovariateConfig(Section):
    """One covariate and the column of the table that holds it (default: the column of its name).

    `categories` lists the values of a categorical one, [F, M], or gives each its aliases: {F: [female, 2], M: [1]}.
    `missing` lists the codes of a missing value beside empty cells and n/a. If given, it is complete: with [] every number
    in the column is a value, however odd.
    """

    name: Annotated[str, Field(pattern=NAME)]
    column: str | None = None
    kind: Literal["continuous", "categorical"]
    unit: str = ""
    range: tuple[float, float] | None = None
    categories: dict[str, Codes] = Field(default_factory=dict)
    missing: Annotated[Codes | None, Field(exclude_if=lambda codes: codes is None)] = None
    # Earlier covariates that this one follows from where a scan is edited: [age, sex]
    follows: Annotated[tuple[str, ...], Field(exclude_if=lambda names: not names)] = ()

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str, info: ValidationInfo) -> str:
        if name in RESERVED_NAMES and not (info.context or {}).get("saved"):
            raise ValueError(
                f"{name!r} is the name of an option, an argument or a column of ldm3d's own tables; "
                f"write `name: patient_{name}, column: {name}`"
            )
        return name

    @field_validator("categories", mode="before")
    @classmethod
    def _listed_or_named(cls, values: Any) -> Any:
        if isinstance(values, list | tuple):
            return {name: () for name in _texts(values)}
        if isinstance(values, dict):
            return dict(zip(_texts(values), (value if value is not None else () for value in values.values())))
        return values

    @field_validator("categories")
    @classmethod
    def _one_meaning_each(cls, values: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        meanings = {category.lower(): category for category in values}
        for category, aliases in values.items():
            if category.strip().lower() in ("", "n/a"):
                raise ValueError(f"{category!r} is how tables write a missing value; leave it out, or call it otherwise")
            for alias in aliases:
                if (other := meanings.setdefault(alias.lower(), category)) != category:
                    raise ValueError(f"{shown(alias)} stands for {shown(other)} and {shown(category)}; list it once")
        return values

    @model_validator(mode="after")
    def _no_category_is_missing(self) -> Self:
        words = {word for category, aliases in self.categories.items() for word in (category, *aliases)}
        if both := sorted(words & set(self.missing or ())):
            raise ValueError(f"{shown(both[0])} is a category and stands for a missing value; drop it from one of them")
        return self

    @field_serializer("categories")
    def _as_it_was_listed(self, values: dict[str, tuple[str, ...]]) -> Any:
        return values if any(values.values()) else list(values)

    def covariate(self) -> Covariate:
        """The covariate, not yet fitted to a training split."""
        aliases = {category: words for category, words in self.categories.items() if words}
        return Covariate(
            *(self.name, self.kind, self.unit, self.range, tuple(self.categories)), aliases=aliases, follows=self.follows
        )
