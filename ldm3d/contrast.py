"""Does an image look like the images of a condition in the training, or is it of another contrast?

Deciles of intensity do not tell T1w from T2w. Where in the head it is bright does: the correlation with the mean of the
training's images, over blocks of 9 mm within the head, was 0.65 to 0.88 for T1w brains and at most 0.49 for T2w ones.
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn.functional import adaptive_avg_pool3d

BLOCK_MM = 9.0
HEAD = 0.5  # of the mean's 95th percentile: brighter blocks count
MARGIN = 0.05  # below the least correlation in the training, from which on an image is taken for another contrast
LEVELS = 255
Side = Annotated[int, Field(ge=1, le=1000)]


@dataclass(frozen=True)
class Contrast:
    """How images of a condition look.

    Args:
        shape: blocks along each axis.
        mean: of the training's images, their mean over each block, as base64 of 8-bit numbers.
        least: the lowest correlation of one of them with the mean of the others.
    """

    shape: tuple[Side, Side, Side]
    mean: str
    least: Annotated[float, Field(ge=-1, le=1)]

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (no field)

    def __post_init__(self) -> None:
        if len(base64.b64decode(self.mean, validate=True)) != np.prod(self.shape):
            raise ValueError(f"mean has not the {np.prod(self.shape)} blocks of shape {tuple(self.shape)}")

    @classmethod
    def fit(cls, volumes: Iterable[NDArray], spacing_mm: Sequence[float]) -> "Contrast | None":
        """Of training images (C, X, Y, Z) in [0, 1] on one Grid; None of fewer than three."""
        each = np.array([in_blocks(volume, spacing_mm) for volume in volumes])  # (N, x, y, z)
        if len(each) < 3:
            return None
        mean = each.mean(axis=0)
        others = (len(each) * mean - each) / (len(each) - 1)
        least = min(_correlation(one, of) for one, of in zip(each, others))
        levels = np.rint(LEVELS * mean.clip(0, 1)).astype(np.uint8)
        return cls(levels.shape, base64.b64encode(levels.tobytes()).decode(), least)

    def likeness(self, volume: NDArray, spacing_mm: Sequence[float]) -> float:
        """Correlation of an image (C, X, Y, Z) with the mean of the training's, over the blocks of the head."""
        levels = np.frombuffer(base64.b64decode(self.mean), np.uint8).reshape(self.shape)
        return _correlation(in_blocks(volume, spacing_mm), levels / LEVELS)

    def warning(self, name: str, volume: NDArray, spacing_mm: Sequence[float]) -> str | None:
        """What is odd about an image that is given as condition `name`; None if it looks as those of the training."""
        found = self.likeness(volume, spacing_mm)
        if found >= self.least - MARGIN:
            return None
        return (
            f"{name}: the image does not look like those that the model was trained on (correlation {found:.2f} with their "
            f"mean, at least {self.least:.2f} among themselves): is it of another contrast, or badly placed?"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "mean": self.mean, "least": round(self.least, 4)}


def in_blocks(volume: NDArray, spacing_mm: Sequence[float]) -> NDArray:
    """The mean of a volume (C, X, Y, Z) over its channels and over blocks of about `BLOCK_MM`, (x, y, z)."""
    whole = torch.from_numpy(volume.astype(np.float32)).mean(dim=0)
    return adaptive_avg_pool3d(whole[None, None], blocks_of(volume.shape[1:], spacing_mm))[0, 0].double().numpy()


def blocks_of(shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[int, ...]:
    """How many blocks of about `BLOCK_MM` lie along each axis of a grid."""
    return tuple(max(round(n * mm / BLOCK_MM), 1) for n, mm in zip(shape, spacing_mm))


def _correlation(one: NDArray, mean: NDArray) -> float:
    """Over the blocks of the head, which `mean` shows; 0 where one of both is flat there."""
    head = mean > HEAD * np.percentile(mean, 95)
    pair = np.stack([one[head], mean[head]])
    return float(np.corrcoef(pair)[0, 1]) if head.any() and (pair.std(axis=1) > 0).all() else 0.0
