"""For whom a model may be used, on the page: an answer for every band of age and category."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm3d.covariates import in_words
from ldm3d.data.bands import EVERYONE, FEWEST_TOLD
from ldm3d.evaluation.coverage import Cell, Coverage
from ldm3d.evaluation.subgroups import MIN_GROUP
from ldm3d.report.page import AMBER, GREEN, GREY, RED
from ldm3d.report.sections.regression import MAX_UTILITY_RATIO


@dataclass(frozen=True)
class Answer:
    """A cell on the page: light, a word, and the reasons."""

    light: str
    word: str
    reasons: tuple[str, ...]


def answer(cell: Cell, task: str) -> Answer:
    """May the model be used for these people, to train regressors of `task`? "" if none was trained."""
    trained = "training people not counted" if cell.trained is None else f"{people(cell.trained)} in training"
    reasons = [trained, f"{people(cell.tested)} held out"]
    if task and cell.tested >= MIN_GROUP and math.isfinite(cell.ratio):
        reasons.append(f"error {cell.ratio:.2f} times that of real ({cell.low:.2f} to {cell.high:.2f})")
    if cell.trained == 0:
        return Answer(RED, "no, never seen", tuple(reasons))
    if cell.trained is not None and cell.trained < MIN_GROUP:
        return Answer(AMBER, "hardly seen", tuple(reasons))
    if not task or cell.tested < MIN_GROUP or not math.isfinite(cell.low + cell.high):
        return Answer(GREY, "not judged", tuple(reasons))
    if cell.high <= MAX_UTILITY_RATIO:
        return Answer(GREEN, "yes", tuple(reasons))
    return Answer(RED, "no", tuple(reasons)) if cell.low > MAX_UTILITY_RATIO else Answer(AMBER, "not settled", tuple(reasons))


def people(number: int) -> str:
    """How many, without a number that might identify somebody."""
    return f"1 to {FEWEST_TOLD - 1}" if 0 < number < FEWEST_TOLD else str(number)


def matrices(found: Sequence[Coverage]) -> list[dict[str, Any]]:
    """What the template shows of each: title, text, names of rows and columns, and rows of (label, answers)."""
    shown = []
    for each in found:
        task = in_words(each.task)
        unit = f" ({each.by.unit})" if each.by else ""
        rows = [(in_row(row, each), [answer(each.at(row, column), each.task) for column in each.columns]) for row in each.rows]
        across = in_words(each.across.name) if each.across else ""
        columns = [f"{across} {column}" if column != EVERYONE else "everyone" for column in each.columns]
        shown.append(
            {
                "title": f"To train a regressor of {task}?" if task else "For whom?",
                "lead": _lead(each, task),
                "note": _note(each, task),
                "corner": f"{in_words(each.by.name)}{unit}" if each.by else "",
                "columns": columns,
                "rows": rows,
            }
        )
    return shown


def in_row(label: str, found: Coverage) -> str:
    """The label of a band, with all ages in words."""
    return label if label != EVERYONE else f"any {in_words(found.by.name)}" if found.by else "everyone"


def _lead(found: Coverage, task: str) -> str:
    """How the matrix is read, and why it is grey where nothing could be answered."""
    known = (
        f"Yes: a regressor of {task} that was trained on synthetic volumes errs at most {MAX_UTILITY_RATIO:g} times as much "
        "on held-out real people of this group as one trained on as many real volumes; the whole 95% interval says so. No: "
        "the whole interval lies above, or the model has never seen such people."
        if task
        else "No regressor was trained on synthetic volumes, so no group can be answered with yes: run ldm3d evaluate with "
        "--downstream, and with the training data in --data."
    )
    counted = all(cell.trained is not None for cell in found.cells)
    return known + (
        "" if counted else " Training people of a group are counted where --data has the scans of the training, too."
    )


def _note(found: Coverage, task: str) -> str:
    """What the words mean."""
    holds = " The answer holds for this task and this simple regressor, for scans like those of the held-out people."
    return (
        f"Hardly seen: fewer than {MIN_GROUP} training people. Not judged: fewer than {MIN_GROUP} held-out "
        f"people{'' if task else ', or no regressor'}. Numbers from 1 to {FEWEST_TOLD - 1} are not told apart, so that "
        f"nobody is identified.{holds if task else ''}"
    )
