"""Atomic writes of files, and checks of names that become part of a path."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from ldm3d.errors import InputError, shown

LONGEST_NAME = 100  # file systems allow 255 bytes, and prefixes and suffixes are added
# Letters of any script, digits and a few signs. No separator of folders or drives, nothing hidden, no option, no pattern
_NAME = re.compile(r"\w[\w .,+=@()-]*")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: the caller writes to the path that is given, which is renamed to `path` at the end.

    It is in the same folder, which must exist, and has the same suffixes, by which some libraries choose the format. If
    writing fails it is removed, and an older file at `path` stays.
    """
    unfinished = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8, lines end in a line feed) or bytes atomically."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def checked_name(text: str, what: str) -> str:
    """A name from a file, after a check that it stays in its folder when it becomes part of a path.

    Args:
        text: the name.
        what: its kind, for the message: "subject", "covariate".

    Raises:
        InputError: it could lead elsewhere (a separator, a leading dot), or some file system would refuse it.
    """
    if not (isinstance(text, str) and len(text) <= LONGEST_NAME and _NAME.fullmatch(text)):
        raise InputError(
            f"{what} {shown(text)} cannot become part of a file's name: begin with a letter or digit, go on with those, "
            f"blanks and _ . , + = @ ( ) -, and use at most {LONGEST_NAME} of them"
        )
    return text
