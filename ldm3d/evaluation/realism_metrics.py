"""The metrics of realism: the input of each, its source, and its equivalence margin."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from ldm3d.metrics import distances
from ldm3d.metrics.distances import Neighbours
from ldm3d.metrics.similarity import four_g_r_ssim, ms_ssim
from ldm3d.statistics.equivalence import Direction

Kind = Literal["features", "maps", "probabilities", "volumes"]

# Equivalence margins, in units that do not depend on the number of volumes:
# - "tenth": a tenth of the value of real volumes. Precision and density lose this much if one volume in ten is unlike any real
#   one; recall and coverage, if one person in ten has no counterpart; spread, if volumes differ a tenth less.
# - "shift": the metric's change when these real volumes are moved by a quarter of the deviation between them. Measured.
# - "spread": its change when the two volumes of each real pair are brought a tenth nearer to each other. Measured.
Margin = Literal["tenth", "shift", "spread"]


class Pair:
    """Two sets of features (N, D) and (M, D), float64; what several metrics need of them is computed once."""

    def __init__(self, real: Tensor, other: Tensor):
        self.real, self.other = real, other

    @cached_property
    def frechet(self) -> float:
        return distances.frechet_distance(self.real, self.other)

    @cached_property
    def frechet_infinity(self) -> float:
        return distances.frechet_infinity(self.real, self.other, self.frechet)

    @cached_property
    def neighbours(self) -> Neighbours:
        return distances.neighbours(self.real, self.other)


@dataclass(frozen=True)
class Metric:
    """One metric of realism.

    Attributes:
        title: for tables.
        kind: its input: "features" of any extractor, "maps" (features from `spatial_features`), "probabilities" of a
            classifier, or "volumes", two at a time.
        direction: see `Finding`.
        compute: of a `Pair`; for volumes, of two batches (N, 1, X, Y, Z), to (N,).
        reference: its source.
        says: what it is sensitive to, in a few words.
        margin: the largest difference from real volumes that counts as equivalent, see `Margin`.
        decides: whether the light is green only if this metric is within its margin. Metrics that need several times as many
            volumes do not decide, but turn the light red if they are beyond their margin.
    """

    title: str
    kind: Kind
    direction: Direction
    compute: Callable[[Pair], float] | Callable[[Tensor, Tensor], Tensor]
    reference: str
    says: str
    margin: Margin = "tenth"
    decides: bool = False


def _frechet(pair: Pair) -> float:
    return pair.frechet


# fmt: off
REALISM_METRICS: dict[str, Metric] = {
    "frechet": Metric(
        "Fréchet distance", "features", "low", _frechet, "Heusel et al. 2017",
        "means and covariances of all features", margin="shift",
    ),
    "frechet_infinity": Metric(
        "Fréchet distance, extrapolated", "features", "low", lambda pair: pair.frechet_infinity, "Chong and Forsyth 2020",
        "the same, with most of the bias by the number of volumes removed", margin="shift",
    ),
    "kernel_distance": Metric(
        "kernel distance", "features", "low", lambda pair: distances.kernel_distance(pair.real, pair.other),
        "Bińkowski et al. 2018", "the first three moments of features; unbiased", margin="shift", decides=True,
    ),
    "rbf_mmd": Metric(
        "MMD, Gaussian kernel", "features", "low", lambda pair: distances.rbf_mmd(pair.real, pair.other),
        "Gretton et al. 2012", "any difference of distributions at the scale of typical distances; unbiased",
        margin="shift", decides=True,
    ),
    "precision": Metric(
        "precision", "features", "high", lambda pair: pair.neighbours.precision, "Kynkäänniemi et al. 2019",
        "share of synthetic volumes among the real ones",
    ),
    "recall": Metric(
        "recall", "features", "high", lambda pair: pair.neighbours.recall, "Kynkäänniemi et al. 2019",
        "share of real volumes among the synthetic ones",
    ),
    "density": Metric(
        "density", "features", "high", lambda pair: pair.neighbours.density, "Naeem et al. 2020",
        "how deep among the real volumes synthetic ones lie",
    ),
    "coverage": Metric(
        "coverage", "features", "high", lambda pair: pair.neighbours.coverage, "Naeem et al. 2020",
        "share of real volumes with a synthetic one nearby", decides=True,
    ),
    "nearest_ratio": Metric(
        "distance to the nearest, ratio", "features", "real", lambda pair: pair.neighbours.ratio, "after Alaa et al. 2022",
        "below that of real volumes: copies; above: volumes unlike any real one", decides=True,
    ),
    "spread": Metric(
        "spread, ratio", "features", "real", lambda pair: distances.spread_ratio(pair.real, pair.other), "after Rao 1982",
        "mean distance of two volumes; below 1: less variety than real volumes, above: more", decides=True,
    ),
    "spatial_frechet": Metric(
        "spatial Fréchet distance", "maps", "low", _frechet, "Nash et al. 2021",
        "where structures are: position, side, symmetry", margin="shift",
    ),
    "inception_score": Metric(
        "Inception score", "probabilities", "real", lambda pair: distances.inception_score(pair.other),
        "Salimans et al. 2016", "number of classes that a classifier sees, and its certainty",
    ),
    "ms_ssim": Metric(
        "MS-SSIM of pairs", "volumes", "real", ms_ssim, "Wang et al. 2003",
        "above that of real pairs: less variety; below: more", margin="spread",
    ),
    "four_g_r_ssim": Metric(
        "4-G-R-SSIM of pairs", "volumes", "real", four_g_r_ssim,
        "Li and Bovik 2010; Rouse and Hemami 2008; Chen et al. 2006", "the same, by edges and texture", margin="spread",
    ),
}
# fmt: on
