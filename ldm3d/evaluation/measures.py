"""Is a set of synthetic volumes like real ones? Every figure with an interval, and beside it real against real.

The volumes are split at random many times. In each split one half of the real volumes, R, meets as many synthetic ones, S,
and the other half of the real ones, R'. A measure's figure is its mean over the splits of (R, S), its null that of (R, R'):
how far real volumes, as many as those, are from real volumes. The numbers of volumes are the same, so whatever bias a
measure has from them is in both.

Intervals are the middle 95% over splits. For a half of a sample drawn without replacement, these spread as much as the
figure of the whole sample does around its expectation (the delete-half jackknife; Hartigan 1969 on half-samples). A bootstrap
would draw a volume twice, which then is its own nearest neighbour, and every measure of neighbours would say so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ldm3d.errors import InputError
from ldm3d.evaluation import distribution
from ldm3d.evaluation.distribution import Features, Neighbours, check_pair
from ldm3d.evaluation.diversity import four_g_r_ssim, ms_ssim
from ldm3d.randomness import generator

Direction = Literal["low", "high", "real"]
Kind = Literal["features", "maps", "probabilities", "volumes"]
WORSE, CLOSER, AS_REAL, UNDECIDED = "worse than real", "closer than real", "as real", "not told apart"

LEVEL = (0.025, 0.975)
ENOUGH = 50  # volumes on either side below which nothing is called as real: too few to see a difference
LEAST = distribution.K_DENSITY + 1  # volumes in a half
LEAST_UNLIKE = 1e-6  # 1 - similarity of a pair, so that the logarithm of equal volumes is finite


@dataclass(frozen=True)
class Finding:
    """One measure of synthetic volumes, beside the same of real ones.

    Attributes:
        name: of the measure, a key of `MEASURES`.
        value, low, high: of synthetic volumes, with a 95% interval.
        null_low, null_high: 95% of what real volumes reach in their place, as many as those.
        direction: "low" or "high" if that is better, "real" if the best is what real volumes have.
        real, synthetic: volumes on each side of one measurement; pairs of each for measures of pairs.
    """

    name: str
    value: float
    low: float
    high: float
    null_low: float
    null_high: float
    direction: Direction
    real: int
    synthetic: int

    @property
    def verdict(self) -> str:
        """What can be said of it.

        "worse than real": the value is outside of what real volumes reach, on the worse side. "closer than real": outside on
        the better side, which real volumes do not reach either; look for copies. "as real": the whole interval lies within
        the null's, widened by a quarter of its width on either side, and there are enough volumes for that to mean something.
        Else "not told apart".
        """
        if self.value > self.null_high:
            return CLOSER if self.direction == "high" else WORSE
        if self.value < self.null_low:
            return CLOSER if self.direction == "low" else WORSE
        slack = (self.null_high - self.null_low) / 4
        alike = self.null_low - slack <= self.low and self.high <= self.null_high + slack
        return AS_REAL if alike and min(self.real, self.synthetic) >= ENOUGH else UNDECIDED

    def to_dict(self) -> dict[str, Any]:
        """All of it and the verdict, as JSON values."""
        return asdict(self) | {"verdict": self.verdict}


class Pair:
    """Two sets of features, and what several measures need of them, computed once.

    Attributes:
        real, other: (N, D) and (M, D), float64.
    """

    def __init__(self, real: Tensor, other: Tensor):
        self.real, self.other = real, other

    @cached_property
    def frechet(self) -> float:
        return distribution.frechet_distance(self.real, self.other)

    @cached_property
    def frechet_infinity(self) -> float:
        return distribution.frechet_infinity(self.real, self.other, self.frechet)

    @cached_property
    def neighbours(self) -> Neighbours:
        return distribution.neighbours(self.real, self.other)


@dataclass(frozen=True)
class Measure:
    """One line of the table of measures.

    Attributes:
        title: for people.
        kind: of what it looks at: "features" of any extractor, "maps" (features from `spatial_features`), "probabilities"
            of a classifier, or "volumes", two at a time.
        direction: see `Finding`.
        compute: of a `Pair`; for volumes, of two batches (N, 1, X, Y, Z), to (N,).
        reference: where it comes from.
        says: in a few words, what it is for.
    """

    title: str
    kind: Kind
    direction: Direction
    compute: Callable[[Pair], float] | Callable[[Tensor, Tensor], Tensor]
    reference: str
    says: str


MEASURES: dict[str, Measure] = {
    "frechet": Measure(
        "Fréchet distance",
        "features",
        "low",
        lambda pair: pair.frechet,
        "Heusel et al. 2017",
        "means and covariances of all features",
    ),
    "frechet_infinity": Measure(
        "Fréchet distance, extrapolated",
        "features",
        "low",
        lambda pair: pair.frechet_infinity,
        "Chong and Forsyth 2020",
        "the same with its bias by the number of volumes mostly taken off",
    ),
    "kernel_distance": Measure(
        "kernel distance",
        "features",
        "low",
        lambda pair: distribution.kernel_distance(pair.real, pair.other),
        "Bińkowski et al. 2018",
        "the first three moments of features; unbiased",
    ),
    "rbf_mmd": Measure(
        "MMD, Gaussian kernel",
        "features",
        "low",
        lambda pair: distribution.rbf_mmd(pair.real, pair.other),
        "Gretton et al. 2012",
        "any difference of distributions at the scale of typical distances; unbiased",
    ),
    "precision": Measure(
        "precision",
        "features",
        "high",
        lambda pair: pair.neighbours.precision,
        "Kynkäänniemi et al. 2019",
        "share of synthetic volumes among the real ones",
    ),
    "recall": Measure(
        "recall",
        "features",
        "high",
        lambda pair: pair.neighbours.recall,
        "Kynkäänniemi et al. 2019",
        "share of real volumes among the synthetic ones",
    ),
    "density": Measure(
        "density",
        "features",
        "high",
        lambda pair: pair.neighbours.density,
        "Naeem et al. 2020",
        "how deep among the real volumes synthetic ones lie",
    ),
    "coverage": Measure(
        "coverage",
        "features",
        "high",
        lambda pair: pair.neighbours.coverage,
        "Naeem et al. 2020",
        "share of real volumes with a synthetic one near",
    ),
    "nearest_ratio": Measure(
        "distance to the nearest, ratio",
        "features",
        "real",
        lambda pair: pair.neighbours.ratio,
        "after Alaa et al. 2022",
        "below what is real: copies; above: volumes unlike any real one",
    ),
    "spatial_frechet": Measure(
        "spatial Fréchet distance",
        "maps",
        "low",
        lambda pair: pair.frechet,
        "Nash et al. 2021",
        "where in the volume things are: position, side, symmetry",
    ),
    "inception_score": Measure(
        "Inception score",
        "probabilities",
        "real",
        lambda pair: distribution.inception_score(pair.other),
        "Salimans et al. 2016",
        "how many classes a classifier sees, and how surely",
    ),
    "ms_ssim": Measure(
        "MS-SSIM of pairs",
        "volumes",
        "real",
        ms_ssim,
        "Wang et al. 2003",
        "above what is real: less variety; below: more than real",
    ),
    "four_g_r_ssim": Measure(
        "4-G-R-SSIM of pairs",
        "volumes",
        "real",
        four_g_r_ssim,
        "Li and Bovik 2010; Rouse and Hemami 2008; Chen et al. 2006",
        "the same, by edges and texture",
    ),
}


def compare(
    real: Features,
    synthetic: Features,
    kind: Kind = "features",
    subjects: Sequence[Any] | None = None,
    splits: int = 100,
    seed: int = 0,
    measures: dict[str, Measure] = MEASURES,
) -> list[Finding]:
    """Every measure that looks at `kind`, of synthetic against real volumes and of real against real ones.

    Args:
        real: (N, D); better not of volumes that the model was trained on, except to look for copies of them.
        synthetic: (M, D).
        kind: what the rows are: "features", "maps" or "probabilities".
        subjects: of the real volumes, (N,): all volumes of a subject then stay on one side, as they are more alike than
            two people's. None: every volume is another subject's.
        splits: 100 for usual figures; ends of intervals vary less with more.
        seed: of the splits.
        measures: others than those of this file.

    Returns:
        In the order of `measures`. With 2n real volumes and as many synthetic ones, each measurement has n of each.

    Raises:
        InputError: too few volumes, different features, values that are not finite, or no such kind.
    """
    chosen = {name: measure for name, measure in measures.items() if measure.kind == kind != "volumes"}
    if not chosen:
        raise InputError(f"no measure looks at {kind!r} by rows; give features, maps or probabilities, or use `compare_pairs`")
    real, synthetic = check_pair(real, synthetic, 2 * LEAST)
    order = subject_numbers(subjects, len(real))
    half = len(real) // 2
    size = min(len(synthetic) // 2, len(real) - half - int(order.bincount().max()) + 1)
    if size < LEAST:
        raise InputError(
            f"one subject has {int(order.bincount().max())} of {len(real)} real volumes, so the rest cannot be split in two; "
            "leave some of them out"
        )
    found, null = draw(real, synthetic, chosen, order, half, size, splits, seed)
    return [
        Finding(
            name,
            float(np.mean(found[name])),
            *np.quantile(found[name], LEVEL).tolist(),
            *np.quantile(null[name], LEVEL).tolist(),
            measure.direction,
            half,
            size,
        )
        for name, measure in chosen.items()
    ]


def draw(
    real: Tensor,
    synthetic: Tensor,
    measures: dict[str, Measure],
    subjects: Tensor,
    half: int,
    size: int,
    splits: int = 100,
    seed: int = 0,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Every measure in every split: of synthetic against real volumes, and of real against real ones.

    Args:
        real, synthetic: (N, D) and (M, D).
        measures: all of rows, by name.
        subjects: number of each real volume's subject, (N,).
        half, size: real volumes in a split, and others that they meet.
        splits, seed: see `compare`.
    """
    found, null = {name: [] for name in measures}, {name: [] for name in measures}
    for split in range(splits):
        rng = generator(seed, split)
        rows = _halves(subjects, half, size, rng)
        one, other = real[rows[0]], real[rows[1]]
        drawn = synthetic[torch.randperm(len(synthetic), generator=rng)[:size]]
        for results, pair in ((found, Pair(one, drawn)), (null, Pair(one, other))):
            for name, measure in measures.items():
                results[name].append(measure.compute(pair))
    return found, null


