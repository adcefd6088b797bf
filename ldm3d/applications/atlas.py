"""Atlases: what brains of an age, a sex or any other group look like by a model, as templates, and as a film over age.

Each cell is a group of requests, such as women of 40. The volumes drawn for it give a mean, a deviation, and a template of the
mean shape (`ldm3d.applications.shape`). All cells start from the same noise, so that they show the same invented people at
other ages: what differs between cells is what was asked, and the film is smooth.

Legend: volumes (X, Y, Z) in [0, 1]; K cells along the covariate of the film, at a_k; F frames.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.applications.changes import targets_of
from ldm3d.applications.shape import mean_shape
from ldm3d.covariates import CovariateSchema, Value
from ldm3d.errors import InputError, some

FRAMES = 5  # of the film, from one cell to the next
WIDTH = 0.5  # standard deviation of the film's kernel, in steps between cells
MOST_CELLS = 1000


@dataclass(frozen=True)
class Cell:
    """One group of an atlas.

    Attributes:
        label: letters and digits, "age40sexF".
        row: what is asked, None where open.
        film: label of what it has in common with the other cells of its film, "sexF"; "" where there is only one film.
        position: value of the film's covariate; None where there is no film.
    """

    label: str
    row: Mapping[str, Value]
    film: str
    position: float | None


@dataclass(frozen=True, eq=False)
class Template:
    """What the volumes of a cell have in common.

    Attributes:
        mean, deviation: over volumes, (X, Y, Z); the deviation is 0 for a single one.
        sharp: of the mean shape, (X, Y, Z); None where it was not asked for.
        count: of volumes.
    """

    mean: NDArray
    deviation: NDArray
    sharp: NDArray | None
    count: int

    @property
    def best(self) -> NDArray:
        """The sharp one where there is one."""
        return self.mean if self.sharp is None else self.sharp


def cells_of(schema: CovariateSchema, asked: Mapping[str, Any], by: Sequence[str]) -> list[Cell]:
    """The cells of an atlas: each point of a trajectory with each category of `by`.

    Args:
        schema: of the model.
        asked: covariates by name: values that all cells share, and one range "20:90:10" at most, along which the film goes.
        by: categorical covariates, each category of which has cells of its own.

    Raises:
        InputError: unknown covariates or values, a covariate of `by` that is a number or also asked, too many cells.
    """
    for name in by:
        if not schema[name].categories:
            raise InputError(f"--by {name}: it is a number, whose cells you choose by a range: --{name} FIRST:LAST:STEP")
        if name in asked:
            raise InputError(f"{name} is asked for, and in --by; keep one")
    nothing = dict.fromkeys(schema.names)
    points = schema.parse_all(targets_of(schema, nothing, asked)) if asked else [nothing]
    along = next((n for n in schema.names if len({str(point[n]) for point in points}) > 1), None)
    groups = list(itertools.product(*(schema[name].categories for name in by)))
    if len(points) * len(groups) > MOST_CELLS:
        raise InputError(
            f"{len(points)} points of {len(groups)} groups are {len(points) * len(groups)} cells; at most {MOST_CELLS}"
        )
    cells = []
    for group in groups:
        film = _label(dict(zip(by, group)))
        for point in points:
            row = {**point, **dict(zip(by, group))}
            own = {name: row[name] for name in schema.names if name == along or name in by} or _given(row)
            position = float(str(point[along])) if along else None
            cells.append(Cell(_label(own) or "all", row, film, position))
    labels = [cell.label for cell in cells]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(
            f"several cells would be called {some(twice)}; take steps or categories that differ in letters or digits"
        )
    return cells


def template_of(volumes: Callable[[], Iterable[NDArray]], rounds: int, progress: Callable[[], None] | None = None) -> Template:
    """Mean, deviation and mean shape of volumes, which are taken one at a time.

    Args:
        volumes: gives them anew each time, (X, Y, Z).
        rounds: of registration, see `mean_shape`; 0 for no sharp template.
        progress: called after each volume of each round.
    """
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for volume in volumes():  # Welford 1962: no difference of large sums
        count += 1
        change = volume.astype(np.float64) - mean
        mean = mean + change / count
        squares = squares + change * (volume - mean)
        if progress:
            progress()
    deviation = np.sqrt(squares / max(count - 1, 1)).astype(np.float32)
    sharp = mean_shape(volumes, mean.astype(np.float32), rounds, progress) if rounds else None
    return Template(mean.astype(np.float32), deviation, sharp, count)


def film_weights(positions: Sequence[float], at: Sequence[float], width: float) -> NDArray:
    """Weights (F, K) of a local linear regression over cells (Fan 1992), as for templates over age (Davis et al. 2010).

    Each row sums to 1, and what is linear in the positions comes out as it is, up to the ends.

    Args:
        positions: a_k, at least two.
        at: of the frames.
        width: standard deviation of the Gaussian kernel, in units of the positions.
    """
    weights = []
    for place in at:
        away = np.asarray(positions, float) - place
        kernel = np.exp(-0.5 * (away / width) ** 2)
        s0, s1, s2 = (float((kernel * away**power).sum()) for power in range(3))
        weights.append(kernel * (s2 - s1 * away) / (s0 * s2 - s1**2))
    return np.array(weights)


def film(positions: Sequence[float], templates: Sequence[NDArray], frames: int = FRAMES) -> tuple[list[float], NDArray]:
    """Positions of the frames, and the film (F, X, Y, Z).

    Args:
        positions: of the cells, in rising order.
        templates: (X, Y, Z) of each.
        frames: from one cell to the next.
    """
    at = np.linspace(positions[0], positions[-1], frames * (len(positions) - 1) + 1)
    width = WIDTH * (positions[-1] - positions[0]) / (len(positions) - 1)
    shown = np.empty((len(at), *templates[0].shape), np.float32)  # frame by frame: a film at 1 mm is a gigabyte
    for frame, weights in zip(shown, film_weights(positions, at, width)):
        np.clip(sum(weight * each for weight, each in zip(weights, templates)), 0, 1, out=frame)
    return [float(place) for place in at], shown


def _label(values: Mapping[str, Value]) -> str:
    """Letters and digits of names and values: "age20p5sexF"."""

    def text(value: Value) -> str:
        return f"{value:g}".replace(".", "p").replace("-", "m") if isinstance(value, float) else str(value)

    return re.sub("[^A-Za-z0-9]", "", "".join(f"{name}{text(value)}" for name, value in values.items()))


def _given(row: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in row.items() if value is not None}
