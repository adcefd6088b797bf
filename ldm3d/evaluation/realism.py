"""Are synthetic volumes like real ones? What `ldm3d evaluate` takes of each volume for it, and then makes of them all."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.errors import InputError
from ldm3d.evaluation.measures import compare, compare_pairs
from ldm3d.metrics.distances import spatial_features
from ldm3d.metrics.features import Extractor, extract, standardise
from ldm3d.statistics.equivalence import ENOUGH, Finding

IN_PAIRS = 2 * ENOUGH  # volumes of each set that are kept for measures of pairs: as many as a verdict needs


@dataclass
class Seen:
    """What is kept of one volume.

    Attributes:
        features: (1, D).
        maps: (1, D'), of extractors that have maps; else None.
        volume: (C, X, Y, Z) in float16, of `IN_PAIRS` volumes; else None.
    """

    features: Tensor
    maps: Tensor | None = None
    volume: NDArray | None = field(default=None, repr=False)


def look_at(volume: NDArray, paired: bool, extractor: Extractor, device: torch.device | str) -> Seen:
    """A volume (C, X, Y, Z) in [0, 1] through an extractor of `ldm3d.metrics.features`; `paired`: kept for pairs, too."""
    seen = Seen(extract([volume], extractor, device))
    if hasattr(extractor, "maps"):
        seen.maps = extract([volume], lambda v: spatial_features(extractor.maps(v)), device)
    if paired:
        seen.volume = volume.astype(np.float16)
    return seen


def compare_all(
    real: Sequence[Seen],
    synthetic: Sequence[Seen],
    subjects: Sequence[Hashable],
    asked: Sequence[Hashable],
    device: torch.device | str = "cpu",
) -> list[Finding]:
    """Every measure that can be taken of two sets; a warning says which cannot, for example of too few volumes.

    Args:
        real, synthetic: of each volume, from `look_at`. Measures of pairs are left out where no synthetic volume is kept.
        subjects: of the real ones.
        asked: of the synthetic ones, whose covariates were asked; of reconstructions, who was reconstructed.
        device: where to compute measures of pairs.
    """

    def rows(seen: Sequence[Seen], name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in seen])

    def of_features() -> list[Finding]:
        pair = standardise(rows(real, "features"), rows(synthetic, "features"))
        return compare(*pair, subjects=subjects, asked=asked)

    def of_maps() -> list[Finding]:
        if real[0].maps is None:
            return []
        return compare(rows(real, "maps"), rows(synthetic, "maps"), "maps", subjects=subjects, asked=asked)

    def of_pairs() -> list[Finding]:
        kept = [[i for i, one in enumerate(seen) if one.volume is not None] for seen in (real, synthetic)]
        if not kept[1]:
            return []
        shown = [[seen[i].volume for i in own] for seen, own in zip((real, synthetic), kept)]
        whom = [[people[i] for i in own] for people, own in zip((subjects, asked), kept)]
        return compare_pairs(*shown, subjects=whom[0], asked=whom[1], device=device)

    found = []
    for measures in (of_features, of_maps, of_pairs):
        try:
            found += measures()
        except InputError as error:
            warnings.warn(f"how alike real and synthetic volumes are is not measured in full: {error}", stacklevel=2)
    return found
