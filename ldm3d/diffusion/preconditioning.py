"""What a network sees of a noisy latent, what it predicts, and how its errors count: by channel, where channels have scales.

Channels of latents need not have one variance. Where each keeps the scale at which it changes the voxels, and all are given
the same noise, fine detail drowns first and coarse structure is drawn first, as in voxels. A network still wants inputs
and targets of unit variance, so each channel is preconditioned by its own scale (Karras et al. 2022, section 5).

Legend: as in `ldm3d.diffusion.process`; s scale of a channel, its standard deviation. Channel c of z / r with
r = sqrt(alpha^2 s^2 + sigma^2) is a variance-preserving process of x / s:

    z / r = a x / s + b e with a = alpha s / r, b = sigma / r

Where a formula gives a good estimate g of x already (`ldm3d.start`), the network learns what it leaves: x - g takes the
place of x, z - alpha g that of z, and s is the standard deviation of x - g, which depends on t and may differ between the
samples of a batch. The network sees g, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm3d.diffusion.process import Process, as_double
from ldm3d.errors import InputError


@dataclass(frozen=True)
class Estimated:
    """What a formula says of x, given z and the conditions.

    Attributes:
        x: g, like z.
        left: standard deviation of x - g, of each channel, (N or 1, C).
    """

    x: Tensor
    left: Tensor


class Preconditioning:
    """Inputs, targets and weights of a network.

    Args:
        process: of the diffusion.
        target: what the network predicts, see `Process.target`.
        scales: s of each channel; none where all are 1, and network and process see the same latents.
        estimated: whether the network is given an estimate g, and learns what it leaves; goes with scales.

    Raises:
        InputError: scales, and a target other than "v"; an estimate without scales.
    """

    def __init__(self, process: Process, target: str, scales: Sequence[float] = (), estimated: bool = False):
        if scales and target != "v":
            raise InputError(f"target {target}: channels of different scales need target v")
        if estimated and not scales:
            raise InputError("a network that learns what an estimate leaves needs scales of the channels")
        self.process, self.target, self.scales = process, target, tuple(scales)

    def input(self, z: Tensor, t: float | Tensor, g: Estimated | None = None) -> Tensor:
        """What the network sees of z at time t, like z; with an estimate of x, (N, 2 C, X, Y, Z)."""
        if not self.scales:
            return z
        seen = self._centred(z, t, g) / self._coefficients(z, t, g)[0]
        return seen if g is None else torch.cat([seen, g.x / g.x.new_tensor(self.scales)[:, None, None, None]], dim=1)

    def target_of(self, x: Tensor, e: Tensor, t: float | Tensor, g: Estimated | None = None) -> Tensor:
        """What the network has to predict; with scales a e - b (x - g) / s."""
        if not self.scales:
            return self.process.target(self.target, x, e, t)
        _, a, b, s = self._coefficients(x, t, g)
        return a * e - b * (x if g is None else x - g.x) / s

    def to_data(self, output: Tensor, z: Tensor, t: float | Tensor, g: Estimated | None = None) -> Tensor:
        """The expected clean latent, from the network's output for z at time t.

        With scales g + s (a (z - alpha g) / r - b output).
        """
        if not self.scales:
            return self.process.to_data(self.target, output, z, t)
        r, a, b, s = self._coefficients(z, t, g)
        x = s * (a * self._centred(z, t, g) / r - b * output)
        return x if g is None else g.x + x

    def loss(
        self, weight: str, t: Tensor, squared_error: Tensor, g: Estimated | None = None, lacking: Tensor | None = None
    ) -> Tensor:
        """The weighted mean squared error of each sample, (N,), from squared errors (N, C, X, Y, Z) at times t (N,).

        Without scales the weight is `Process.loss_weight`. With them, and "min-snr", the same with each channel's own a and b:
        min(a^2 / b^2, 5) b^2. "noise" counts errors as those of the noise, by a^2: channels that are drowned do not count.
        "level" does so too, by a^2 / mean(a^2): times at which most channels are drowned count as much as any other.
        Channels that a sample is `lacking`, (N, C), do not count: the mean is over the others.
        """
        if not self.scales:
            return self.process.loss_weight(weight, self.target, t) * _mean_without(lacking, squared_error)
        _, a, b, _ = self._coefficients(squared_error, t, g)
        weights = {"none": torch.ones_like(a), "noise": a**2, "min-snr": (a / b).square().clamp(max=5.0) * b**2}
        weights["level"] = a**2 / (a**2).mean(dim=1, keepdim=True)
        return _mean_without(lacking, weights[weight] * squared_error)

    def _centred(self, z: Tensor, t: float | Tensor, g: Estimated | None) -> Tensor:
        """z - alpha g."""
        if g is None:
            return z
        return z - self.process.alpha(as_double(t).to(z.device).reshape(-1, 1, 1, 1, 1)).to(z.dtype) * g.x

    def _coefficients(self, like: Tensor, t: float | Tensor, g: Estimated | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """r, a, b and s, each (N or 1, C, 1, 1, 1), of the type of `like`."""
        t = as_double(t).to(like.device).reshape(-1, 1)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        s = torch.tensor(self.scales, dtype=t.dtype, device=like.device)[None] if g is None else g.left.to(t)
        r = (alpha**2 * s**2 + sigma**2).sqrt()
        r, a, b, s = (v.to(like.dtype)[:, :, None, None, None] for v in (r, alpha * s / r, sigma / r, s))
        return r, a, b, s


def _mean_without(lacking: Tensor | None, values: Tensor) -> Tensor:
    """Mean of each sample, (N,), of values (N, C, X, Y, Z) without the channels that are `lacking`, (N, C)."""
    if lacking is None:
        return values.flatten(1).mean(dim=1)
    by_channel = values.flatten(2).mean(dim=2).masked_fill(lacking, 0)  # all channels are of one size
    return by_channel.sum(dim=1) / (~lacking).sum(dim=1)
