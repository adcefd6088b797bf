"""Does it work as well for everybody? Every figure by group, the gap between groups, and what chance alone would make of it.

Groups are the categories of each categorical covariate and three bands of age of equal size. A gap is the difference between
the worst and the best group. Of several groups one is always worst, so a gap is never 0; what chance makes of it is found by
giving the labels to other people at random (a permutation test, Pitman 1937). Dozens of figures are judged, of which chance
alone would call one in twenty; probabilities are corrected for their number (Holm 1979).

A measure may be worse for some than for others: an age that is read off by regression is too high for the young and too low
for the old, whoever made the volumes, and a reader of sexes may know women better than men. So what a measure says of
generated volumes is judged beyond what it says of the real ones that they were asked for: error less error, volume by volume.
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

LEAST = 10  # people in a group; smaller ones are shown, and no gap is taken with them
PART, SHARE = 0.25, 0.02  # of the overall error, and of the covariate's mean, that a gap of errors may be and still be small
OWN = 1.0  # of the measure's own error on real volumes, that a gap in what a model does may be and still be small
PSNR_DB, SSIM = 1.0, 0.05  # gaps of the foreground that are called small
LEVEL = 0.05  # chance of calling any gap where there is none
PERMUTATIONS = 10_000  # the smallest probability is one in so many: a hundred gaps can be corrected for
BLOCK = 2**20  # places in random orders that are worked on at once: some 8 MB for a group
KEPT = 16 * BLOCK  # places in all orders of so many things that are kept for the next figure: 64 MB
GAP, SMALL, NONE, FEW = "gap", "small gap", "no gap", "too few to tell"

Better = Literal["high", "low", "neither"]


@dataclass(frozen=True)
class Judged:
    """One figure of N volumes, to be judged by group.

    Attributes:
        name: of the figure, for example "PSNR (dB)".
        values: of each volume, NaN where it has none; the figure is their mean.
        rows: covariates of each volume.
        people: whom each shows.
        better: "high", "low", or "neither" for a figure with a sign, such as a bias.
        tolerance: a gap of at most this is small.
        of_measure: whether it is the measure's own on real volumes, no doing of the model; it is shown, and not judged.
        decides: whether it has to be without a gap for groups to be called equal. Figures that some hundred volumes cannot
            settle (shares, distances between sets) do not: they can show a gap, and not that there is none.
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
    """One group's mean with its 95% interval; n volumes of so many people."""

    label: str
    n: int
    people: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """One figure over the groups of one covariate.

    Attributes:
        figure, grouping: names of the figure and of the covariate.
        groups: in their order; those with fewer than `LEAST` people too.
        worst, best: labels; "" where fewer than two groups are large enough. Of a figure that is better neither high nor low,
            those with the largest and the smallest value.
        gap, low, high: the two groups' difference, with a 95% interval, in which the two stay who they are.
        chance: what 95% of random groupings stay below.
        p: share of random groupings with as large a gap; p_corrected: the same for all gaps judged together.
        tolerance, of_measure, decides: see `Judged`.
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
        """What can be said of it.

        "gap": more than chance makes, and its interval reaches beyond the tolerance. "small gap": more than chance makes, and
        its interval stays within the tolerance. "no gap": no more than chance makes, and within the tolerance all the same.
        Else "too few to tell": chance alone may make a gap of a size that would matter.
        """
        if not self.worst:
            return FEW
        if self.p_corrected < LEVEL:
            return SMALL if self.high <= self.tolerance else GAP
        return NONE if self.high <= self.tolerance else FEW

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "groups": [asdict(group) for group in self.groups], "verdict": self.verdict}


def groupings(schema: CovariateSchema, rows: Sequence[Mapping[str, Value]]) -> dict[str, list[float]]:
    """Covariates to group by, with the edges of their bands (none for categories).

    Bands are for continuous covariates in years: thirds of the values in `rows`, to whole years.
    """
    found: dict[str, list[float]] = {c.name: [] for c in schema if c.kind == "categorical"}
    for covariate in schema:
        values = [row[covariate.name] for row in rows if row[covariate.name] is not None]
        if covariate.kind == "continuous" and covariate.unit in ("year", "years") and values:
            found[covariate.name] = sorted({float(edge) for edge in np.round(np.percentile(values, (100 / 3, 200 / 3)))})
    return found


def beyond(values: NDArray, real: NDArray, sources: Sequence[int]) -> NDArray:
    """What a measure says of each generated volume less what it says of the real one whose covariates were asked: (N,).

    For a model that draws what is asked it is 0 on average in every group, however the measure errs there.

    Args:
        values: of generated volumes, (N,); NaN where there is none, which is what comes out there.
        real: the same of real volumes, (M,).
        sources: number of the real volume that each generated one was asked for, (N,).
    """
    return values - real[np.asarray(sources, dtype=int)]


def tolerance(comparison: Comparison, part: float = PART) -> float:
    """The gap of a covariate's errors that is called small: a part of the overall error or of its mean, the larger one."""
    return max(part * comparison.agreement.mae, SHARE * abs(float(comparison.reference.mean())))


