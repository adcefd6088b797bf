"""The base of all sections of a config: strict, frozen, and with numbers apart from flags."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Sampler = Literal["ddpm", "ddim", "euler", "heun", "dpmpp-2m", "unipc", "sde-euler", "sde-heun", "sde-pc"]


def _types(annotation: Any) -> set[type]:
    """All types in an annotation."""
    return {annotation} if isinstance(annotation, type) else set().union(*map(_types, get_args(annotation)))


def _write_flags(value: Any) -> Any:
    """yes and true as text, in lists too."""
    if isinstance(value, list | tuple):
        return [_write_flags(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else value


class Section(BaseModel):
    """A part of the file: no unknown keys, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _flags_are_no_numbers(cls, values: Any) -> Any:
        """yes and true become text where a number belongs, which is an error; pydantic would read them as 1."""
        if not isinstance(values, dict):
            return values
        types = {name: _types(field.annotation) for name, field in cls.model_fields.items()}
        numbers = {name for name, found in types.items() if found & {int, float} and bool not in found}
        return {name: _write_flags(value) if name in numbers else value for name, value in values.items()}
