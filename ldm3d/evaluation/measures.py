"""Is a set of synthetic volumes like real ones? Every figure with an interval, and beside it real against real.

Everything counts people, not volumes. They are split at random many times. In each split one half of the people, R, meets
synthetic volumes, S, and other people, R'. A measure's figure is its mean over the splits of (R, S), its null that of
(R, R'): how far real volumes, as many as those, are from real volumes. The numbers of volumes are the same, so whatever bias a
measure has from them is in both.

- A person stands in a split with one scan, drawn at random. Two scans of one person are nearer than two people, and every
  measure of neighbours would say so: of R alone, for S has nobody twice.
- Where it is known whose covariates were asked of a synthetic volume, S are volumes asked for the people of R', one for
  each. A difference between S and R' is then the model's, not that of the people whom chance put there; and one who
  was asked for several times counts once, as on the other side. All volumes serve, in one split or another.

Intervals are over splits. For a half of a sample drawn without replacement, figures spread as much as the
figure of the whole sample does around its expectation (the delete-half jackknife; Hartigan 1969 on half-samples). A bootstrap
would draw a volume twice, which then is its own nearest neighbour, and every measure of neighbours would say so.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ldm3d.errors import InputError
from ldm3d.evaluation.measure_table import MEASURES, Kind, Measure, Pair
from ldm3d.metrics import distances as distribution
from ldm3d.metrics.distances import Features, check_pair
from ldm3d.randomness import generator
from ldm3d.statistics.equivalence import LEVEL, REACH, SPREAD, STEP, TENTH, Finding

LEAST = distribution.K_DENSITY + 1  # volumes in a half
LEAST_UNLIKE = 1e-6  # 1 - similarity of a pair, so that the logarithm of equal volumes is finite
MARGIN_SPLITS, MARGIN_PAIRS = 20, 10  # in which a margin is measured: it varies less than what is held against it


def compare(
    real: Features,
    synthetic: Features,
    kind: Kind = "features",
    subjects: Sequence[Any] | None = None,
    splits: int = 100,
    seed: int = 0,
    measures: dict[str, Measure] = MEASURES,
    asked: Sequence[Any] | None = None,
) -> list[Finding]:
    """Every measure that looks at `kind`, of synthetic against real volumes and of real against real ones.

    Args:
        real: (N, D); better not of volumes that the model was trained on, except to look for copies of them.
        synthetic: (M, D).
        kind: what the rows are: "features", "maps" or "probabilities".
        subjects: of the real volumes, (N,): whom each shows. None: every volume is another subject's.
        splits: 100 for usual figures; ends of intervals vary less with more.
        seed: of the splits.
        measures: others than those of this file.
        asked: of the synthetic volumes, (M,): which of the subjects' covariates was asked, or who was reconstructed.
            None: not known; the volumes of a split are then any.

    Returns:
        In the order of `measures`. With 2n people and as many synthetic volumes, each measurement has n of each.

    Raises:
        InputError: too few people or volumes, different features, values that are not finite, or no such kind.
    """
    chosen = {name: measure for name, measure in measures.items() if measure.kind == kind != "volumes"}
    if not chosen:
        raise InputError(f"no measure looks at {kind!r} by rows; give features, maps or probabilities, or use `compare_pairs`")
    real, synthetic = check_pair(real, synthetic, 2 * LEAST)
    order = subject_numbers(subjects, len(real))
    whose = None if asked is None else asked_numbers(subjects, asked, len(real), len(synthetic))
    half, size = sizes(order, whose, len(synthetic))
    if size < LEAST:
        raise InputError(
            f"{len(real)} real and {len(synthetic)} synthetic volumes are of {int(order.max()) + 1} people, who make "
            f"splits of {half} + {size}, and {LEAST} + {LEAST} are needed; give more people"
        )
    drawn = order, half, size, splits, seed, whose
    found, null = draw(real, synthetic, chosen, *drawn)
    margins = _margins(real, chosen, null, *drawn)
    part = size / min(int(order.max()) + 1, len(synthetic) if whose is None else len(whose.unique()))
    return [
        Finding(
            name,
            float(np.mean(found[name])),
            *np.quantile(found[name], LEVEL).tolist(),
            *np.quantile(null[name], LEVEL).tolist(),
            *_excess(found[name], null[name], part),
            margins[name],
            measure.direction,
            half,
            size,
        )
        for name, measure in chosen.items()
    ]


def _excess(found: Sequence[float], null: Sequence[float], part: float) -> tuple[float, float, float]:
    """Of one over the other, with its 90% interval, from splits that take this part of the people."""
    beyond = np.array(found) - np.array(null)
    reach = REACH * float(beyond.std(ddof=1)) * math.sqrt(part / (1 - part))
    return float(beyond.mean()), float(beyond.mean()) - reach, float(beyond.mean()) + reach


def draw(
    real: Tensor,
    synthetic: Tensor,
    measures: dict[str, Measure],
    subjects: Tensor,
    half: int,
    size: int,
    splits: int = 100,
    seed: int = 0,
    asked: Tensor | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Every measure in every split: of synthetic against real volumes, and of real against real ones.

    Args:
        real, synthetic: (N, D) and (M, D).
        measures: all of rows, by name.
        subjects: number of each real volume's subject, (N,).
        half, size: people in a split, and others that they meet, from `sizes`.
        splits, seed: see `compare`.
        asked: number of the subject whose covariates each synthetic volume was asked for, (M,); None: not known.
    """
    found, null = {name: [] for name in measures}, {name: [] for name in measures}
    for split in range(splits):
        rng = generator(seed, split)
        one, other, whom = _split(subjects, half, size, rng, asked)
        chosen = torch.randperm(len(synthetic), generator=rng)[:size] if asked is None else _one_each(asked, whom, rng)
        for results, pair in ((found, Pair(real[one], synthetic[chosen])), (null, Pair(real[one], real[other]))):
            for name, measure in measures.items():
                results[name].append(measure.compute(pair))
    return found, null


