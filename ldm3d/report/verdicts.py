"""Four verdicts for whoever reads no further: each sums up the lights of one question."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ldm3d.report.page import AMBER, GREEN, GREY, RED, Goal, Section, found

ANSWERS = {GREEN: "yes", AMBER: "not settled", RED: "no", GREY: "cannot be told"}
NAMED = 3  # lights that a verdict names
LINKED = 3  # of its pictures


@dataclass(frozen=True)
class Question:
    """What a verdict is about: its key in links, its name, and the question in words."""

    key: str
    name: str
    asks: str


RECONSTRUCTION = Question("reconstruction", "Reconstruction", "Does the autoencoder keep what is in a scan?")
FOLLOWS = Question("follows", "Follows what is asked", "Do volumes have the covariates that were requested?")
REAL = Question("real", "Looks real", "Are volumes like those of real people, and as varied?")
SAFE = Question("safe", "Safe and fair", "Is nobody copied, and is it equally good for all groups?")
QUESTIONS = (RECONSTRUCTION, FOLLOWS, REAL, SAFE)


@dataclass(frozen=True)
class Verdict:
    """The answer to a question.

    Attributes:
        question: that is answered.
        goals: the lights that it sums up.
        missing: what was not assessed, though the answer needs it; in words, with the way to get it.
        sections: the detail.
    """

    question: Question
    goals: Sequence[Goal]
    missing: Sequence[str] = ()
    sections: Sequence[Section] = field(default=(), repr=False)

    @property
    def light(self) -> str:
        """Red if any light is red, else amber if any is; green only if all are green and nothing is missing."""
        lights = [goal.verdict[0] for goal in self.goals]
        for light in (RED, AMBER):
            if light in lights:
                return light
        return GREY if self.missing or GREY in lights or not lights else GREEN

    @property
    def answer(self) -> str:
        return ANSWERS[self.light]

    @property
    def count(self) -> str:
        """How many lights are green, in a sentence."""
        if not self.goals:
            return "Nothing was measured."
        good = sum(goal.verdict[0] == GREEN for goal in self.goals)
        return f"{good} of {len(self.goals)} figures {'is' if good == 1 else 'are'} within the threshold."

    @property
    def reasons(self) -> list[str]:
        """What decides: the lights of its colour, unless that is green, and what is missing."""
        decides = [] if self.light == GREEN else [goal for goal in self.goals if goal.verdict[0] == self.light]
        more = [f"{len(decides) - NAMED} more"] if len(decides) > NAMED else []
        return [*(_named(goal) for goal in decides[:NAMED]), *more, *self.missing]

    @property
    def figures(self) -> list[str]:
        """Numbers of its first pictures on the page."""
        every = [each for section in self.sections for each in (*section.pictures, *section.plots)]
        return [each["number"] for each in every if "number" in each][:LINKED]


def _named(goal: Goal) -> str:
    """A light in words: what was found, and what is wanted or why it is not known."""
    light, words = goal.verdict
    if light == GREY or goal.judged:
        return f"{goal.name}: {words}"
    return f"{goal.name}: {found(goal)}, wanted {goal.wanted}"
