"""Are generated volumes as realistic in every subgroup? The metrics of realism within each group of people.

A distance between two sets is not a mean over volumes, so the permutation test of subgroups.py does not apply. It also grows
with the variance within a group and falls with the number of volumes, which are not properties of the model. So all groups
have the same number of volumes, and the excess is compared: how much further generated volumes (for the covariates of a
group's people) are from that group's real volumes than these are from each other.

The gap that is expected by chance follows from the standard error in each group: it is the range of as many figures that are
equal but for that error. The error is that of the delete-half jackknife, as for the intervals in realism_sets.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ldm3d.covariates import CovariateSchema
from ldm3d.errors import InputError
from ldm3d.evaluation.realism import PAIRED_VOLUMES, FeatureSet
from ldm3d.evaluation.realism_metrics import REALISM_METRICS, Kind
from ldm3d.evaluation.realism_pairs import log_dissimilarities
from ldm3d.evaluation.realism_sets import MIN_HALF, Splits, excess_of_splits, in_splits, requested_numbers, subject_numbers
from ldm3d.evaluation.subgroups import ERROR_TOLERANCE, MIN_GROUP, Gap, Group, groups_of, labels_of
from ldm3d.metrics.features import standardise

CHANCE_DRAWS = 100_000  # of ranges by chance
SHARE_TOLERANCE = 0.1  # gaps of precision, recall, density, coverage, ratios and similarities up to this size are small
Z_95 = 1.96  # standard errors from the centre to the end of a 95% interval


@dataclass(frozen=True)
class Estimate:
    """One metric in one group.

    Attributes:
        excess: of generated volumes over real ones; error: its standard error.
        size: of the metric itself, on generated volumes.
    """

    excess: float
    error: float
    size: float


Groups = Mapping[str, tuple[FeatureSet, FeatureSet]]  # real and generated volumes by label


def realism_gaps(
    schema: CovariateSchema,
    bands: Mapping[str, Sequence[float]],
    real: FeatureSet,
    synthetic: FeatureSet,
    device: str | torch.device = "cpu",
    splits: int = 100,
    seed: int = 0,
) -> list[Gap]:
    """Every metric of realism between the groups of every grouping.

    Args:
        schema, bands: see `ldm3d.evaluation.subgroups.gaps`.
        real: held-out volumes.
        synthetic: generated volumes.
        device: where to compute metrics of pairs.
        splits, seed: see `ldm3d.evaluation.realism_sets`.

    Returns:
        Not yet corrected for their number. Groups of too few people are left out, and so are groupings of fewer than two
        other groups.
    """
    found = []
    for name, edges in bands.items():
        given = [groups_of(schema[name], edges, volumes.rows) for volumes in (real, synthetic)]
        groups = {}
        for label in labels_of(schema[name], edges):
            numbers = ([i for i, each in enumerate(own) if each == label] for own in given)
            both = real.take(next(numbers)), synthetic.take(next(numbers))
            if min(len(set(volumes.people)) for volumes in both) >= MIN_GROUP:
                groups[label] = both
        if len(groups) >= 2:
            sets = [_of_sets(groups, kind, splits, seed) for kind in ("features", "maps")]
            for kind in (*sets, _of_pairs(groups, device, seed)):
                found += [_gap(metric, name, groups, estimates) for metric, estimates in kind]
    return found


def _of_sets(groups: Groups, kind: Kind, splits: int, seed: int) -> Iterator[tuple[str, dict[str, Estimate]]]:
    """Metrics of features or maps, each with its estimate in every group; none if groups are too small."""
    if kind == "maps" and any(each.maps is None for both in groups.values() for volumes in both for each in volumes.volumes):
        return
    subjects = {label: subject_numbers(real.people, len(real.people)) for label, (real, _) in groups.items()}
    requested = {
        label: requested_numbers(real.people, synthetic.people, len(real.people), len(synthetic.people))
        for label, (real, synthetic) in groups.items()
    }
    # Half of the people, as many others, and as many volumes that were generated for these
    size = min(len(own.unique()) // 2 for each in (subjects, requested) for own in each.values())
    if size < MIN_HALF:
        return
    metrics = {name: metric for name, metric in REALISM_METRICS.items() if metric.kind == kind}
    rows = {label: tuple(volumes.stack(kind) for volumes in both) for label, both in groups.items()}
    if kind == "features":  # all groups on one scale
        reference = torch.cat([real for real, _ in rows.values()])
        rows = {label: standardise(reference, *both)[1:] for label, both in rows.items()}
    found = {name: {} for name in metrics}
    for label, (real, synthetic) in rows.items():
        drawn = Splits(subjects[label], requested[label], size, size, splits, seed)
        figures, null = in_splits(real, synthetic, metrics, drawn)
        for name in metrics:
            excess = excess_of_splits(figures[name], null[name], size / len(requested[label].unique()))
            found[name][label] = Estimate(*excess, float(np.mean(figures[name])))
    yield from found.items()


def _of_pairs(groups: Groups, device: str | torch.device, seed: int) -> Iterator[tuple[str, dict[str, Estimate]]]:
    """Metrics of pairs of volumes of one group."""
    found = {}
    for label, both in groups.items():
        try:
            values = [
                log_dissimilarities(name, [v.volume for v in own.volumes], own.people, PAIRED_VOLUMES, device, seed)
                for name, own in zip(("real", "synthetic"), (volumes.paired for volumes in both))
            ]
        except InputError:  # this group has too few pairs, so the others have nothing to be compared with
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


def _gap(name: str, grouping: str, groups: Groups, estimates: Mapping[str, Estimate]) -> Gap:
    metric, found = REALISM_METRICS[name], []
    for label, (real, synthetic) in groups.items():
        value, reach = estimates[label].excess, Z_95 * estimates[label].error
        found.append(Group(label, len(synthetic.volumes), len(set(real.people)), value, value - reach, value + reach))
    ranked = sorted(found, key=lambda group: group.value, reverse=metric.direction != "high")
    worst, best = ranked[0].label, ranked[-1].label
    gap = abs(ranked[0].value - ranked[-1].value)
    reach = Z_95 * math.hypot(estimates[worst].error, estimates[best].error)
    errors = np.array([estimates[label].error for label in groups])
    by_chance = np.ptp(np.random.default_rng(0).standard_normal((CHANCE_DRAWS, len(errors))) * errors, axis=1)
    p = float((1 + (by_chance >= gap).sum()) / (1 + CHANCE_DRAWS))
    chance = float(np.percentile(by_chance, 95))
    size = float(np.mean([abs(each.size) for each in estimates.values()]))
    tolerance = ERROR_TOLERANCE * size if metric.direction == "low" else SHARE_TOLERANCE
    figure = f"{metric.title}, minus real"
    return Gap(figure, grouping, tuple(found), worst, best, gap, gap - reach, gap + reach, chance, p, tolerance)
