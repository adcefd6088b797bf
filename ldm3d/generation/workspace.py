"""Where a process keeps half-written files of a series, and how it keeps others of its number out."""

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import IO

from ldm3d.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two starts of one command at the same time go unnoticed there
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".unfinished"
PATIENCE_SECONDS = 3  # for a process that is just leaving


class Workspace:
    """A process's own folder for half-written files, locked as long as it is at work.

    Args:
        series: folder of the series.
        rank: of the process.
    """

    def __init__(self, series: Path, rank: int):
        self.series, self.folder = series, series / UNFINISHED / str(rank)
        self._lock: IO | None = None

    def acquire(self) -> None:
        """Lock it, and clear away what a killed process has left there."""
        until = time.monotonic() + PATIENCE_SECONDS
        while self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder / "lock")
            if self._lock is None and time.monotonic() > until:
                raise InputError(
                    f"another process is at work in {self.series}; wait for it, or end it and run the same command again: it "
                    "goes on from there. Several processes need different values of RANK, and one of WORLD_SIZE"
                )
            time.sleep(0 if self._lock else 0.05)
        for file in self.folder.iterdir():
            if file.name != "lock":
                file.unlink()

    def draft(self, path: Path) -> Path:
        """Where to write what is to become `path`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / path.name

    def publish(self, path: Path) -> None:
        """Move the draft of `path` there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.draft(path), path)

    def write(self, path: Path, content: bytes) -> None:
        """Write a file that appears whole or not at all. Not flushed to the disk: power cuts are found by checksums."""
        self.draft(path).write_bytes(content)
        self.publish(path)

    def write_new(self, path: Path, text: str) -> bool:
        """Write a file unless it is there; whether it was written. Of several processes one succeeds."""
        self.draft(path).write_text(text, encoding="utf-8")
        try:
            os.link(self.draft(path), path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links: a small gap, in which two processes may find nothing there
            if path.exists():
                return False
            self.publish(path)
        return True

    def release(self) -> None:
        """Clear it away, with the folder of all desks if it was the last."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock:
            self._lock.close()
            self._lock = None
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def clear_others(self) -> None:
        """Clear away the desks of processes that have been killed."""
        for other in self.folder.parent.iterdir():
            if other != self.folder and (lock := _lock(other / "lock")):
                shutil.rmtree(other, ignore_errors=True)
                lock.close()


def _lock(path: Path) -> IO | None:
    """The file, open and locked until it is closed or the process dies; None where another process has it."""
    try:
        file = open(path, "w")  # noqa: SIM115 (it stays open)
    except FileNotFoundError:  # somebody has just cleared its folder away
        return None
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        is_there = False
    except OSError:  # a file system without locks
        is_there = True
    if not is_there:
        file.close()
        return None
    return file
