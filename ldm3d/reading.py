"""What images tell of a latent by a linear formula: a small kernel that is fitted in closed form, without training.

Legend: x latents (N, C, X, Y, Z); c images on the same grid, (N, c', X, Y, Z), k where they are known; m, n the means of x and
c at each position. With w a kernel of 3 x 3 x 3 blocks, x - m is about w * (k (c - n)): what is not given counts as usual.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ldm3d.diffusion.gaussian import full_precision
from ldm3d.errors import InputError
from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import pad_to

SIDE = 3  # of the kernel, in blocks
RIDGE = 1e-3  # relative to the mean variance of an input
POSITIONS = 250_000  # that the kernel is fitted to, at most
CHUNK = 20_000  # positions at a time


class Reading(nn.Module):
    """w * (k (c - n)).

    Args:
        shape: of the latents, as the U-Net takes them, (C, X, Y, Z).
        image_channels: c'.
    """

    kernel: Tensor
    usual: Tensor

    def __init__(self, shape: Sequence[int], image_channels: int):
        super().__init__()
        channels, *sides = shape
        self.register_buffer("kernel", torch.zeros(channels, image_channels, SIDE, SIDE, SIDE))
        self.register_buffer("usual", torch.zeros(image_channels, *sides))

    @full_precision
    def forward(self, conditions: Conditions) -> Tensor:
        """What images shift the mean of x by, (N, C, X, Y, Z) in float32; 0 where none is given."""
        return nn.functional.conv3d(self._beyond_usual(conditions), self.kernel.float(), padding=SIDE // 2)

    @classmethod
    @full_precision
    def fit(cls, latents: Tensor, given: Callable[[Sequence[int]], Conditions]) -> Self:
        """Ridge regression.

        Args:
            latents: of training, (N, C, X, Y, Z), on the CPU.
            given: numbers of latents -> their images.

        Raises:
            InputError: no image is given with any of the latents.
        """
        count, *shape = latents.shape
        rows = range(0, count, max(count * latents[0, 0].numel() // POSITIONS, 1))
        chunks = max(CHUNK // latents[0, 0].numel(), 1)

        def parts() -> Iterator[tuple[list[int], Conditions]]:
            for first in range(0, len(rows), chunks):
                chosen = list(rows[first : first + chunks])
                yield chosen, given(chosen).to("cpu")

        total = known = 0.0
        for _, each in parts():
            images, there = _padded(each, shape[1:])
            total, known = total + (images * there).sum(dim=0), known + there.sum(dim=0)
        assert isinstance(total, Tensor) and isinstance(known, Tensor)
        if not known.any():
            raise InputError("none of the latents has an image: a start with `images` cannot be fitted; drop start.images")
        reading = cls(shape, len(total))
        reading.usual.copy_(total / known.clamp_min(1e-6))
        mean = latents.mean(dim=0)
        left, right = 0.0, 0.0
        for chosen, each in parts():
            inputs = _patches(reading._beyond_usual(each))  # (positions, c' k^3)
            left = left + (inputs.T @ inputs).double()
            right = right + (inputs.T @ (latents[chosen] - mean).movedim(1, -1).flatten(0, -2)).double()
        assert isinstance(left, Tensor)
        ridge = RIDGE * left.diagonal().mean().clamp_min(1e-12) * torch.eye(len(left), dtype=left.dtype)
        weights = torch.linalg.solve(left + ridge, right)  # (c' k^3, C)
        reading.kernel.copy_(weights.T.reshape(reading.kernel.shape))
        return reading

    def _beyond_usual(self, conditions: Conditions) -> Tensor:
        """k (c - n), (N, c', X, Y, Z) in float32."""
        images, known = _padded(conditions, self.usual.shape[1:])
        return (images - self.usual) * known


def is_given(conditions: Conditions) -> Tensor:
    """Which rows of a batch have any image, (N,)."""
    if conditions.known is None:
        return torch.zeros(len(conditions), dtype=torch.bool, device=conditions.covariates.device)
    return (conditions.known > 0).flatten(1).any(dim=1)


def _padded(conditions: Conditions, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images without NaN and where they are known, both (N, c', *sides) in float32."""
    assert conditions.images is not None and conditions.known is not None
    known = conditions.known.expand_as(conditions.images).float()
    images = torch.where(known > 0, conditions.images.float(), 0)  # what is unknown may be NaN
    return pad_to(images, sides), pad_to(known, sides)


def _patches(x: Tensor) -> Tensor:
    """(N, c, X, Y, Z) -> (N X Y Z, c k^3), what a kernel sees at each position."""
    padded = nn.functional.pad(x, [SIDE // 2] * 6)
    for axis in (2, 3, 4):
        padded = padded.unfold(axis, SIDE, 1)
    return padded.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3)
