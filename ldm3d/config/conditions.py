"""Sections of the images that a diffusion model is given beside covariates (`diffusion.conditions`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ldm3d.config.base import Fraction, Section
from ldm3d.config.data import Suffix

# Where a condition comes from in the training's data: a model folder, which can be published, does not say
SOURCES = ("derivatives", "pattern")
# Of a degradation: unit of its strength, and what is possible
_STRENGTHS = {
    "resolution": ("mm of a voxel", 0.1, 100.0),
    "blur": ("mm, full width at half maximum", 0.1, 100.0),
    "noise": ("deviation, as a share of the intensities' range", 0.0, 1.0),
    "bias": ("natural logarithm of the factors", 0.0, 3.0),
    "hole": ("mm across", 1.0, 300.0),
    "slices": ("share of the slices", 0.0, 0.95),
}
# FreeSurfer's labels that are of one side, with those of the other
_LEFT = {
    2: 41,
    3: 42,
    4: 43,
    5: 44,
    7: 46,
    8: 47,
    10: 49,
    11: 50,
    12: 51,
    13: 52,
    17: 53,
    18: 54,
    26: 58,
    28: 60,
    30: 62,
    31: 63,
}
_SIDES = {**_LEFT, **{right: left for left, right in _LEFT.items()}}


def _is_none(value: Any) -> bool:
    return value is None


class _Condition(Section):
    name: Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_]{0,63}$")]  # part of file names; "T2w" is one
    drop: Fraction = 0.1  # share of the training samples for which it is left open


class ImageCondition(_Condition):
    """Another image of the same subject: a contrast of the same session (`suffix`), or the scan of another visit."""

    kind: Literal["image"]
    suffix: Annotated[Suffix | None, Field(exclude_if=_is_none)] = None
    visit: Annotated[Literal["earlier", "later", "other"] | None, Field(exclude_if=_is_none)] = None
    # Continuous covariates of that visit, which are given with its image: its age, beside the age that is asked for
    tells: Annotated[tuple[str, ...], Field(exclude_if=lambda names: not names)] = ()
    # The BIDS dataset that holds it, if it is not the one of the scans
    derivatives: Annotated[Path | None, Field(exclude_if=_is_none)] = None
    # latent: by the model's autoencoder; voxels: those of each block, as they are
    form: Annotated[Literal["latent", "voxels"], Field(exclude_if=lambda form: form == "latent")] = "latent"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.suffix is None) == (self.visit is None):
            raise ValueError(
                f"{self.name}: give either `suffix: T2w`, a contrast, or `visit: earlier`, a scan of another visit"
            )
        if self.visit and self.derivatives:
            raise ValueError(f"{self.name}: visits are among the scans themselves; drop `derivatives`")
        if self.visit and self.form == "voxels":
            raise ValueError(f"{self.name}: scans of other visits are given as latents; drop `form`")
        if self.tells and not self.visit:
            raise ValueError(f"{self.name}: a contrast of the same session has the covariates of the request; drop `tells`")
        return self


class LabelsCondition(_Condition):
    """A label map: how much of each block of voxels each group of labels fills."""

    kind: Literal["labels"]
    derivatives: Annotated[Path | None, Field(exclude_if=_is_none)] = None  # folder with a label map of each scan
    pattern: Annotated[str | None, Field(exclude_if=_is_none)] = None  # glob of its name, if there are several
    groups: dict[str, tuple[int, ...]]
    # Parts of a block along each axis whose shares are given: 1 is the block as a whole
    detail: Annotated[int, Field(ge=1, le=16, exclude_if=lambda parts: parts == 1)] = 1

    @field_validator("groups")
    @classmethod
    def _some_labels(cls, groups: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if not groups or not all(groups.values()):
            raise ValueError("give at least one group, each with labels: {ventricles: [4, 43]}")
        known = [label for group in groups.values() for label in group]
        if twice := sorted({label for label in known if known.count(label) > 1}):
            raise ValueError(f"labels {twice} are listed twice; each may be in one group, once")
        if 0 in known:
            raise ValueError("label 0 is the background, which no group may hold")
        return groups


class Degradation(Section):
    """One thing that happens to a volume; its strength is drawn evenly from low to high for each sample."""

    operator: Literal["resolution", "blur", "noise", "bias", "hole", "slices"]
    strength: tuple[float, float]
    axes: Literal["all", "one", "x", "y", "z"] = "all"  # of resolution, blur and slices; one: any of them, at random
    profile: Literal["gaussian", "box"] = "gaussian"  # of the slices of a lower resolution

    @field_validator("strength", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        unit, least, most = _STRENGTHS[self.operator]
        low, high = self.strength
        if not least <= low <= high <= most:
            raise ValueError(f"{self.operator}: strength {low:g} to {high:g} must rise within {least:g} to {most:g} ({unit})")
        if self.operator == "slices" and self.axes == "all":
            raise ValueError("slices are missing along an axis; add `axes: z`, or `axes: one` for any")
        return self


class DegradedCondition(_Condition):
    """The volume itself, made worse on the fly: the model learns to undo it."""

    kind: Literal["degraded"]
    degradations: Annotated[tuple[Degradation, ...], Field(min_length=1)]

    @property
    def hides(self) -> bool:
        """Whether voxels are missing, so that those that are not are known."""
        return any(each.operator in ("hole", "slices") for each in self.degradations)

    @property
    def coarsens(self) -> bool:
        """Whether it is a scan of lower resolution, and nothing but noise beside: what was measured is then known."""
        operators = {each.operator for each in self.degradations}
        return "resolution" in operators and operators <= {"resolution", "blur", "noise"}

    @property
    def noise_std(self) -> float:
        """Of the noise that it adds, on average."""
        return sum(sum(each.strength) / 2 for each in self.degradations if each.operator == "noise")


def _kind(condition: Any) -> str:
    return str(condition.get("kind", "image") if isinstance(condition, dict) else condition.kind)


Condition = Annotated[
    Annotated[ImageCondition, Tag("image")]
    | Annotated[LabelsCondition, Tag("labels")]
    | Annotated[DegradedCondition, Tag("degraded")],
    Discriminator(_kind),
]


def check_names(conditions: Sequence[Condition]) -> None:
    """Raise ValueError where two conditions have one name."""
    names = [condition.name for condition in conditions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two conditions are called {twice[0]!r}; give each its own name")


def check_sides(conditions: Sequence[Condition]) -> None:
    """Raise ValueError where a group of FreeSurfer's labels has one of a pair without the other: mirrored, it is the other."""
    for each in conditions:
        for name, labels in getattr(each, "groups", {}).items():
            if alone := [label for label in labels if _SIDES.get(label, label) not in labels]:
                raise ValueError(
                    f"mirror: the group {name} of {each.name} holds label {alone[0]} and not {_SIDES[alone[0]]}, that of the "
                    "other side; put both into one group, or leave mirror out"
                )


