"""Does a segmentation of synthetic brains look like one of real brains?

A segmentation network divides every volume into classes. Each figure of a class (volume, surface, thickness, asymmetry,
overlap with the nearest real anatomy) is then compared with its middle 90% among real people: a model that draws brains like
theirs has 90% of its own there. Fewer: it draws what people hardly have. More: it draws the usual brain too often.

Intervals and verdicts are those of `ldm3d.statistics.equivalence`, with draws of the bootstrap over people. A person's real
volumes and those that were generated for this person are drawn together.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.metrics.anatomy import describe_classes, dice, overlaps
from ldm3d.processes import ALONE, Processes, share_work
from ldm3d.rulers.segmenter import Segmenter
from ldm3d.statistics.bootstrap import interval, mean_interval, numbered, resamples
from ldm3d.statistics.equivalence import Finding

TAIL = 0.05  # of real people on either side of the middle 90%
MARGIN = 0.1  # one volume in ten with an anatomy that people hardly have
REFERENCES = 50  # people among whom the nearest anatomy is looked for
MAX_SIDE = 96  # voxels of a class map that is kept, so that hundreds of them fit into memory
MISSING = -1e6  # of a class that is not there: below all others, and normal where real people lack it too
ALL = "all"  # the mean over figures
PERCENTILES_90 = (5, 95)


@dataclass(frozen=True)
class Segmented:
    """What is kept of one volume: figures of its class map, and the class map itself, every k-th voxel if it is large."""

    figures: dict[str, float]
    classes: NDArray


def segment(volume: NDArray, segmenter: Segmenter, spacing_mm: Sequence[float]) -> Segmented:
    """Of a volume (X, Y, Z) in [0, 1]."""
    classes = segmenter.classes(volume)
    step = -(-max(classes.shape) // MAX_SIDE)
    return Segmented(describe_classes(classes, class_names(segmenter), spacing_mm), classes[::step, ::step, ::step].copy())


def class_names(segmenter: Segmenter) -> list[str]:
    """Its names without units: "ventricular_volume_ml", of the quantity that it measures, is "ventricular"."""
    short = [name.removesuffix("_ml").removesuffix("_volume") for name in segmenter.names]
    return short if len(set(short)) == len(short) else segmenter.names


@dataclass(frozen=True)
class Anatomy:
    """Class maps of synthetic volumes beside those of real ones.

    Attributes:
        names: of the figures, such as "grey_volume_ml".
        values: "real", "reconstructed" and "generated" -> figures of each volume, (N, F).
        generated, reconstructed: share of these volumes within the middle 90% of real ones, of each figure, and first the mean
            over figures, `ALL`.
        dice: class -> its overlap in each reconstruction with the original, (N,).
        people: in each real volume.
    """

    names: list[str]
    values: dict[str, NDArray]
    generated: list[Finding]
    reconstructed: list[Finding]
    dice: dict[str, NDArray]
    people: Sequence[Hashable]

    def middle(self, name: str) -> tuple[float, float]:
        """Ends of the middle 90% of real people."""
        values = self.values["real"][:, self.names.index(name)]
        low, high = (float(end[0, 0]) for end in _middle(values[:, None], np.ones((1, len(values)))))
        return low, high

    def mean_dice(self, name: str) -> tuple[float, tuple[float, float]]:
        """Mean overlap of a class with its 95% interval; NaN if no volume has it."""
        known = np.isfinite(self.dice[name])
        if not known.any():
            return float("nan"), (float("nan"), float("nan"))
        people = [person for person, there in zip(self.people, known) if there]
        return float(self.dice[name][known].mean()), mean_interval(self.dice[name][known], people)

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON values."""
        found = {"middle": {name: list(self.middle(name)) for name in self.names}}
        found |= {kind: [each.to_dict() for each in getattr(self, kind)] for kind in ("generated", "reconstructed")}
        overlap = {name: self.mean_dice(name) for name in self.dice}
        return found | {"dice": {name: {"mean": mean, "interval": list(ends)} for name, (mean, ends) in overlap.items()}}


