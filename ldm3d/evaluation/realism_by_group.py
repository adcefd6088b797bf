"""Are generated volumes as much like real ones for everybody? The measures of distribution, in each group of people by itself.

A distance between two sets is no mean over volumes, so the permutations of fairness.py do not serve. And it grows with how
much the people of a group differ, and falls with the number of volumes, neither of which is the model's doing. So every group
has as many volumes, and what is compared is by how much generated volumes (asked for the covariates of a group's people) are
further from that group's real volumes than these are from each other.

What chance makes of a gap follows from the standard error in each group: the range of as many figures that are all equal but
for that error. It is that of the delete-half jackknife, as for the intervals in measures.py.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.covariates import CovariateSchema, Value
from ldm3d.errors import InputError
from ldm3d.evaluation.measure_table import MEASURES, Kind
from ldm3d.evaluation.measures import LEAST as IN_HALF
from ldm3d.evaluation.measures import asked_numbers, draw, subject_numbers, unlikeness
from ldm3d.evaluation.realism import IN_PAIRS, Seen
from ldm3d.evaluation.subgroups import LEAST, PART, Gap, Group, groups_of, labels_of
from ldm3d.metrics.features import standardise

DRAWS = 100_000  # of ranges by chance
SHARE = 0.1  # a gap of precision, recall, density, coverage, ratio or similarity that is small
REACH = 1.96  # standard errors to the end of a 95% interval


@dataclass(frozen=True)
class SeenVolumes:
    """What was seen of each volume, its covariates (or what was asked of it), and whom it shows."""

    seen: Sequence[Seen]
    rows: Sequence[Mapping[str, Value]]
    people: Sequence[Hashable]

    def take(self, numbers: Sequence[int]) -> "SeenVolumes":
        return SeenVolumes(*([values[i] for i in numbers] for values in (self.seen, self.rows, self.people)))

    def stack(self, name: str) -> Tensor:
        """Their "features" or "maps", (N, D)."""
        return torch.cat([getattr(each, name) for each in self.seen]).double()

    @property
    def kept(self) -> "SeenVolumes":
        """Those that can be seen in pairs."""
        return self.take([i for i, each in enumerate(self.seen) if each.volume is not None])


@dataclass(frozen=True)
class Estimate:
    """One figure of one group.

    Attributes:
        value: of generated volumes less that of real ones.
        error: its standard error.
        size: of the figure itself, on generated volumes.
    """

    value: float
    error: float
    size: float


Groups = Mapping[str, tuple[SeenVolumes, SeenVolumes]]  # real and generated ones by label


def gaps_of_likeness(
    schema: CovariateSchema,
    bands: Mapping[str, Sequence[float]],
    real: SeenVolumes,
    synthetic: SeenVolumes,
    device: str | torch.device = "cpu",
    splits: int = 100,
    seed: int = 0,
) -> list[Gap]:
    """Every measure of likeness between the groups of every grouping.

    Args:
        schema, bands: see `ldm3d.evaluation.subgroups.gaps`.
        real: held-out volumes.
        synthetic: generated volumes.
        device: where to compare pairs.
        splits, seed: see `ldm3d.evaluation.measures.compare`.

    Returns:
        Not yet corrected for their number. Groups of too few people are left out, and a grouping of fewer than two others.
    """
    found = []
    for name, edges in bands.items():
        given = [groups_of(schema[name], edges, volumes.rows) for volumes in (real, synthetic)]
        groups = {}
        for label in labels_of(schema[name], edges):
            numbers = ([i for i, each in enumerate(own) if each == label] for own in given)
            both = real.take(next(numbers)), synthetic.take(next(numbers))
            if min(len(set(volumes.people)) for volumes in both) >= LEAST:
                groups[label] = both
        if len(groups) >= 2:
            kinds = (
                _of_rows(groups, "features", splits, seed),
                _of_rows(groups, "maps", splits, seed),
                _of_pairs(groups, device, seed),
            )
            found += [_gap(measure, name, groups, estimates) for kind in kinds for measure, estimates in kind]
    return found


def _of_rows(groups: Groups, kind: Kind, splits: int, seed: int) -> Iterator[tuple[str, dict[str, Estimate]]]:
    """Measures of features or maps, each with its estimate in every group; nothing where groups are too small."""
    everyone = [each for both in groups.values() for volumes in both for each in volumes.seen]
    if kind == "maps" and any(each.maps is None for each in everyone):
        return
    numbers = {label: subject_numbers(real.people, len(real.people)) for label, (real, _) in groups.items()}
    asked = {
        label: asked_numbers(real.people, synthetic.people, len(real.people), len(synthetic.people))
        for label, (real, synthetic) in groups.items()
    }
    # As in `compare`: a half of the people, as many others, and as many generated volumes asked for these
    size = min(len(own.unique()) // 2 for each in (numbers, asked) for own in each.values())
    if size < IN_HALF:
        return
    measures = {name: measure for name, measure in MEASURES.items() if measure.kind == kind}
    rows = {label: tuple(volumes.stack(kind) for volumes in both) for label, both in groups.items()}
    if kind == "features":  # all groups on one scale
        reference = torch.cat([real for real, _ in rows.values()])
        rows = {label: standardise(reference, *both)[1:] for label, both in rows.items()}
    found = {name: {} for name in measures}
    for label, (real, synthetic) in rows.items():
        figures, null = draw(real, synthetic, measures, numbers[label], size, size, splits, seed, asked[label])
        for name in measures:
            found[name][label] = _of_splits(figures[name], null[name], size / len(asked[label].unique()))
    yield from found.items()


def _of_splits(figures: Sequence[float], null: Sequence[float], part: float) -> Estimate:
    """From figures of splits that take this part of the volumes; those of halves spread as the whole's figure would."""
    beyond = np.array(figures) - np.array(null)
    return Estimate(float(beyond.mean()), float(beyond.std(ddof=1)) * math.sqrt(part / (1 - part)), float(np.mean(figures)))


