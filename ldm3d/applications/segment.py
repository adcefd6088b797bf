"""What a scan shows, by a model that makes label maps: probabilities, how unsure they are, and volumes with intervals.

Several label maps are drawn given the scan (Wolleb et al. 2022). Their mean is the probability of each label: no threshold is
set before. A voxel at a border is filled in part by several labels, so a map is a share of each.

..._desc-labels_dseg.nii.gz             the most probable label of each voxel, on the scan's own voxels
..._desc-probabilities_probseg.nii.gz   the probabilities, 4D: what no label fills, then the groups
..._desc-uncertainty_probseg.nii.gz     their entropy: 0 sure, 1 all alike
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ldm3d.applications.derived import Derived, Kind
from ldm3d.config.conditions import ImageCondition
from ldm3d.errors import InputError
from ldm3d.geometry import spacing_of
from ldm3d.metrics.labels import with_background
from ldm3d.pipeline import Pipeline

README = (
    "Label maps of brain scans, drawn by a latent diffusion model (ldm3d) given each scan. They are estimates with their "
    "uncertainty. Not for diagnosis."
)
SEGMENT = Kind(
    "segment",
    "Label maps of brain scans (DERIVED)",
    README,
    ("labels",),
    ("probabilities", "uncertainty"),
    {"labels": "dseg"},
)
SAMPLES, LEVEL = 8, 0.9


@dataclass(frozen=True, eq=False)
class Segmented:
    """Label maps of one scan.

    Attributes:
        groups: names of the labels' groups, in the order of the channels, with the labels of each.
        affine: (4, 4) of the scan's voxels.
        probabilities: (1 + groups, X', Y', Z'), of what no group fills and of each; they sum to 1.
        volumes_ml: (samples, groups).
    """

    groups: Mapping[str, tuple[int, ...]]
    affine: NDArray
    probabilities: NDArray
    volumes_ml: NDArray

    @property
    def labels(self) -> NDArray:
        """The most probable label of each voxel, (X', Y', Z'): the first of its group, 0 for background."""
        first = np.array([0, *(labels[0] for labels in self.groups.values())], np.int32)
        return first[self.probabilities.argmax(axis=0)]

    @property
    def uncertainty(self) -> NDArray:
        """Entropy of the probabilities, relative to that of equal ones, (X', Y', Z') in [0, 1]."""
        p = np.maximum(self.probabilities, 1e-12)
        return (-(p * np.log(p)).sum(axis=0) / np.log(len(p))).clip(0, 1).astype(np.float32)

    @property
    def volumes(self) -> dict[str, dict[str, float]]:
        """By group its volume in ml: mean of the samples, and the 90% interval of another sample (Student's t)."""
        count, mean = len(self.volumes_ml), self.volumes_ml.mean(axis=0)
        spread = self.volumes_ml.std(axis=0, ddof=1) if count > 1 else np.full(len(mean), np.nan)
        half = stats.t.ppf((1 + LEVEL) / 2, max(count - 1, 1)) * np.sqrt(1 + 1 / count) * spread
        rows = zip(self.groups, mean, np.maximum(mean - half, 0), mean + half)
        return {name: {"ml": float(m), "low": float(low), "high": float(high)} for name, m, low, high in rows}


def segment(
    pipe: Pipeline,
    scan: Any,
    covariates: Mapping[str, Any] | None = None,
    samples: int = SAMPLES,
    seed: int | None = None,
    steps: int | None = None,
    stripped: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Segmented:
    """Draw label maps of a scan.

    Args:
        pipe: of a model with `diffusion.makes` of labels.
        scan: a path (NIfTI, .mgz) or a nibabel image, in any orientation.
        covariates: of the person, if they are known.
        samples: label maps that are drawn; at least 2 for intervals.
        seed, steps: of sampling; None: the model's own.
        stripped: the scan has no skull any more.
        progress: called with (maps done, all).

    Raises:
        InputError: the model makes no label maps, or the scan cannot be placed on its Grid.
    """
    if samples < 1:
        raise InputError(f"samples is {samples}; ask for at least 1, better {SAMPLES}")
    name = taken(pipe).name
    given = pipe.given({name: scan}, like=name, stripped=stripped)
    rows = pipe.parse([dict(covariates or {})] * samples)
    assert given.images is not None
    affine = given.images.affine(0)
    voxel_ml = float(np.prod(spacing_of(affine))) / 1000
    total, volumes = 0.0, []
    for number, shares in enumerate(given.volumes(rows, pipe.sampling.replace(seed=seed, steps=steps)), 1):
        drawn = with_background(shares)
        total = total + drawn
        volumes.append(drawn[1:].sum(axis=(1, 2, 3), dtype=np.float64) * voxel_ml)
        if progress:
            progress(number, samples)
    return Segmented(pipe.labels, affine, (total / samples).astype(np.float32), np.stack(volumes))


def taken(pipe: Pipeline) -> ImageCondition:
    """The scan among the conditions of a model that makes label maps; InputError if it makes none."""
    if not pipe.labels:
        raise InputError("this model makes no label maps: it was trained without `diffusion.makes` of a condition of labels")
    return next(each for each in pipe.conditions if isinstance(each, ImageCondition))


def write_segmented(files: Derived, found: Segmented) -> Path:
    """Write the maps of a scan; returns the path of its labels."""
    images = {
        "labels": found.labels[None],
        "probabilities": found.probabilities,
        "uncertainty": found.uncertainty[None],
    }
    sidecar = {
        "Description": "Label map drawn by ldm3d given the scan: an estimate",
        "LabelMap": {name: list(labels) for name, labels in found.groups.items()},
        "Samples": len(found.volumes_ml),
        "VolumesMl": found.volumes,
        "VolumesAbout": "mean of the samples, and the 90% interval of another sample",
    }
    return files.write(images, found.affine, files.pipe.mark.replace("SYNTHETIC", "DERIVED"), sidecar)