def _margins(
    real: Tensor,
    measures: dict[str, Measure],
    null: dict[str, list[float]],
    subjects: Tensor,
    half: int,
    size: int,
    splits: int,
    seed: int,
    asked: Tensor | None,
) -> dict[str, float]:
    """The margin of every measure; null from `draw`, and the other arguments as they were given to it."""
    found = {name: TENTH * abs(float(np.mean(null[name]))) for name in measures}
    moved = {name: [] for name, measure in measures.items() if measure.margin == "shift"}
    for split in range(min(splits, MARGIN_SPLITS) if moved else 0):
        one, other, _ = _split(subjects, half, size, generator(seed, split), asked)
        pair = Pair(real[one], real[other] + _step(real, generator(seed, "margin", split)))
        for name, values in moved.items():
            values.append(measures[name].compute(pair) - null[name][split])
    return found | {name: abs(float(np.mean(values))) for name, values in moved.items()}


def _step(real: Tensor, rng: torch.Generator) -> Tensor:
    """A shift (D,), a quarter as long as volumes deviate from their mean, in a direction in which people differ."""
    centred = real - real.mean(dim=0)
    direction = torch.randn(len(real), generator=rng, dtype=real.dtype) @ centred
    length = centred.square().sum(dim=1).mean().sqrt()
    return STEP * length * direction / direction.norm().clamp_min(1e-12)


def subject_numbers(subjects: Sequence[Any] | None, volumes: int) -> Tensor:
    """Number of each volume's subject, (volumes,); None: all are different."""
    if subjects is None:
        return torch.arange(volumes)
    if len(subjects) != volumes:
        raise InputError(f"{len(subjects)} subjects are given for {volumes} real volumes; give one for each")
    numbers = {}
    return torch.tensor([numbers.setdefault(subject, len(numbers)) for subject in subjects])


def asked_numbers(subjects: Sequence[Any] | None, asked: Sequence[Any], real: int, synthetic: int) -> Tensor:
    """Number, as by `subject_numbers`, of the subject that each synthetic volume was asked for, (synthetic,).

    Raises:
        InputError: someone who is not among the subjects.
    """
    whom = range(real) if subjects is None else subjects
    known = dict(zip(whom, subject_numbers(subjects, real).tolist()))
    strangers = [person for person in asked if person not in known]
    if strangers or len(asked) != synthetic:
        raise InputError(
            f"{len(asked)} people are given for {synthetic} synthetic volumes, {len(strangers)} of them not among the real "
            "volumes' subjects; give one for each, or leave them out"
        )
    return torch.tensor([known[person] for person in asked])