def _of_pairs(groups: Groups, device: str | torch.device, seed: int) -> Iterator[tuple[str, dict[str, Estimate]]]:
    """Measures of pairs of volumes of one group."""
    found = {}
    for label, both in groups.items():
        try:
            real, synthetic = (volumes.kept for volumes in both)
            values = [
                unlikeness(name, [each.volume for each in volumes.seen], volumes.people, IN_PAIRS, device, seed)
                for name, volumes in (("real", real), ("synthetic", synthetic))
            ]
        except InputError:  # a group has too few pairs, so there is none to compare it with
            return
        for name in values[0]:
            found.setdefault(name, {})[label] = _of_logarithms(*(each[name] for each in values))
    yield from found.items()


def _of_logarithms(real: NDArray, synthetic: NDArray) -> Estimate:
    """From log(1 - similarity) of pairs; the error by the delta method."""
    (on_real, error), (on_synthetic, own) = (
        (math.exp(values.mean()), math.exp(values.mean()) * values.std(ddof=1) / math.sqrt(len(values)))
        for values in (real, synthetic)
    )
    return Estimate(on_real - on_synthetic, math.hypot(error, own), 1 - on_synthetic)


def _gap(measure: str, grouping: str, groups: Groups, estimates: Mapping[str, Estimate]) -> Gap:
    known = MEASURES[measure]
    found = [
        Group(label, len(synthetic.seen), len(set(real.people)), e.value, e.value - REACH * e.error, e.value + REACH * e.error)
        for label, (real, synthetic) in groups.items()
        for e in (estimates[label],)
    ]
    ranked = sorted(found, key=lambda group: group.value, reverse=known.direction != "high")
    worst, best = ranked[0].label, ranked[-1].label
    gap = abs(ranked[0].value - ranked[-1].value)
    reach = REACH * math.hypot(estimates[worst].error, estimates[best].error)
    errors = np.array([estimates[label].error for label in groups])
    by_chance = np.ptp(np.random.default_rng(0).standard_normal((DRAWS, len(errors))) * errors, axis=1)
    p = float((1 + (by_chance >= gap).sum()) / (1 + DRAWS))
    size = float(np.mean([abs(each.size) for each in estimates.values()]))
    return Gap(
        f"{known.title}, beyond real",
        grouping,
        tuple(found),
        worst,
        best,
        gap,
        gap - reach,
        gap + reach,
        float(np.percentile(by_chance, 95)),
        p,
        PART * size if known.direction == "low" else SHARE,
    )
