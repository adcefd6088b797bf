"""Do synthetic volumes look like real ones? The features that are kept of each volume, and all metrics of two sets."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.errors import InputError
from ldm3d.evaluation.realism_pairs import diversity_metrics
from ldm3d.evaluation.realism_sets import distribution_metrics
from ldm3d.metrics.distances import spatial_features
from ldm3d.metrics.features import Extractor, extract, standardise
from ldm3d.statistics.equivalence import ENOUGH, Finding

PAIRED_VOLUMES = 2 * ENOUGH  # volumes of each set that are kept for metrics of pairs: as many as a verdict needs


@dataclass
class VolumeFeatures:
    """What is kept of one volume.

    Attributes:
        features: (1, D).
        maps: (1, D'), of extractors that have maps; else None.
        volume: (C, X, Y, Z) in float16, of `PAIRED_VOLUMES` volumes; else None.
    """

    features: Tensor
    maps: Tensor | None = None
    volume: NDArray | None = field(default=None, repr=False)


def features_of(volume: NDArray, paired: bool, extractor: Extractor, device: torch.device | str) -> VolumeFeatures:
    """By an extractor of `ldm3d.metrics.features`, of a volume (C, X, Y, Z) in [0, 1]; `paired`: keep it for pairs."""
    found = VolumeFeatures(extract([volume], extractor, device))
    if hasattr(extractor, "maps"):
        found.maps = extract([volume], lambda v: spatial_features(extractor.maps(v)), device)
    if paired:
        found.volume = volume.astype(np.float16)
    return found


@dataclass(frozen=True)
class FeatureSet:
    """Features of each volume, its covariates, and its person; of synthetic volumes, those that were requested."""

    volumes: Sequence[VolumeFeatures]
    rows: Sequence[dict]
    people: Sequence[Hashable]

    def take(self, numbers: Sequence[int]) -> "FeatureSet":
        return FeatureSet(*([values[i] for i in numbers] for values in (self.volumes, self.rows, self.people)))

    def stack(self, name: str) -> Tensor:
        """Their "features" or "maps", (N, D)."""
        return torch.cat([getattr(each, name) for each in self.volumes]).double()

    @property
    def paired(self) -> "FeatureSet":
        """Those whose volumes were kept for metrics of pairs."""
        return self.take([i for i, each in enumerate(self.volumes) if each.volume is not None])


def assess_realism(real: FeatureSet, synthetic: FeatureSet, device: torch.device | str = "cpu") -> list[Finding]:
    """All metrics of two sets; a warning names those that cannot be computed, for example of too few volumes.

    Args:
        real: held-out volumes.
        synthetic: generated or reconstructed volumes. Metrics of pairs are left out if none of these was kept for them.
        device: where to compute metrics of pairs.
    """
    people = {"subjects": real.people, "requested": synthetic.people}

    def of_features() -> list[Finding]:
        return distribution_metrics(*standardise(real.stack("features"), synthetic.stack("features")), **people)

    def of_maps() -> list[Finding]:
        if real.volumes[0].maps is None:
            return []
        return distribution_metrics(real.stack("maps"), synthetic.stack("maps"), "maps", **people)

    def of_pairs() -> list[Finding]:
        one, other = real.paired, synthetic.paired
        if not other.volumes:
            return []
        images = [[each.volume for each in group.volumes] for group in (one, other)]
        return diversity_metrics(*images, subjects=one.people, requested=other.people, device=device)

    found = []
    for metrics in (of_features, of_maps, of_pairs):
        try:
            found += metrics()
        except InputError as error:
            warnings.warn(f"realism is not measured in full: {error}", stacklevel=2)
    return found