def subject_numbers(subjects: Sequence[Any] | None, volumes: int) -> Tensor:
    """Number of each volume's subject, (volumes,); None: all are different."""
    if subjects is None:
        return torch.arange(volumes)
    if len(subjects) != volumes:
        raise InputError(f"{len(subjects)} subjects are given for {volumes} real volumes; give one for each")
    numbers = {}
    return torch.tensor([numbers.setdefault(subject, len(numbers)) for subject in subjects])


def _halves(subjects: Tensor, half: int, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """`half` and `size` rows at random; all of a subject's are in one of the two, or left out."""
    rank = torch.randperm(int(subjects.max()) + 1, generator=rng)
    rows = torch.argsort(rank[subjects], stable=True)  # subject by subject
    one, rest = rows[:half], rows[half:]
    rest = rest[subjects[rest] != subjects[one[-1]]]
    return one, rest[:size]


def compare_pairs(
    real: Sequence[NDArray],
    synthetic: Sequence[NDArray],
    subjects: Sequence[Any] | None = None,
    pairs: int = 100,
    device: str | torch.device = "cpu",
    seed: int = 0,
    measures: dict[str, Measure] = MEASURES,
) -> list[Finding]:
    """Similarity of random pairs of synthetic volumes beside that of random pairs of real ones: how much variety is there?

    A volume is in one pair at most, so pairs are independent and Student's intervals hold: that of the mean over synthetic
    pairs, and as null that in which the mean of as many further real pairs would lie, given these (a prediction interval).
    Means are of log(1 - similarity), which is near a normal distribution, and are brought back: similarities crowd below 1,
    and of 12 pairs of like volumes, 8% instead of 5% came out as unlike by their plain means.

    Args:
        real, synthetic: volumes (X, Y, Z) in [0, 1], all of one shape; anything with a length and an index.
        subjects: of the real volumes: no pair is of one subject. None: every volume is another subject's.
        pairs: at most, of each.
        device: where to compute.
        seed: of the pairs.
        measures: others than those of this file.

    Raises:
        InputError: fewer than 2 pairs of either, or volumes of different shapes.
    """
    chosen = {name: measure for name, measure in measures.items() if measure.kind == "volumes"}
    found = [
        unlikeness(name, volumes, people, pairs, device, seed, chosen)
        for name, volumes, people in (("real", real, subjects), ("synthetic", synthetic, None))
    ]
    figures = []
    for name, measure in chosen.items():
        on_real, on_synthetic = (values[name] for values in found)
        own = _t(len(on_synthetic)) * on_synthetic.std(ddof=1) * math.sqrt(1 / len(on_synthetic))
        usual = _t(len(on_real)) * on_real.std(ddof=1) * math.sqrt(1 / len(on_synthetic) + 1 / len(on_real))
        mean, expected = on_synthetic.mean(), on_real.mean()
        ends = [1 - math.exp(end) for end in (mean, mean + own, mean - own, expected + usual, expected - usual)]
        figures.append(Finding(name, *ends, measure.direction, len(on_real), len(on_synthetic)))
    return figures


def unlikeness(
    name: str,
    volumes: Sequence[NDArray],
    subjects: Sequence[Any] | None,
    pairs: int,
    device: str | torch.device,
    seed: int,
    measures: dict[str, Measure] = MEASURES,
) -> dict[str, NDArray]:
    """log(1 - similarity) of random pairs of volumes, (P,), by each measure of pairs; `name` is of the set.

    Raises:
        InputError: fewer than 2 pairs.
    """
    matched = _pairs(subject_numbers(subjects, len(volumes)), pairs, generator(seed, name))
    if len(matched) < 2:
        raise InputError(f"{len(volumes)} {name} volumes make {len(matched)} pairs, and 2 are needed; give more volumes")
    values = {key: [] for key, measure in measures.items() if measure.kind == "volumes"}
    for i, j in matched:
        one, other = (torch.as_tensor(np.ascontiguousarray(volumes[k], np.float32), device=device)[None, None] for k in (i, j))
        for key, similarities in values.items():
            similarities.append(float(measures[key].compute(one, other)))
    return {key: np.log((1 - np.array(each)).clip(LEAST_UNLIKE)) for key, each in values.items()}


def _t(values: int) -> float:
    return float(stats.t.ppf(LEVEL[1], values - 1))


def _pairs(subjects: Tensor, pairs: int, rng: torch.Generator) -> list[tuple[int, int]]:
    """Up to `pairs` pairs of rows of different subjects; no row twice."""
    rows = torch.randperm(len(subjects), generator=rng).tolist()
    matched = [(i, j) for i, j in zip(rows[::2], rows[1::2]) if subjects[i] != subjects[j]]
    return matched[:pairs]
