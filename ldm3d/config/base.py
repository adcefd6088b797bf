"""What every section of a config is: strict, frozen, and clear about numbers and flags."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]

Fraction = Annotated[float, Field(ge=0, lt=1)]


def _types(annotation: Any) -> set[type]:
    """All types that an annotation is made of."""
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
        """Where a number belongs yes and true become text, which is an error; pydantic would take them for 1."""
        if not isinstance(values, dict):
            return values
        types = {name: _types(field.annotation) for name, field in cls.model_fields.items()}
        numbers = {name for name, found in types.items() if found & {int, float} and bool not in found}
        return {name: _write_flags(value) if name in numbers else value for name, value in values.items()}
