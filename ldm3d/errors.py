"""Errors of the input, not of the program: how messages are worded, and how a command ends."""

import difflib
import errno
import functools
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota, the limit on a file
SHOWN = 10  # problems that a message lists, of many alike


class InputError(ValueError):
    """Input that cannot be used; the message gives the value, the rule and the way out."""


def shown(value: Any, most: int = 200) -> str:
    """The value as messages show it; a long one is shown without its middle, so that it cannot flood a terminal."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits; a list that holds itself
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"


def some(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def itemised(problems: Mapping[str, str], count: int | None = None) -> str:
    """The first SHOWN problems, a line each, and how many more of `count` (default: of these) there are."""
    count = len(problems) if count is None else count
    lines = [f"  {where}: {what}" for where, what in itertools.islice(problems.items(), SHOWN)]
    return "\n".join(lines + ([f"  and {count - SHOWN} more"] if count > SHOWN else []))


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is known, else an InputError that gives the nearest alternative and all others."""
    known = list(known)
    if name in known:
        return name
    close = nearest(str(name), known)
    hint = f"did you mean {close!r}? " if close else ""
    raise InputError(f"unknown {what} {name!r}; {hint}known: {', '.join(known) or 'none'}")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that a mistyped one stands for, most likely; None if there is none like it."""
    return next(iter(difflib.get_close_matches(name[:100], known, n=1, cutoff=cutoff)), None)


def exit_on_input_error(main: Callable[..., None]) -> Callable[..., None]:
    """Make a command print what is wrong with its input, without a traceback, and exit with code 2.

    Faults of the program still end in a traceback and exit code 1.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            message = str(error)
        except OSError as error:
            if error.errno not in (*FULL, errno.EACCES, errno.EROFS, errno.ENOENT):
                raise
            message = f"{error.strerror}: {error.filename or 'while writing'}"
            if error.errno in FULL:
                message += "; free some space and run the same command again, it continues where it stopped"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)

    return wrapped


def differences(old: Any, new: Any, free: Collection[str] = (), where: str = "") -> list[str]:
    """The differences between two trees of JSON values, as "key: old -> new", except those of the keys in `free`."""
    if where.rpartition(".")[2] in free:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in differences(old.get(key), new.get(key), free, f"{where}.{key}".lstrip("."))]
    return [] if old == new else [f"{where}: {old} -> {new}"]
