"""A self-contained HTML page: lights at the top, sections of text, tables and pictures, and how it was made.

It is independent of models and evaluations, whose sections are in `ldm3d.report.sections`. Opening the page fetches nothing:
pictures are data: URIs, and there are no scripts (but a few lines in `preparation.html`, which works without them).
"""

import datetime
import json
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

import ldm3d
from ldm3d import figures
from ldm3d.files import checked_name, write_atomic

PAGE, METRICS = "report.html", "metrics.json"
GREEN, AMBER, RED, GREY = "green", "amber", "red", "grey"


@dataclass(frozen=True)
class Goal:
    """A figure and its target: at least `low`, at most `high`.

    Attributes:
        name: of the figure.
        found: its value; NaN if it could not be measured.
        low, high: its thresholds.
        unit: of all of them, "" for none.
        interval: 95% interval of `found`; None if it has none.
        judged: (light, words) by another rule than two thresholds; None: `low` and `high` decide.
    """

    name: str
    found: float
    low: float = -np.inf
    high: float = np.inf
    unit: str = ""
    interval: tuple[float, float] | None = None
    judged: tuple[str, str] | None = None

    @property
    def reached(self) -> bool:
        return bool(self.low <= self.found <= self.high)

    @property
    def wanted(self) -> str:
        if np.isinf(self.low) and np.isinf(self.high):
            return ""
        if np.isinf(self.high):
            return f"at least {with_unit(f'{self.low:.3g}', self.unit)}"
        if np.isinf(self.low):
            return f"at most {with_unit(f'{self.high:.3g}', self.unit)}"
        return with_unit(f"{self.low:.3g} to {self.high:.3g}", self.unit)

    @property
    def verdict(self) -> tuple[str, str]:
        """(light, words): green if the whole interval is within the thresholds, red if all of it is outside, else amber.

        Without an interval the value alone decides; grey without a value.
        """
        if self.judged:
            return self.judged
        if not math.isfinite(self.found):
            return GREY, "not measured"
        low, high = self.interval or (self.found, self.found)
        if not math.isfinite(low + high):
            return GREY, "too few to tell"
        if self.low <= low and high <= self.high:
            return GREEN, "reached"
        if high < self.low or low > self.high:
            return RED, "not reached"
        return AMBER, "uncertain"

    def to_dict(self) -> dict[str, Any]:
        light, words = self.verdict
        values = {"name": self.name, "wanted": self.wanted, "found": self.found, "reached": self.reached}
        return {**values, "interval": self.interval and list(self.interval), "light": light, "verdict": words}


@dataclass
class Section:
    """One heading of the page: a text, a table whose first `labels` columns are text, pictures, and plots side by side.

    Attributes:
        title, text: of the section; the text is plain.
        table: {"columns": names, "rows": lists of cells}; a line break in a cell is kept. None for no table.
        labels: how many of its first columns are text.
        pictures, plots: {"source": data: URI, "caption": text}; full width, and side by side.
        lights: text of a cell that is a verdict -> "green", "amber", "red" or "grey".
        note: details, in small print below.
        quote: text to be copied, kept as it is.
        folded: likewise (the line that it is folded behind, text); None for none.
        fold: of a table that is long: the line that it is folded behind; "" shows it.
        links: name -> id of an element of the page, where that name leads wherever it stands in the table.
    """

    title: str
    text: str = ""
    table: dict[str, list] | None = None
    labels: int = 1
    pictures: list[dict[str, str]] = field(default_factory=list)
    plots: list[dict[str, str]] = field(default_factory=list)
    lights: dict[str, str] = field(default_factory=dict)
    note: str = ""
    quote: str = ""
    folded: tuple[str, str] | None = None
    fold: str = ""
    links: Mapping[str, str] = field(default_factory=dict)


def write_page(
    folder: Path,
    title: str,
    sections: Sequence[Section],
    provenance: dict[str, str],
    goals: Sequence[Goal] = (),
    template: str = PAGE,
    **more: Any,
) -> Path:
    """Write FOLDER/report.html.

    Args:
        folder: is made if it is not there.
        title: of the page.
        sections: in their order.
        provenance: how it was made, name -> text, for the table at the end; `made`, a date, is shown at the top too.
        goals: lights of the summary at the top; none leaves it out.
        template: in ldm3d/report, an extension of report.html; `more` is what it shows beside.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("ldm3d.report", ""), autoescape=True)
    environment.filters["rows"] = goal_rows
    environment.filters["linked"] = linked
    page = environment.get_template(template).render(
        title=title,
        subtitle=f"ldm3d {ldm3d.__version__}, {provenance.get('made', '')[:10]}".rstrip(", "),
        goals=goals,
        sections=sections,
        provenance=provenance,
        **more,
    )
    write_atomic(folder / PAGE, page)
    return folder / PAGE


def goal_rows(goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """What the table of lights shows of each."""
    return [{**goal.to_dict(), "found": found(goal)} for goal in goals]


def linked(text: Any, links: Mapping[str, str]) -> Any:
    """A cell of a table in which each name of `links` leads to its element: the longest name that stands there as a whole."""
    if not links:
        return text
    names = "|".join(re.escape(name) for name in sorted(links, key=len, reverse=True))
    parts = re.split(rf"(?<![\w-])({names})(?![\w-])", str(text))  # every second one is a name
    return Markup("").join(
        Markup('<a href="#{}">{}</a>').format(links[part], part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )


def times(numbers: Sequence[float]) -> str:
    """ "40 x 48 x 40"."""
    return " x ".join(f"{each:g}" for each in numbers)


def with_unit(value: str, unit: str) -> str:
    """ "5 ml", "5%", and "5" without a unit."""
    return f"{value}{unit}" if unit in ("", "%") else f"{value} {unit}"


def found(goal: Goal) -> str:
    """The value with unit and interval, in words."""
    if not math.isfinite(goal.found):
        return "none"
    value = with_unit(number(goal.found), goal.unit)
    return f"{value} ({number(goal.interval[0])} to {number(goal.interval[1])})" if goal.interval else value


def number(value: float) -> str:
    """Three decimals below 10, fewer above; integers unchanged."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """The value, and below it "(0.874 to 0.941)"; the value alone if there is no interval."""
    if not np.isfinite(interval).all():
        return number(value)
    return f"{number(value)}\n({number(interval[0])} to {number(interval[1])})"


def picture(pictures: Mapping[str, str], name: str, caption: str) -> dict[str, str]:
    """One of a section's pictures; `pictures`: name -> data: URI."""
    return {"source": pictures[name], "caption": caption, "name": name}


def save_pictures(folder: Path, drawn: Mapping[str, figures.Figure]) -> dict[str, str]:
    """Write FOLDER/NAME.png for every figure; name -> data: URI."""
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{checked_name(name, 'picture')}.png")
    return {name: figures.to_data_uri(figure) for name, figure in drawn.items()}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values as strict JSON."""
    path.write_text(json.dumps(plain(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """A value in strict JSON: numbers that are not finite are null, arrays and tuples are lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command() -> str:
    """The command line of this process."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name  # python -m ldm3d
    return shlex.join([name, *sys.argv[1:]])


def now() -> str:
    """Date and time with time zone."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
