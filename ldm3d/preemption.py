"""Requests to stop: SIGTERM, and the SIGUSR1 that Slurm sends some minutes before a job's time is up."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

REQUEUE = 75  # exit code: stopped as asked, start the same command again (EX_TEMPFAIL of sysexits.h)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@dataclass
class Stop:
    """Whether one of `SIGNALS` has arrived since `preemption` was entered, and which."""

    signal: str | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None


def ignore_signals(*_: object) -> None:
    """For processes that serve another one: all processes of a job get the signals, and only that one decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def preemption() -> Iterator[Stop]:
    """Within it, `SIGNALS` do not end the process but set the `Stop` that it yields, so that the work can stop in order.

    A program that exits with `REQUEUE` ignores them to its end. When one process of a job has exited, `srun
    --kill-on-bad-exit` sends SIGTERM to the others, and a death by it would change the job's exit code.
    """
    stop = Stop()

    def note(number: int, _frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    except SystemExit as done:
        if done.code == REQUEUE:
            before = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
