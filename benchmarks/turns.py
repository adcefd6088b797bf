"""Training several things beside each other, in turns of a few seconds, so that a busy machine slows all alike."""

import time
from collections.abc import Iterator

from protocol import wait

TURN_SECONDS = 8
MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)  # shares of a training's time at which figures are taken


class Training:
    """One training that is given `limit` seconds, of which only its own turns count.

    A subclass says what a `step` is, whose learning rate may follow `self.share` (of the time, 0 to 1), what `figures` are
    taken and, if it has to, what comes before the first step (`prepare`, whose time counts).
    """

    def __init__(self, limit: float):
        self.limit, self.share = limit, 0.0
        self.marks = [mark * limit for mark in MARKS]

    def prepare(self) -> None:
        pass

    def step(self, step: int) -> None:
        raise NotImplementedError

    def figures(self) -> dict[str, float]:
        raise NotImplementedError

    def turns(self, start_figures: bool = True) -> Iterator[dict]:
        """Train; after every turn, an empty dict, or figures with `seconds` and `step` where a mark is passed."""
        start = time.perf_counter()
        self.prepare()
        seconds, step = time.perf_counter() - start, 0
        marks = [0.0, *self.marks] if start_figures else list(self.marks)
        while marks:
            if seconds >= marks[0]:
                yield {"seconds": round(seconds, 1), "step": step, **self.figures()}
                marks.pop(0)
                continue
            start = time.perf_counter()
            until = start + min(TURN_SECONDS, marks[0] - seconds)
            while (now := time.perf_counter()) < until:
                self.share = min(1.0, (seconds + now - start) / self.limit)
                self.step(step)
                wait()
                step += 1
            seconds += time.perf_counter() - start
            yield {}


def in_turns(trainings: dict[str, Training], start_figures: bool = True) -> Iterator[tuple[str, dict]]:
    """(name, figures) of all trainings as they come, until the last is done."""
    running = {name: training.turns(start_figures) for name, training in trainings.items()}
    while running:
        for name in list(running):
            found = next(running[name], None)
            if found is None:
                del running[name]
            elif found:
                yield name, found
