"""Are two sets of volumes of one distribution? Metrics of feature sets, each with an interval, beside real against real.

The unit is a person. People are split at random many times. In each split the features of one half of the people, R, are
compared with synthetic volumes, S, and with other people, R'. The figure of a metric is its mean over the splits of (R, S),
its null that of (R, R'): the distance of real volumes from as many real volumes. A bias by the number of volumes is in both.

- A person takes part in a split with one scan, drawn at random. Two scans of one person are nearer than two people, which
  would bias every metric of neighbours: R' would be nearer to R than S can be.
- If the person whose covariates were requested is known, S are volumes generated for the people of R', one for each. A
  difference between S and R' is then not due to which people were drawn. All volumes are used, in one split or another.

Intervals are over splits. For half of a sample, drawn without replacement, figures vary as much as the figure of the whole
sample does around its expectation (the delete-half jackknife; Hartigan 1969 on half-samples). A bootstrap would draw a volume
twice, which is then its own nearest neighbour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm3d.errors import InputError
from ldm3d.evaluation.realism_metrics import REALISM_METRICS, Kind, Metric, Pair
from ldm3d.metrics.distances import K_DENSITY, Features, check_pair
from ldm3d.randomness import generator
from ldm3d.statistics.bootstrap import numbered
from ldm3d.statistics.equivalence import Z_90, Finding

MIN_HALF = K_DENSITY + 1  # volumes in a half
QUANTILES = (0.025, 0.975)  # ends of a 95% interval
TENTH, SHIFT = 0.1, 0.25  # margins, see `realism_metrics.Margin`
MARGIN_SPLITS = 20  # in which a margin is measured; it varies less than the figure itself


@dataclass(frozen=True)
class Splits:
    """How people and synthetic volumes are drawn.

    Attributes:
        subjects: number of each real volume's person, (N,).
        requested: number of the person whose covariates were requested of each synthetic volume, (M,); None: not known.
        half, size: people in R, and in S and R'.
        count, seed: of the splits.
    """

    subjects: Tensor
    requested: Tensor | None
    half: int
    size: int
    count: int
    seed: int

    def rows(self, split: int, synthetic: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of R and of R' among the real volumes, and of S among `synthetic` volumes."""
        rng = generator(self.seed, split)
        order = torch.randperm(int(self.subjects.max()) + 1, generator=rng)
        others = (order if self.requested is None else order[torch.isin(order, self.requested)])[-self.size :]
        people = order[~torch.isin(order, others)][: self.half]
        one, other = one_scan_each(self.subjects, people, rng), one_scan_each(self.subjects, others, rng)
        if self.requested is None:
            return one, other, torch.randperm(synthetic, generator=rng)[: self.size]
        return one, other, one_scan_each(self.requested, others, rng)


