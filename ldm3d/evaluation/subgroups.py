"""Subgroup analysis: does the model work equally well in all groups of people?

Groups are the categories of each categorical covariate, and thirds of age. A gap is the difference between the worst and the
best group. It is never 0, so it is compared with the gaps of random groups of people (a permutation test, Pitman 1937). Dozens
of figures are tested, so p-values are corrected for their number (Holm 1979).

A measure itself may be worse in some groups: an age that is predicted by regression is too high in young and too low in old
people, on real volumes as well. So errors on generated volumes are tested after the error on the real volume with the same
covariates has been subtracted.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ldm3d.covariates import Covariate, CovariateSchema, Value
from ldm3d.randomness import generator
from ldm3d.statistics.agreement import Comparison
from ldm3d.statistics.bootstrap import interval, means, numbered, resamples

MIN_GROUP = 10  # people in a group; smaller groups are shown, but not tested
# Tolerances: gaps of at most this size are small
ERROR_TOLERANCE, MEAN_TOLERANCE = 0.25, 0.02  # of errors: as a part of the overall error, and of the covariate's mean
MODEL_TOLERANCE = 1.0  # of errors of the model: as a part of the measure's error on real volumes
PSNR_TOLERANCE_DB, SSIM_TOLERANCE = 1.0, 0.05  # of the foreground
FAMILY_WISE_ERROR = 0.05  # chance of any false gap
PERMUTATIONS = 10_000  # the smallest p is the reciprocal, small enough to be corrected for a hundred gaps
BLOCK = 2**20  # elements of random orders that are processed at once: about 8 MB for a group
CACHED_ORDERS = 16 * BLOCK  # elements of random orders that are cached for the next figure: 64 MB
GAP, SMALL_GAP, NO_GAP, FEW = "gap", "small gap", "no gap", "too few to tell"

Better = Literal["high", "low", "neither"]


@dataclass(frozen=True)
class VolumeScores:
    """One score of each of N volumes, whose means are compared between groups.

    Attributes:
        name: of the score, for example "PSNR (dB)".
        values: of each volume, NaN for a missing one.
        rows: covariates of each volume.
        people: the person in each.
        better: "high", "low", or "neither" for a score with a sign, such as a bias.
        tolerance: a gap of at most this is small.
        of_measure: whether it is the error of the measure itself on real volumes; it is shown, and does not count.
        decides: whether groups are called equal only if this score has no gap. Scores for which a few hundred volumes are too
            few (shares, distances between sets) do not decide: they can show a gap, but not its absence.
    """

    name: str
    values: NDArray
    rows: Sequence[Mapping[str, Value]]
    people: Sequence[Hashable]
    better: Better
    tolerance: float
    of_measure: bool = False
    decides: bool = False


@dataclass(frozen=True)
class Group:
    """Mean of a group of n volumes with its 95% interval."""

    label: str
    n: int
    people: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """One score or metric in the groups of one covariate.

    Attributes:
        figure, grouping: names of the score and of the covariate.
        groups: in order, including those with fewer than `MIN_GROUP` people.
        worst, best: labels; "" if fewer than two groups are large enough. If neither high nor low values are better,
            the groups with the largest and the smallest value.
        gap, low, high: difference of these two groups, with its 95% interval.
        chance: 95th percentile of the gaps of random groups.
        p: share of random groups with as large a gap; p_corrected: the same for all gaps together.
        tolerance, of_measure, decides: see `VolumeScores`.
    """

    figure: str
    grouping: str
    groups: tuple[Group, ...]
    worst: str
    best: str
    gap: float
    low: float
    high: float
    chance: float
    p: float
    tolerance: float
    of_measure: bool = False
    decides: bool = False
    p_corrected: float = float("nan")

    @property
    def verdict(self) -> str:
        """Outcome of the test.

        "gap": significant, and its interval reaches beyond the tolerance. "small gap": significant, and its interval lies
        within the tolerance. "no gap": not significant, and its interval lies within the tolerance. Otherwise "too few to
        tell": a gap of a size that matters cannot be excluded.
        """
        if not self.worst:
            return FEW
        if self.p_corrected < FAMILY_WISE_ERROR:
            return SMALL_GAP if self.high <= self.tolerance else GAP
        return NO_GAP if self.high <= self.tolerance else FEW

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "groups": [asdict(group) for group in self.groups], "verdict": self.verdict}


def groupings(schema: CovariateSchema, rows: Sequence[Mapping[str, Value]]) -> dict[str, list[float]]:
    """Covariates to group by, with the edges of their bands (none for categories).

    Only continuous covariates in years have bands: thirds of the values in `rows`, rounded to whole years.
    """
    found: dict[str, list[float]] = {c.name: [] for c in schema if c.kind == "categorical"}
    for covariate in schema:
        values = [row[covariate.name] for row in rows if row[covariate.name] is not None]
        if covariate.kind == "continuous" and covariate.unit in ("year", "years") and values:
            found[covariate.name] = sorted({float(edge) for edge in np.round(np.percentile(values, (100 / 3, 200 / 3)))})
    return found


def minus_real(values: NDArray, real: NDArray, sources: Sequence[int]) -> NDArray:
    """Score of each generated volume minus that of the real volume with the same covariates, (N,).

    If the model follows its requests, this is 0 on average in every group, whatever the error of the measure there.

    Args:
        values: of generated volumes, (N,); NaN stays NaN.
        real: of real volumes, (M,).
        sources: index of the real volume with the covariates of each generated one, (N,).
    """
    return values - real[np.asarray(sources, dtype=int)]


def error_scores(title: str, size: NDArray, error: NDArray, *others: Any) -> list[VolumeScores]:
    """Size and sign of an error, whose means are MAE and bias; others: rows, people, tolerance and so on."""
    rows, people, *kind = others
    mae, bias = VolumeScores(f"{title}: MAE", size, rows, people, "low", *kind), f"{title}: bias"
    return [mae, VolumeScores(bias, error, rows, people, "neither", *kind)]


def tolerance(comparison: Comparison, part: float = ERROR_TOLERANCE) -> float:
    """Largest small gap of a covariate's errors: a part of the overall error, or of the covariate's mean if that is larger."""
    return max(part * comparison.agreement.mae, MEAN_TOLERANCE * abs(float(comparison.reference.mean())))


def label(covariate: Covariate, edges: Sequence[float], value: Value) -> str | None:
    """The group that a value belongs to: "F", "below 40", "40 to 62", "62 and more"; None for a missing value."""
    if value is None or covariate.kind == "categorical":
        return value
    band = int(np.searchsorted(edges, value, side="right"))
    if not edges:
        return "all"
    if band == 0:
        return f"below {edges[0]:g}"
    return f"{edges[-1]:g} and more" if band == len(edges) else f"{edges[band - 1]:g} to {edges[band]:g}"


def groups_of(covariate: Covariate, edges: Sequence[float], rows: Sequence[Mapping[str, Value]]) -> list[str | None]:
    """The group of each row."""
    return [label(covariate, edges, row[covariate.name]) for row in rows]


def labels_of(covariate: Covariate, edges: Sequence[float]) -> list[str]:
    """All groups of a covariate, in their order."""
    if covariate.kind == "categorical":
        return list(covariate.categories)
    return list(dict.fromkeys(label(covariate, edges, value) for value in (-np.inf, *edges)))


def gaps(
    schema: CovariateSchema,
    bands: Mapping[str, Sequence[float]],
    figures: Sequence[VolumeScores],
    others: Sequence[Gap] = (),
    seed: int = 0,
) -> list[Gap]:
    """Gaps of all scores in all groupings.

    Args:
        schema: of the rows.
        bands: from `groupings`, of the held-out people, so that all scores have the same groups.
        figures: the scores.
        others: gaps of metrics of sets (see realism_by_group.py), to be corrected together with these.
        seed: of bootstrap and permutations.
    """
    found = []
    for name, edges in bands.items():
        covariate = schema[name]
        for figure in figures:
            given = groups_of(covariate, edges, figure.rows)
            valid = [i for i, each in enumerate(given) if each is not None and np.isfinite(figure.values[i])]
            if valid:
                cells = [given[i] for i in valid], figure.values[valid], [figure.people[i] for i in valid]
                found.append(_gap(figure, name, labels_of(covariate, edges), cells, seed))
    return _corrected([*found, *others])


def _corrected(found: Sequence[Gap]) -> list[Gap]:
    """With p_corrected, by the step-down procedure of Holm (1979)."""
    order = sorted((i for i, gap in enumerate(found) if gap.worst), key=lambda i: found[i].p)
    corrected, largest = list(found), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * found[i].p))
        corrected[i] = replace(found[i], p_corrected=largest)
    return corrected


def _gap(figure: VolumeScores, grouping: str, order: Sequence[str], cells: tuple, seed: int) -> Gap:
    labels, values, people = cells
    groups, draws = [], {}
    for k, name in enumerate(order):
        own = [i for i, each in enumerate(labels) if each == name]
        if not own:
            continue
        members = [people[i] for i in own]
        draws[name] = means(values[own], resamples(members, seed=seed + k))  # (B,), each group on its own
        groups.append(Group(name, len(own), len(set(members)), float(values[own].mean()), *interval(draws[name])))
    large = [group for group in groups if group.people >= MIN_GROUP]
    kind = figure.tolerance, figure.of_measure, figure.decides
    if len(large) < 2:
        nothing = float("nan")
        return Gap(figure.name, grouping, tuple(groups), "", "", *[nothing] * 5, *kind)
    ranked = sorted(large, key=lambda group: group.value, reverse=figure.better != "high")
    worst, best = ranked[0], ranked[-1]
    low, high = interval(draws[worst.label] - draws[best.label])
    if figure.better == "high":  # gaps are positive in either direction
        low, high = -high, -low
    tested = [i for i, each in enumerate(labels) if each in {group.label for group in large}]
    chance = _chance(values[tested], [labels[i] for i in tested], [people[i] for i in tested], seed)
    gap = abs(worst.value - best.value)
    found = gap, low, high, float(np.percentile(chance, 95)), float((1 + (chance >= gap).sum()) / (1 + len(chance)))
    return Gap(figure.name, grouping, tuple(groups), worst.label, best.label, *found, *kind)


def _chance(values: NDArray, labels: Sequence[str], people: Sequence[Hashable], seed: int) -> NDArray:
    """Gaps of random groups, (B,): people change groups together with all of their volumes."""
    unit = numbered(list(zip(people, labels)))  # a person with scans at two ages may be in two bands
    sums, counts = np.bincount(unit, values), np.bincount(unit)  # (U,)
    group = np.empty(len(counts), dtype=int)
    group[unit] = numbered(labels)
    both = np.stack([sums, counts], axis=1)  # (U, 2)
    found = []
    for orders in _orders(len(group), seed):
        shuffled = group[orders]  # (b, U)
        totals = [(shuffled == number) @ both for number in range(group.max() + 1)]  # a group at a time, or it takes gigabytes
        found.append(np.ptp([total / size for total, size in (t.T for t in totals)], axis=0))
    return np.concatenate(found)


def _orders(count: int, seed: int) -> Iterator[NDArray]:
    """`PERMUTATIONS` random orders of `count` elements, in blocks (b, count); scores of the same people share them."""
    if PERMUTATIONS * count > CACHED_ORDERS:
        yield from _drawn_orders(count, seed)
        return
    orders, block = _cached_orders(count, seed), max(1, BLOCK // count)
    yield from (orders[start : start + block] for start in range(0, len(orders), block))


@lru_cache(maxsize=2)
def _cached_orders(count: int, seed: int) -> NDArray:
    return np.concatenate(list(_drawn_orders(count, seed)))


def _drawn_orders(count: int, seed: int) -> Iterator[NDArray]:
    random, block = generator("fairness", seed, count), max(1, BLOCK // count)
    for start in range(0, PERMUTATIONS, block):
        values = torch.rand(min(block, PERMUTATIONS - start), count, generator=random)
        yield values.argsort(dim=1).to(torch.int32).numpy()
