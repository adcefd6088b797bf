"""Cells of tables as they are published: missing values, and numbers in their several notations."""

import math
import re

from ldm3d.errors import shown

MISSING = ("", "n/a", "na", "nan", "none", "null")  # in lower case; a category of such a name stays a category
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+")  # as in 1,234: does the comma part thousands, or decimals?
_NUMBER = r"[+-]?\d*[.,]?\d+"
_OPEN_ENDED = re.compile(rf"[<>≤≥]=?\s*(?P<before>{_NUMBER})|(?P<after>{_NUMBER})\s*\+")
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\s*(?:[-–—]|to)\s*(?P<high>{_NUMBER})")


def is_missing(text: str) -> bool:
    """Whether a cell of a table means a missing value."""
    return text.strip().lower() in MISSING


def read_number(text: str) -> tuple[float, str]:
    """A number as published tables write it, and the kind of notation.

    Args:
        text: a cell that is not missing.

    Returns:
        (value, kind): "plain" is 42.5; "decimal comma" is 42,5; "open-ended" is 89+ or >89, read as its limit; "range" is
        35-40 or 35 to 40, read as its middle.

    Raises:
        ValueError: no number, not finite, or a number that can be read in two ways (1,234).
    """
    text = text.strip()
    if len(text) > 100 or "_" in text:  # float("1_2") is 12
        raise ValueError(f"{shown(text)} is not a number")
    try:
        value = float(text)
    except ValueError:
        value = None
    if value is not None:
        if not math.isfinite(value):
            raise ValueError(f"{text} is not finite; leave the cell empty for a missing value")
        return value, "plain"
    if _THOUSANDS.fullmatch(text):
        pointed = f"{text.replace(',', '.')} or " if text.count(",") == 1 else ""
        raise ValueError(f"{shown(text)} can be read in two ways; write {pointed}{text.replace(',', '')}")
    if _DECIMAL_COMMA.fullmatch(text):
        return float(text.replace(",", ".")), "decimal comma"
    if found := _OPEN_ENDED.fullmatch(text):
        return read_number(found["before"] or found["after"])[0], "open-ended"
    if found := _RANGE.fullmatch(text):
        low, high = (read_number(found[end])[0] for end in ("low", "high"))
        if low < high:
            return (low + high) / 2, "range"
    raise ValueError(f"{shown(text)} is not a number")
