"""The volumes of an evaluation: each is reconstructed or generated once, and only measurements and features of it are kept."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ldm3d.covariates import Value
from ldm3d.description import Sampling
from ldm3d.errors import InputError
from ldm3d.evaluation.anatomy import Segmented, segment
from ldm3d.evaluation.realism import PAIRED_VOLUMES, VolumeFeatures, features_of
from ldm3d.generation.sampling import grouped
from ldm3d.metrics.features import Extractor
from ldm3d.metrics.reconstruction import foreground, psnr, ssim
from ldm3d.pipeline import Pipeline
from ldm3d.processes import Processes, share_work
from ldm3d.rulers.segmenter import Segmenter
from ldm3d.rulers.volumetry import apply_measure

Measure = Callable[[NDArray, Sequence[float]], Mapping[str, float]]  # (volume, spacing_mm) -> {quantity: value}
QUALITIES = ("psnr_db", "ssim", "psnr_foreground_db", "ssim_foreground")


@dataclass(frozen=True)
class Sample:
    """What is kept of one volume.

    Attributes:
        measured: quantities.
        features: by an extractor.
        volume: itself, for pictures.
        anatomy: by a segmenter.
        compared: the volume in float16, of `PAIRED_VOLUMES` reconstructed and generated volumes that a classifier compares.
    """

    measured: Mapping[str, float]
    features: VolumeFeatures | None
    volume: NDArray | None
    anatomy: Segmented | None = None
    compared: NDArray | None = None


@dataclass(frozen=True)
class Sampler:
    """Makes samples of volumes.

    Attributes:
        pipeline: the model.
        measure: of quantities, see `Measure`.
        extractor: of features; None for none.
        order: indices of held-out volumes in the order of their use; the first `shown` are kept for pictures.
        processes: that share the work.
        segmenter: of anatomy; None for none.
        classified: whether a classifier is to compare volumes.
    """

    pipeline: Pipeline
    measure: Measure
    extractor: Extractor | None
    order: Sequence[int]
    shown: int
    processes: Processes
    segmenter: Segmenter | None = None
    classified: bool = False

    def sample(self, volume: NDArray, paired: bool, shown: bool, compared: bool = False) -> Sample:
        """Of a volume (C, X, Y, Z) in [0, 1] on the output grid.

        `paired`, `compared`: keep it for metrics of pairs, for a classifier.
        """
        features = features_of(volume, paired, self.extractor, self.pipeline.device) if self.extractor else None
        spacing_mm = self.pipeline.grid.spacing_mm
        measured = apply_measure(self.measure, volume, spacing_mm)
        anatomy = segment(volume[0], self.segmenter, spacing_mm) if self.segmenter else None
        kept = None
        if self.classified and compared:  # once, if it is kept for pairs too
            kept = features.volume if features and paired else volume.astype(np.float16)
        return Sample(measured, features, volume if shown else None, anatomy, kept)

    def reconstructed(self, load: Callable[[int], NDArray]) -> tuple[list[Sample], list[Sample], NDArray]:
        """Every held-out volume, the same after the autoencoder, and `QUALITIES` of the reconstructions, (4, N)."""
        paired, shown = set(self.order[:PAIRED_VOLUMES]), set(self.order[: self.shown])

        def work(i: int) -> tuple[Sample, Sample, list[float]]:
            volume = torch.from_numpy(load(i))[None].to(self.pipeline.device)  # (1, C, X, Y, Z)
            again = self.pipeline.reconstruct(volume)
            pair = [self.pipeline.cropped(v[0].cpu().numpy()) for v in (volume, again)]  # as generated volumes are
            quality = [figure(again, volume, at).item() for at in (None, foreground(volume)) for figure in (psnr, ssim)]
            return self.sample(pair[0], i in paired, i in shown), self.sample(pair[1], False, i in shown, i in paired), quality

        done = share_work(work, range(len(self.order)), self.processes, "reconstruct held-out volumes", "volume")
        real, again, qualities = zip(*done)
        return list(real), list(again), np.array(qualities).T

    def generated(self, requests: Sequence[Mapping[str, Value]], sampling: Sampling) -> list[Sample]:
        """Volumes for these requests, number i with noise i."""

        def work(numbers: list[int]) -> list[Sample]:
            volumes = self.pipeline.volumes([requests[i] for i in numbers], sampling, numbers=numbers)
            return [self.sample(v, i < PAIRED_VOLUMES, i < self.shown, i < PAIRED_VOLUMES) for i, v in zip(numbers, volumes)]

        groups = list(grouped(range(len(requests)), self.pipeline.group_size))  # whole batches: a part of one costs as much
        done = share_work(work, groups, self.processes, f"generate {len(requests)} volumes", "batch")
        return [each for group in done for each in group]


def usable(extractor: Extractor | None, pipeline: Pipeline) -> Extractor | None:
    """The extractor, or None with a warning if it does not take the model's volumes."""
    if extractor is None:
        return None
    try:
        blank = np.zeros((pipeline.autoencoder.in_channels, *pipeline.output_grid.shape), np.float32)
        features_of(blank, False, extractor, pipeline.device)
    except InputError as error:  # the other figures are still useful
        warnings.warn(f"realism is not measured: {error}", stacklevel=3)
        return None
    return extractor