def distribution_metrics(
    real: Features,
    synthetic: Features,
    kind: Kind = "features",
    subjects: Sequence[Any] | None = None,
    splits: int = 100,
    seed: int = 0,
    metrics: dict[str, Metric] = REALISM_METRICS,
    requested: Sequence[Any] | None = None,
) -> list[Finding]:
    """Every metric that takes `kind`, of synthetic against real volumes and of real against real ones.

    Args:
        real: (N, D); of held-out volumes, except to look for copies of training volumes.
        synthetic: (M, D).
        kind: what the rows are: "features", "maps" or "probabilities".
        subjects: the person in each real volume, (N,). None: every volume is of another person.
        splits: 100 for usual figures; the ends of intervals vary less with more.
        seed: of the splits.
        metrics: instead of those of the table.
        requested: the person whose covariates were requested of each synthetic volume, (M,), or who was reconstructed.
            None: not known; the volumes of a split are then any.

    Returns:
        In the order of `metrics`. With 2n people and as many synthetic volumes, each measurement has n of each.

    Raises:
        InputError: too few people or volumes, different features, values that are not finite, or no such kind.
    """
    chosen = {name: metric for name, metric in metrics.items() if metric.kind == kind != "volumes"}
    if not chosen:
        raise InputError(f"no metric takes {kind!r}; give features, maps or probabilities, or use `diversity_metrics`")
    real, synthetic = check_pair(real, synthetic, 2 * MIN_HALF)
    order = subject_numbers(subjects, len(real))
    whose = None if requested is None else requested_numbers(subjects, requested, len(real), len(synthetic))
    people, sources = int(order.max()) + 1, len(synthetic) if whose is None else len(whose.unique())
    half = people // 2
    size = min(sources // 2, people - half)
    if size < MIN_HALF:
        raise InputError(
            f"{len(real)} real and {len(synthetic)} synthetic volumes are of {people} people, so that a split has {half} + "
            f"{size} of them; at least {MIN_HALF} + {MIN_HALF} are needed. Evaluate on more people"
        )
    drawn = Splits(order, whose, half, size, splits, seed)
    found, null = in_splits(real, synthetic, chosen, drawn)
    margins = _margins(real, len(synthetic), chosen, null, drawn)
    findings = []
    for name, metric in chosen.items():
        excess, error = excess_of_splits(found[name], null[name], size / min(people, sources))
        values = [float(np.mean(found[name])), *np.quantile(found[name], QUANTILES), *np.quantile(null[name], QUANTILES)]
        interval = excess, excess - Z_90 * error, excess + Z_90 * error
        findings.append(Finding(name, *map(float, values), *interval, margins[name], metric.direction, half, size))
    return findings


def excess_of_splits(found: Sequence[float], null: Sequence[float], part: float) -> tuple[float, float]:
    """Mean of found - null and its standard error, from splits that take this part of the people."""
    excess = np.array(found) - np.array(null)
    return float(excess.mean()), float(excess.std(ddof=1)) * math.sqrt(part / (1 - part))


def in_splits(
    real: Tensor, synthetic: Tensor, metrics: dict[str, Metric], splits: Splits
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Every metric in every split, of synthetic (M, D) against real (N, D) volumes, and of real against real ones."""
    found, null = {name: [] for name in metrics}, {name: [] for name in metrics}
    for split in range(splits.count):
        one, other, chosen = splits.rows(split, len(synthetic))
        for results, pair in ((found, Pair(real[one], synthetic[chosen])), (null, Pair(real[one], real[other]))):
            for name, metric in metrics.items():
                results[name].append(metric.compute(pair))
    return found, null


def _margins(
    real: Tensor, synthetic: int, metrics: dict[str, Metric], null: dict[str, list[float]], splits: Splits
) -> dict[str, float]:
    """The margin of every metric; null from `in_splits`."""
    found = {name: TENTH * abs(float(np.mean(null[name]))) for name in metrics}
    moved = {name: [] for name, metric in metrics.items() if metric.margin == "shift"}
    for split in range(min(splits.count, MARGIN_SPLITS) if moved else 0):
        one, other, _ = splits.rows(split, synthetic)
        pair = Pair(real[one], real[other] + _shift(real, generator(splits.seed, "margin", split)))
        for name, values in moved.items():
            values.append(metrics[name].compute(pair) - null[name][split])
    return found | {name: abs(float(np.mean(values))) for name, values in moved.items()}


def _shift(real: Tensor, rng: torch.Generator) -> Tensor:
    """A vector (D,) of a quarter of the deviation between volumes, in a direction in which people differ."""
    centred = real - real.mean(dim=0)
    direction = torch.randn(len(real), generator=rng, dtype=real.dtype) @ centred
    length = centred.square().sum(dim=1).mean().sqrt()
    return SHIFT * length * direction / direction.norm().clamp_min(1e-12)


def subject_numbers(subjects: Sequence[Any] | None, volumes: int) -> Tensor:
    """Number of each volume's person, (volumes,); None: all are different."""
    if subjects is None:
        return torch.arange(volumes)
    if len(subjects) != volumes:
        raise InputError(f"{len(subjects)} subjects are given for {volumes} real volumes; give one for each")
    return torch.from_numpy(numbered(subjects))


def requested_numbers(subjects: Sequence[Any] | None, requested: Sequence[Any], real: int, synthetic: int) -> Tensor:
    """Number, as by `subject_numbers`, of the person whose covariates each synthetic volume was generated for, (synthetic,).

    Raises:
        InputError: a person who is not among the subjects.
    """
    known = dict(zip(range(real) if subjects is None else subjects, subject_numbers(subjects, real).tolist()))
    unknown = [person for person in requested if person not in known]
    if unknown or len(requested) != synthetic:
        raise InputError(
            f"{len(requested)} people are given for {synthetic} synthetic volumes, {len(unknown)} of them not among the real "
            "volumes' subjects; give one for each, or leave them out"
        )
    return torch.tensor([known[person] for person in requested])


def one_scan_each(whose: Tensor, people: Tensor, rng: torch.Generator) -> Tensor:
    """A random row of each of these people; `whose` has the number of each row's person."""
    order = torch.randperm(len(whose), generator=rng)
    first = torch.full((int(whose.max()) + 1,), len(whose)).scatter_reduce(0, whose[order], torch.arange(len(whose)), "amin")
    return order[first[people]]
