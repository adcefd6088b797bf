"""Explanation: which voxels change if one covariate of a request changes?

Legend: S seeds; d (S, C, X, Y, Z) differences after - before, one for each seed; u = d / sqrt(sum of d^2 over the seeds).

Volumes of two requests are generated from the same noise, so that their difference is due to the request. A sign-flip test
over
the seeds says whether the mean difference is 0: if it is, d is as likely as -d.
"""

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.covariates import Value
from ldm3d.errors import InputError
from ldm3d.geometry import Grid
from ldm3d.models.attention_maps import recorded
from ldm3d.pipeline import Pipeline, Sampling

FAMILY_WISE_ERROR = 0.05  # chance of any significant voxel in a map without changes
PATTERNS = 2048  # of signs; all of them are used if the seeds have no more
RESOLUTION = 1e-4  # of the intensity range: smaller differences are rounding errors of the networks
NOTABLE = 0.05  # of the intensity range: a visible change
ALL = "all-changes"  # the contrast that changes all covariates at once; not a possible name of a covariate
CHUNK = 2**14  # voxels that are tested together


@dataclass(frozen=True)
class Contrast:
    """Effect of one change of a request; maps are (C, X, Y, Z), float32.

    Attributes:
        name: of the covariate that was changed; `ALL` for all of them at once.
        request: after the change.
        difference: mean over the seeds of after - before, in units of the intensity range.
        t: paired t over the seeds, S - 1 degrees of freedom.
        p: of the mean difference, corrected for the number of voxels (family-wise); 1 where nothing changed.
    """

    name: str
    request: dict[str, Value]
    difference: NDArray
    t: NDArray
    p: NDArray

    @property
    def significant(self) -> NDArray:
        """Where p is at most `FAMILY_WISE_ERROR`, (C, X, Y, Z) bool."""
        return self.p <= FAMILY_WISE_ERROR

    @property
    def notable(self) -> NDArray:
        """Where the change is significant and `NOTABLE` or larger, (C, X, Y, Z) bool."""
        return self.significant & (np.abs(self.difference) >= NOTABLE)

    def to_dict(self, grid: Grid) -> dict[str, Any]:
        """Volumes of the changes, and the position of the largest mean change, in mm of RAS+."""
        found = np.where(self.notable, self.difference, 0)
        peak = np.unravel_index(np.abs(self.difference).argmax(), self.difference.shape)
        return {
            "changed": self.name,
            "request": dict(self.request),
            "significant_ml": float(self.significant.any(axis=0).sum() * grid.voxel_ml),
            "notably_brighter_ml": float((found > 0).any(axis=0).sum() * grid.voxel_ml),
            "notably_darker_ml": float((found < 0).any(axis=0).sum() * grid.voxel_ml),
            "largest_change": float(self.difference[peak]),
            "largest_change_at_mm": [round(float(mm), 2) for mm in (grid.affine @ [*peak[1:], 1])[:3]],
            "smallest_p": float(self.p.min()),
        }


@dataclass(frozen=True)
class Explanation:
    """Everything that `explain` found.

    Attributes:
        request: before the changes.
        seeds: S.
        mean, deviation: of that request's volumes over the seeds, (C, X, Y, Z).
        contrasts: one for each changed covariate, and `ALL` of them if there are several.
        attention: share of cross-attention that each covariate gets at a voxel, (1, X, Y, Z), 1 in sum over the covariates;
            empty for networks without cross-attention of ours.
        attention_voxels: voxel size of the coarsest of these maps.
    """

    request: dict[str, Value]
    seeds: int
    mean: NDArray
    deviation: NDArray
    contrasts: list[Contrast]
    attention: dict[str, NDArray]
    attention_voxels: int


def explain(
    pipeline: Pipeline, before: Mapping[str, Any], changes: Mapping[str, Any], sampling: Sampling, seeds: int = 16
) -> Explanation:
    """Change a request, one covariate at a time and all at once, and test where volumes change.

    Args:
        pipeline: the model.
        before: covariates that are requested; the others are left open.
        changes: covariates that change, with their new values.
        sampling: how to generate. Noise number i of its seed is the same in every request.
        seeds: volumes of each request.

    Raises:
        InputError: a model without covariates, nothing changes, too few seeds for any p below `FAMILY_WISE_ERROR`, or
            guidance 0.
    """
    if not len(pipeline.schema):
        raise InputError("this model has no covariates, so there is nothing to change or explain")
    start, end = pipeline.parse([before, {**before, **changes}])
    changed = [name for name in start if start[name] != end[name]]
    if not changed:
        raise InputError(f"{dict(changes)} changes nothing of {dict(before)}; give a covariate another value in --to")
    if smallest_p(seeds) > FAMILY_WISE_ERROR:
        raise InputError(
            f"{seeds} seeds have {2 ** max(0, seeds - 1)} patterns of signs, so no p-value can be below "
            f"{smallest_p(seeds):g}; ask for 6 seeds or more to find anything at {FAMILY_WISE_ERROR:g}"
        )
    if 2 * smallest_p(seeds) > FAMILY_WISE_ERROR:
        warnings.warn(
            f"with {seeds} seeds p-values are multiples of {smallest_p(seeds):.3g}: only the smallest of them is significant, "
            "so that most changes are missed; 16 seeds or more find them",
            stacklevel=2,
        )
    if sampling.guidance == 0:
        raise InputError("guidance 0 ignores the covariates, and so there is nothing to explain; use 1 or more")
    requests = {name: {**start, name: end[name]} for name in changed} | ({ALL: end} if len(changed) > 1 else {})
    first = _volumes(pipeline, start, sampling, seeds)
    contrasts = []
    for name, request in requests.items():
        difference = _volumes(pipeline, request, sampling, seeds) - first
        t, p = sign_flip_test(difference, seed=sampling.seed)
        contrasts.append(Contrast(name, request, difference.mean(axis=0), t, p))
    attention, voxels = _attention(pipeline, start, sampling, min(seeds, pipeline.group_size))
    deviation = first.std(axis=0, ddof=1)
    return Explanation(start, seeds, first.mean(axis=0), deviation, contrasts, attention, voxels)


