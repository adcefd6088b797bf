"""What happens when the input, not the program, is at fault."""

import errno
import functools
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota, the limit on a file
SHOWN = 10  # of many like problems, those that a message spells out


class InputError(ValueError):
    """The user gave something that cannot be used; the message gives the value, the rule and the way out."""


def shown(value: Any, most: int = 200) -> str:
    """The value as a message gives it: a long one without its middle, so that no cell or setting can flood a terminal."""
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


def exit_on_input_error(main: Callable[..., None]) -> Callable[..., None]:
    """Make a command print what is wrong with its input, without a traceback, and exit with code 2.

    Anything that is not the user's doing still ends in a traceback and exit code 1.
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
                message += "; free some space and run the same command again, it goes on where it stopped"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)

    return wrapped


def differences(old: Any, new: Any, free: Collection[str] = (), where: str = "") -> list[str]:
    """What differs between two trees of JSON values, as "key: old -> new"; keys named in `free` may."""
    if where.rpartition(".")[2] in free:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in differences(old.get(key), new.get(key), free, f"{where}.{key}".lstrip("."))]
    return [] if old == new else [f"{where}: {old} -> {new}"]