def compare_anatomy(
    real: Sequence[Segmented],
    reconstructed: Sequence[Segmented],
    generated: Sequence[Segmented],
    classes: Sequence[str],
    people: Sequence[Hashable],
    requested: Sequence[Hashable],
    order: Sequence[int],
    processes: Processes = ALONE,
) -> Anatomy:
    """Compare the anatomy of held-out, reconstructed and generated volumes.

    Args:
        real, reconstructed: of the same held-out volumes.
        generated: for covariates of held-out people.
        classes: their names.
        people, requested: the person in each held-out volume, and for whose covariates each one was generated.
        order: of held-out volumes, in which references are chosen (see `ldm3d.evaluation.selection`).
        processes: that share the work.
    """
    references = dict(zip((people[i] for i in reversed(order)), reversed(order)))  # the first scan of each person
    chosen = [i for i in order if references[people[i]] == i][: REFERENCES + 1]
    owners = {"real": people, "reconstructed": people, "generated": requested}
    sets = {"real": real, "reconstructed": reconstructed, "generated": generated}

    def work(item: tuple[str, int]) -> list[float]:
        kind, i = item
        others = [real[j].classes for j in chosen if people[j] != owners[kind][i]][:REFERENCES]
        nearest = overlaps(sets[kind][i].classes, others, classes)
        figures = sets[kind][i].figures
        return [*figures.values(), *(nearest[name] for name in classes)]

    items = [(kind, i) for kind, each in sets.items() for i in range(len(each))]
    done = share_work(work, items, processes, "compare anatomies", "volume")
    names = [*real[0].figures, *(f"{name}_overlap" for name in classes)]
    values = {kind: np.array([d for (k, _), d in zip(items, done) if k == kind]) for kind in sets}
    known = {kind: np.nan_to_num(each, nan=MISSING) for kind, each in values.items()}
    findings = {
        kind: compare_figures(names, known["real"], known[kind], people, owners[kind])
        for kind in ("generated", "reconstructed")
    }
    kept = [dice(a.classes, b.classes, classes) for a, b in zip(real, reconstructed)]
    return Anatomy(names, values, **findings, dice={n: np.array([d[n] for d in kept]) for n in classes}, people=people)


def compare_figures(
    names: Sequence[str], real: NDArray, other: NDArray, people: Sequence[Hashable], requested: Sequence[Hashable]
) -> list[Finding]:
    """Share of other volumes within the middle 90% of real ones, for the mean over figures and for each.

    Args:
        names: of F figures.
        real, other: (N, F) and (M, F).
        people, requested: of each row.

    Returns:
        `Finding`s, whose excess is over the share of real volumes in the middle 90% of other real people.
    """
    drawn = resamples([*people, *requested])  # (B, N + M), the volumes of a person together
    again = resamples(people, seed=1)  # other people from the same population
    ends = _middle(real, drawn[:, : len(real)])
    draws, null = _shares(other, drawn[:, len(real) :], ends), _shares(real, again, ends)  # (B, F)
    value = _shares(other, np.ones((1, len(other))), _middle(real, np.ones((1, len(real)))))[0]  # (F,)
    own = np.equal.outer(numbered(people), numbered(people)).astype(float)  # (N, N)
    without = _middle(real, 1 - own)  # each person in the middle of the others
    usual = ((real >= without[0]) & (real <= without[1])).mean(axis=0)  # (F,)
    # Ends of the middle vary more in resamples, which have fewer different people, so that less lies between them
    draws, null = ((d - d.mean(axis=0) + centre).clip(0, 1) for d, centre in ((draws, value), (null, usual)))
    rows = [(ALL, value.mean(), draws.mean(axis=1), null.mean(axis=1), usual.mean())]
    rows += [(name, value[f], draws[:, f], null[:, f], usual[f]) for f, name in enumerate(names)]
    sizes = len(set(people)), len(set(requested))
    return [
        Finding(
            *(name, float(share), *interval(own), *interval(by_chance), float(share - mean)),
            *(float(end) for end in np.percentile(own - mean, PERCENTILES_90)),
            *(MARGIN, "high", *sizes),
        )
        for name, share, own, by_chance, mean in rows
    ]


def _middle(values: NDArray, weights: NDArray) -> tuple[NDArray, NDArray]:
    """Ends of the middle 90% of values (N, F), for each row of weights (B, N): two of (B, F)."""
    order = values.argsort(axis=0)  # (N, F)
    part = TAIL * weights.sum(axis=1, keepdims=True) - 1e-9
    low, high = np.empty((2, len(weights), values.shape[1]))
    for f, up in enumerate(order.T):
        for ends, rows in ((low, up), (high, up[::-1])):
            ends[:, f] = values[rows[(weights[:, rows].cumsum(axis=1) >= part).argmax(axis=1)], f]
    return low, high


def _shares(values: NDArray, weights: NDArray, ends: tuple[NDArray, NDArray]) -> NDArray:
    """Weighted share of values (M, F) between ends (B, F), both included, for weights (B, M): (B, F)."""
    low, high = ends
    total = weights.sum(axis=1).clip(min=1)
    inside = [((v >= low[:, f, None]) & (v <= high[:, f, None])) for f, v in enumerate(values.T)]
    return np.stack([(weights * each).sum(axis=1) / total for each in inside], axis=1)