def sign_flip_test(differences: NDArray, patterns: int = PATTERNS, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Is the mean of paired differences 0? Corrected over all voxels by their largest |t| (Nichols & Holmes 2002).

    If d is distributed like -d, each of the 2^S patterns of signs is as likely as the observed one. p is the share of patterns
    under which the largest |t| of the map is at least this voxel's. This controls the family-wise error in the strong sense,
    whatever the dependence between voxels.

    |t| rises with |sum of u|, and signs leave the sum of squares alone: one matrix product gives all of the patterns.

    Args:
        differences: (S, ...), one for each seed.
        patterns: of signs. S seeds have 2^(S - 1) of them, as |t| is two-sided; if these are more, `patterns` are drawn,
            and the observed one is among them.
        seed: of the drawing.

    Returns:
        t and p, (...) like one difference, float32; 0 and 1 where the root mean square of d is below `RESOLUTION`.
    """
    seeds, shape = len(differences), differences.shape[1:]
    d = differences.reshape(seeds, -1).astype(np.float32)
    size = np.sqrt(np.square(d, dtype=np.float64).sum(axis=0))
    moved = size > RESOLUTION * seeds**0.5
    t, p = np.zeros(d.shape[1], np.float32), np.ones(d.shape[1], np.float32)
    if moved.any():
        u = d[:, moved] / size[moved].astype(np.float32)  # (S, V)
        signs = _signs(seeds, patterns, seed)  # (P, S)
        largest = np.zeros(len(signs), np.float32)
        for start in range(0, u.shape[1], CHUNK):
            np.maximum(largest, np.abs(signs @ u[:, start : start + CHUNK]).max(axis=1), out=largest)
        r = u.sum(axis=0, dtype=np.float64)
        # Both are sums in different orders, so that equal ones may differ in their last bits
        at_least = len(signs) - np.searchsorted(np.sort(largest), np.abs(r) - 1e-5)
        p[moved] = at_least / len(signs)
        t[moved] = r * np.sqrt((seeds - 1) / (seeds - r**2).clip(1e-6))
    return t.reshape(shape), p.reshape(shape)


def smallest_p(seeds: int, patterns: int = PATTERNS) -> float:
    """The smallest p that `sign_flip_test` can give: the observed pattern alone has the largest |t|."""
    return 1 / min(2.0 ** (seeds - 1), patterns)


def _signs(seeds: int, patterns: int, seed: int) -> NDArray:
    """Patterns (P, S) of +1 and -1 whose first sign is +1, all of them or as many as are drawn; the first is all +1."""
    if 2 ** (seeds - 1) <= patterns:
        return np.array([(1, *rest) for rest in itertools.product((1, -1), repeat=seeds - 1)], np.float32)
    drawn = np.random.default_rng(seed).choice(np.array([1, -1], np.float32), (patterns, seeds))
    drawn[:, 0] = drawn[0] = 1
    return drawn


def _volumes(pipeline: Pipeline, request: Mapping[str, Value], sampling: Sampling, seeds: int) -> NDArray:
    """Volumes (S, C, X, Y, Z) of a request, number i with noise i."""
    return np.stack(list(pipeline.volumes([request] * seeds, sampling)))


def _attention(
    pipeline: Pipeline, request: Mapping[str, Value], sampling: Sampling, samples: int
) -> tuple[dict[str, NDArray], int]:
    """Maps for each covariate, averaged over samples and all steps; the side in voxels of the coarsest positions."""
    with recorded(pipeline.unet, samples) as maps:
        if maps is None:
            return {}, 0
        pipeline.latents([request] * samples, sampling, range(samples))
    if not maps:
        return {}, 0
    factor = pipeline.autoencoder.downsampling
    shares = maps.mean(pipeline.grid.shape, factor).mean(dim=0).split(1)  # K of (1, X, Y, Z)
    cut = {name: pipeline.cropped(share.numpy()) for name, share in zip(pipeline.schema.names, shares)}
    return cut, maps.coarsest * factor