def check_made(conditions: Sequence[Condition], makes: str | None, init_from: str | None) -> None:
    """Raise ValueError unless what is made is a condition that can be, and the others can be given beside it."""
    if makes is None:
        return
    made = next((each for each in conditions if each.name == makes), None)
    if not isinstance(made, LabelsCondition) and not (isinstance(made, ImageCondition) and made.suffix):
        raise ValueError(
            f"makes {makes!r} names no condition of kind labels, or of kind image with a suffix; add it to `conditions`"
        )
    if not isinstance(made, LabelsCondition):
        return
    if init_from:
        raise ValueError(f"makes {makes}: init_from brings an autoencoder of scans, this model's is of label maps; drop it")
    for each in conditions:
        if isinstance(each, ImageCondition) and each.form != "voxels":
            raise ValueError(f"{each.name}: the autoencoder of this model is of label maps; add `form: voxels`")


def check_told(conditions: Sequence[Condition], continuous: Sequence[str]) -> None:
    """Raise ValueError where a visit tells something else than one of the continuous covariates."""
    for each in conditions:
        told = each.tells if isinstance(each, ImageCondition) else ()
        if strangers := [name for name in told if name not in continuous]:
            known = ", ".join(continuous) or "none: there are none"
            raise ValueError(f"diffusion.conditions {each.name}: tells {strangers[0]}, no continuous covariate; use {known}")


def check_detail(conditions: Sequence[Condition], downsampling: int) -> None:
    """Raise ValueError where blocks of so many voxels along each axis cannot be split as label maps ask for."""
    for each in conditions:
        if isinstance(each, LabelsCondition) and downsampling % each.detail:
            raise ValueError(
                f"diffusion.conditions {each.name}: detail {each.detail} must divide the {downsampling} voxels of a block "
                "(autoencoder.network.downsampling)"
            )


def without_sources(condition: ImageCondition | LabelsCondition | DegradedCondition) -> dict[str, Any]:
    """What a condition is, as JSON values, without where it came from."""
    return condition.model_dump(mode="json", exclude=set(SOURCES))


def in_words(condition: ImageCondition | LabelsCondition | DegradedCondition) -> str:
    """What a condition is, for the terminal."""
    if isinstance(condition, LabelsCondition):
        return f"label map with {', '.join(condition.groups)}"
    if isinstance(condition, DegradedCondition):
        return f"the volume after {', '.join(each.operator for each in condition.degradations)}"
    return f"{condition.suffix} of the same session" if condition.suffix else f"scan of an {condition.visit} visit"