def label(covariate: Covariate, edges: Sequence[float], value: Value) -> str | None:
    """The group that a value belongs to: "F", "below 40", "40 to 62", "62 and more"; None for a missing value."""
    if value is None or covariate.kind == "categorical":
        return value
    place = int(np.searchsorted(edges, value, side="right"))
    if not edges:
        return "all"
    if place == 0:
        return f"below {edges[0]:g}"
    return f"{edges[-1]:g} and more" if place == len(edges) else f"{edges[place - 1]:g} to {edges[place]:g}"


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
    figures: Sequence[Judged],
    others: Sequence[Gap] = (),
    seed: int = 0,
) -> list[Gap]:
    """Every figure by every grouping.

    Args:
        schema: of the rows.
        bands: from `groupings`, of the held-out people, so that all figures have the same groups.
        figures: what to judge.
        others: gaps of figures that are no means over volumes (see likeness_by_group.py), to be corrected together with these.
        seed: of bootstrap and permutations.
    """
    found = []
    for name, edges in bands.items():
        covariate = schema[name]
        for figure in figures:
            given = groups_of(covariate, edges, figure.rows)
            keep = [i for i, each in enumerate(given) if each is not None and np.isfinite(figure.values[i])]
            if keep:
                cells = [given[i] for i in keep], figure.values[keep], [figure.people[i] for i in keep]
                found.append(_gap(figure, name, labels_of(covariate, edges), *cells, seed))
    return _corrected([*found, *others])


def _corrected(found: Sequence[Gap]) -> list[Gap]:
    """With p_corrected, by the step-down procedure of Holm (1979)."""
    order = sorted((i for i, gap in enumerate(found) if gap.worst), key=lambda i: found[i].p)
    corrected, so_far = list(found), 0.0
    for place, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - place) * found[i].p))
        corrected[i] = replace(found[i], p_corrected=so_far)
    return corrected


def _gap(
    figure: Judged, grouping: str, order: Sequence[str], labels: Sequence[str], values: NDArray, people: Sequence, seed: int
) -> Gap:
    groups, spread = [], {}
    for k, name in enumerate(order):
        own = [i for i, each in enumerate(labels) if each == name]
        if not own:
            continue
        whom = [people[i] for i in own]
        spread[name] = means(values[own], resamples(whom, seed=seed + k))  # (B,), each group on its own
        groups.append(Group(name, len(own), len(set(whom)), float(values[own].mean()), *interval(spread[name])))
    large, kind = [group for group in groups if group.people >= LEAST], (figure.tolerance, figure.of_measure, figure.decides)
    if len(large) < 2:
        nothing = float("nan")
        return Gap(figure.name, grouping, tuple(groups), "", "", *[nothing] * 5, *kind)
    ranked = sorted(large, key=lambda group: group.value, reverse=figure.better != "high")
    worst, best = ranked[0], ranked[-1]
    low, high = interval(spread[worst.label] - spread[best.label])
    if figure.better == "high":  # a gap is positive, whichever way is worse
        low, high = -high, -low
    kept = [i for i, each in enumerate(labels) if each in {group.label for group in large}]
    chance = _chance(values[kept], [labels[i] for i in kept], [people[i] for i in kept], seed)
    gap = abs(worst.value - best.value)
    found = gap, low, high, float(np.percentile(chance, 95)), float((1 + (chance >= gap).sum()) / (1 + len(chance)))
    return Gap(figure.name, grouping, tuple(groups), worst.label, best.label, *found, *kind)


def _chance(values: NDArray, labels: Sequence[str], people: Sequence[Hashable], seed: int) -> NDArray:
    """Gaps of random groupings, (B,): people change groups, and take all of their volumes along."""
    unit = numbered(list(zip(people, labels)))  # a person of two ages may be in two bands
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
    """`PERMUTATIONS` random orders of so many things in blocks (b, count); figures of the same people share them."""
    if PERMUTATIONS * count > KEPT:
        yield from _drawn(count, seed)
        return
    orders, block = _kept(count, seed), max(1, BLOCK // count)
    yield from (orders[start : start + block] for start in range(0, len(orders), block))


@lru_cache(maxsize=2)
def _kept(count: int, seed: int) -> NDArray:
    return np.concatenate(list(_drawn(count, seed)))


def _drawn(count: int, seed: int) -> Iterator[NDArray]:
    random, block = generator("fairness", seed, count), max(1, BLOCK // count)
    for start in range(0, PERMUTATIONS, block):
        values = torch.rand(min(block, PERMUTATIONS - start), count, generator=random)
        yield values.argsort(dim=1).to(torch.int32).numpy()