def sizes(subjects: Tensor, asked: Tensor | None, synthetic: int) -> tuple[int, int]:
    """People in a split, and others that they meet: a half of all people, and of those that were asked for."""
    people = int(subjects.max()) + 1
    half = people // 2
    return half, min((synthetic if asked is None else len(asked.unique())) // 2, people - half)


def _split(
    subjects: Tensor, half: int, size: int, rng: torch.Generator, asked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `half` people and of `size` others, one of each at random; and these others' numbers.

    The others are people who were asked for, where that is known.
    """
    order = torch.randperm(int(subjects.max()) + 1, generator=rng)
    others = (order if asked is None else order[torch.isin(order, asked)])[-size:]
    people = order[~torch.isin(order, others)][:half]
    return _one_each(subjects, people, rng), _one_each(subjects, others, rng), others


def _one_each(whose: Tensor, people: Tensor, rng: torch.Generator) -> Tensor:
    """For every one of the people a row of theirs at random; `whose` has the number of each row's."""
    order = torch.randperm(len(whose), generator=rng)
    first = torch.full((int(whose.max()) + 1,), len(whose)).scatter_reduce(0, whose[order], torch.arange(len(whose)), "amin")
    return order[first[people]]


def compare_pairs(
    real: Sequence[NDArray],
    synthetic: Sequence[NDArray],
    subjects: Sequence[Any] | None = None,
    pairs: int = 100,
    device: str | torch.device = "cpu",
    seed: int = 0,
    measures: dict[str, Measure] = MEASURES,
    asked: Sequence[Any] | None = None,
) -> list[Finding]:
    """Similarity of random pairs of synthetic volumes beside that of random pairs of real ones: how much variety is there?

    A person is in one pair at most, so pairs are independent and Student's intervals hold: that of the mean over synthetic
    pairs, and as null that in which the mean of as many further real pairs would lie, given these (a prediction interval).
    Means are of log(1 - similarity), which is near a normal distribution, and are brought back: similarities crowd below 1,
    and of 12 pairs of like volumes, 8% instead of 5% came out as unlike by their plain means. The excess and its margin are
    of these means too, brought to the scale of similarities by the slope there.

    Args:
        real, synthetic: volumes (C, X, Y, Z) in [0, 1], all of one shape; anything with a length and an index.
        subjects: of the real volumes. None: every volume is another subject's.
        pairs: at most, of each.
        device: where to compute.
        seed: of the pairs.
        measures: others than those of this file.
        asked: of the synthetic volumes, whose covariates were asked. None: of every volume another one's.

    Raises:
        InputError: fewer than 2 pairs of either, or volumes of different shapes.
    """
    chosen = {name: measure for name, measure in measures.items() if measure.kind == "volumes"}
    found = [
        unlikeness(name, volumes, people, pairs, device, seed, chosen)
        for name, volumes, people in (("real", real, subjects), ("synthetic", synthetic, asked))
    ]
    few = min(pairs, MARGIN_PAIRS)
    apart = unlikeness("real", real, subjects, few, device, seed, chosen, SPREAD)
    figures = []
    for name, measure in chosen.items():
        on_real, on_synthetic = (values[name] for values in found)
        own = _t(len(on_synthetic)) * on_synthetic.std(ddof=1) * math.sqrt(1 / len(on_synthetic))
        usual = _t(len(on_real)) * on_real.std(ddof=1) * math.sqrt(1 / len(on_synthetic) + 1 / len(on_real))
        mean, expected = on_synthetic.mean(), on_real.mean()
        ends = [1 - math.exp(end) for end in (mean, mean + own, mean - own, expected + usual, expected - usual)]
        slope, excess = math.exp(expected), expected - mean
        error = math.hypot(*(values.std(ddof=1) / math.sqrt(len(values)) for values in (on_real, on_synthetic)))
        reach = float(stats.t.ppf(stats.norm.cdf(REACH), min(len(on_real), len(on_synthetic)) - 1)) * error
        margin = abs(float(np.mean(apart[name] - on_real[: len(apart[name])])))
        scaled = [float(slope * value) for value in (excess, excess - reach, excess + reach, margin)]
        figures.append(Finding(name, *ends, *scaled, measure.direction, len(on_real), len(on_synthetic)))
    return figures


def unlikeness(
    name: str,
    volumes: Sequence[NDArray],
    subjects: Sequence[Any] | None,
    pairs: int,
    device: str | torch.device,
    seed: int,
    measures: dict[str, Measure] = MEASURES,
    apart: float = 1.0,
) -> dict[str, NDArray]:
    """log(1 - similarity) of random pairs of volumes, (P,), by each measure of pairs; `name` is of the set.

    The two of a pair are first brought nearer to each other, to the part `apart` of their difference.

    Raises:
        InputError: fewer than 2 pairs.
    """
    matched = _pairs(subject_numbers(subjects, len(volumes)), pairs, generator(seed, name))
    if len(matched) < 2:
        raise InputError(f"{len(volumes)} {name} volumes make {len(matched)} pairs, and 2 are needed; give more volumes")
    values = {key: [] for key, measure in measures.items() if measure.kind == "volumes"}
    for i, j in matched:
        one, other = (torch.as_tensor(np.ascontiguousarray(volumes[k], np.float32), device=device)[None] for k in (i, j))
        if apart != 1:
            one, other = (torch.lerp(*both, (1 - apart) / 2) for both in ((one, other), (other, one)))
        for key, similarities in values.items():
            similarities.append(float(measures[key].compute(one, other)))
    return {key: np.log((1 - np.array(each)).clip(LEAST_UNLIKE)) for key, each in values.items()}


def _t(values: int) -> float:
    return float(stats.t.ppf(LEVEL[1], values - 1))


def _pairs(subjects: Tensor, pairs: int, rng: torch.Generator) -> list[tuple[int, int]]:
    """Up to `pairs` pairs of rows of different subjects; nobody is in two of them."""
    people = torch.randperm(len(subjects.unique()), generator=rng)
    rows = _one_each(subjects, people, rng).tolist() if len(people) else []
    return list(zip(rows[::2], rows[1::2]))[:pairs]
