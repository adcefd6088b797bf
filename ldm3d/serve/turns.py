"""Whose turn it is: one generation at a time, first come, first served. Everyone sees the own place."""

import asyncio
from collections import deque
from types import TracebackType
from typing import Self


class Full(Exception):
    """No more can wait."""


class Turns:
    """A queue of those who want to compute, all in one event loop.

    Args:
        most: who may stand in it, the one who computes included.
    """

    def __init__(self, most: int):
        self.most = most
        self._standing: deque[Turn] = deque()
        self._moved = asyncio.Condition()
        self._notices: set[asyncio.Task] = set()

    def __len__(self) -> int:
        return len(self._standing)

    def enter(self) -> "Turn":
        """A place at the end.

        Raises:
            Full: there is none.
        """
        if len(self) >= self.most:
            raise Full(f"{len(self)} requests wait already; try again in a moment")
        turn = Turn(self)
        self._standing.append(turn)
        return turn

    def _leave(self, turn: "Turn") -> None:
        if turn in self._standing:
            self._standing.remove(turn)
            notice = asyncio.get_running_loop().create_task(self._notify())
            self._notices.add(notice)  # the loop itself keeps no task alive
            notice.add_done_callback(self._notices.discard)

    async def _notify(self) -> None:
        async with self._moved:
            self._moved.notify_all()


class Turn:
    """A place among `Turns`; as a context it is left at the end, unless `keep` was called."""

    def __init__(self, turns: Turns):
        self._turns, self._kept = turns, False

    @property
    def place(self) -> int:
        """How many are before this one; 0 is: compute."""
        return self._turns._standing.index(self)

    async def moved(self) -> None:
        """Wait until the place is another one."""
        before = self.place
        async with self._turns._moved:
            await self._turns._moved.wait_for(lambda: self.place != before)

    def keep(self) -> None:
        """Leave only by `leave`: what computes goes on after the context ends."""
        self._kept = True

    def leave(self) -> None:
        self._turns._leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._kept:
            self.leave()
