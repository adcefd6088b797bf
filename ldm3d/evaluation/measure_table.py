"""The measures of likeness: what each looks at, where it comes from, and how much of it is still called the same."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from ldm3d.metrics import distances as distribution
from ldm3d.metrics.distances import Neighbours
from ldm3d.metrics.similarity import four_g_r_ssim, ms_ssim
from ldm3d.statistics.equivalence import Direction

Kind = Literal["features", "maps", "probabilities", "volumes"]

# What the margin is, in units that do not depend on the number of volumes:
# - "tenth": a tenth of what real volumes reach. Of precision and density this is what they lose if one volume in ten is unlike
#   any real one; of recall and coverage, if one person in ten has no like; of spread, a tenth less of it.
# - "shift": what the measure says of these real volumes, all moved by a quarter of the spread between them. Measured.
# - "spread": what it says of pairs of these real volumes that differ by a tenth less. Measured.
Margin = Literal["tenth", "shift", "spread"]


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
        margin: the largest difference from real volumes that is called the same, see `Margin`.
        decides: whether the light can be green only if this one is within its margin. Those that need several times as
            many volumes to be sure of it do not decide; the light is red all the same if one of them is beyond its margin.
    """

    title: str
    kind: Kind
    direction: Direction
    compute: Callable[[Pair], float] | Callable[[Tensor, Tensor], Tensor]
    reference: str
    says: str
    margin: Margin = "tenth"
    decides: bool = False


MEASURES: dict[str, Measure] = {
    "frechet": Measure(
        "Fréchet distance",
        "features",
        "low",
        lambda pair: pair.frechet,
        "Heusel et al. 2017",
        "means and covariances of all features",
        margin="shift",
    ),
    "frechet_infinity": Measure(
        "Fréchet distance, extrapolated",
        "features",
        "low",
        lambda pair: pair.frechet_infinity,
        "Chong and Forsyth 2020",
        "the same with its bias by the number of volumes mostly taken off",
        margin="shift",
    ),
    "kernel_distance": Measure(
        "kernel distance",
        "features",
        "low",
        lambda pair: distribution.kernel_distance(pair.real, pair.other),
        "Bińkowski et al. 2018",
        "the first three moments of features; unbiased",
        margin="shift",
        decides=True,
    ),
    "rbf_mmd": Measure(
        "MMD, Gaussian kernel",
        "features",
        "low",
        lambda pair: distribution.rbf_mmd(pair.real, pair.other),
        "Gretton et al. 2012",
        "any difference of distributions at the scale of typical distances; unbiased",
        margin="shift",
        decides=True,
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
        decides=True,
    ),
    "nearest_ratio": Measure(
        "distance to the nearest, ratio",
        "features",
        "real",
        lambda pair: pair.neighbours.ratio,
        "after Alaa et al. 2022",
        "below what is real: copies; above: volumes unlike any real one",
        decides=True,
    ),
    "spread": Measure(
        "spread, ratio",
        "features",
        "real",
        lambda pair: distribution.spread_ratio(pair.real, pair.other),
        "after Rao 1982",
        "how far two volumes are from each other; below 1: less variety than real, above: more",
        decides=True,
    ),
    "spatial_frechet": Measure(
        "spatial Fréchet distance",
        "maps",
        "low",
        lambda pair: pair.frechet,
        "Nash et al. 2021",
        "where in the volume things are: position, side, symmetry",
        margin="shift",
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
        margin="spread",
    ),
    "four_g_r_ssim": Measure(
        "4-G-R-SSIM of pairs",
        "volumes",
        "real",
        four_g_r_ssim,
        "Li and Bovik 2010; Rouse and Hemami 2008; Chen et al. 2006",
        "the same, by edges and texture",
        margin="spread",
    ),
}
