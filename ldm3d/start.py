"""Where sampling starts: a Gaussian of the training latents that knows the covariates, used while there is much noise.

At high noise the best denoiser is nearly linear, and a Gaussian that is fitted in closed form gives it (Wang & Vastola 2024).
A network takes long to learn the same. So the Gaussian denoises down to a noise level `until`, and the network from there on,
for which alone it is trained. With `residual` the network sees the Gaussian's answer and learns what that leaves.

Legend: as in `ldm3d.diffusion.gaussian`.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import BatchDenoiser
from ldm3d.diffusion.gaussian import ConditionalGaussian, Gaussian
from ldm3d.diffusion.gaussian_fit import fit_conditional
from ldm3d.diffusion.process import Process
from ldm3d.models.pretrained import EIGHT_BITS, Pretrained


class GaussianStart(Pretrained):
    """A `ConditionalGaussian` as weights.

    Args:
        shape: of the normalised latents, as the U-Net takes them, (C, X, Y, Z).
        num_categories: of each covariate; 0 for a continuous one.
        components: k.
        until: sigma / alpha down to which it denoises.
        residual: whether the network has learned what it leaves, see `ldm3d.diffusion.preconditioning`.
        spanned: the channels that the components span, by number; None: all. Others are white about what covariates tell.
    """

    of_eight_bits = ("directions", "slopes")

    def __init__(
        self,
        shape: Sequence[int],
        num_categories: Sequence[int],
        components: int,
        until: float,
        residual: bool = False,
        spanned: Sequence[int] | None = None,
    ):
        super().__init__()
        self.shape, self.num_categories, self.until, self.residual = tuple(shape), tuple(num_categories), until, residual
        self.spanned = list(range(shape[0]) if spanned is None else spanned)
        p = sum(max(n - 1, 1) for n in num_categories)
        directions = (components, len(self.spanned), *shape[1:])
        sizes = {"mean": shape, "directions": directions, "variances": (components,), "rest": (shape[0],)}
        sizes |= {"slopes": (p, *shape), "centre": (p,), "covariance": (p, p)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(*size))

    @classmethod
    def fit(
        cls,
        latents: Tensor,
        context: Tensor,
        num_categories: Sequence[int],
        components: int,
        until: float,
        residual: bool = False,
        channels: int | None = None,
    ) -> Self:
        """Fit it to training latents (N, C, X, Y, Z) and their covariates (N, K, 2).

        Its components span the `channels` with the largest variance, or all. Where channels have scales of their own, a few
        have nearly all of it, and components of these alone take less room and are estimated better.

        Raises:
            InputError: too few latents for so many components.
        """
        count = latents.shape[1]
        chosen = sorted(latents.float().var(dim=(0, 2, 3, 4)).argsort(descending=True)[: channels or count].tolist())
        spanned = torch.zeros(count, dtype=torch.bool)
        spanned[chosen] = True
        fitted = fit_conditional(latents, *features(context, num_categories), components, spanned=spanned)
        start = cls(latents.shape[1:], num_categories, components, until, residual, chosen if len(chosen) < count else None)
        rounded = in_eight_bits(fitted.residual)
        rounded = replace(rounded, directions=rounded.directions[:, chosen])
        # Channels of latents vary by 0.1 to 100, so slopes need no scale of their own; beyond 448 there is no number
        slopes = fitted.slopes if (fitted.slopes.abs() > 448).any() else fitted.slopes.to(EIGHT_BITS).float()
        start.load_state_dict({**vars(rounded), "slopes": slopes, "centre": fitted.centre, "covariance": fitted.covariance})
        return start.requires_grad_(False)

    @property
    def estimate(self) -> Self | None:
        """Itself where the network has learned what it leaves, see `ldm3d.diffusion.denoiser.NetworkDenoiser`."""
        return self if self.residual else None

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        vars(self).pop("gaussian", None)  # its buffers move
        return super()._apply(*args, **kwargs)

    @functools.cached_property
    def gaussian(self) -> ConditionalGaussian:
        """In float32: the covariance of a latent has large and small parts."""
        names = ("mean", "directions", "variances", "rest", "slopes", "centre", "covariance")
        mean, spanned, variances, rest, *others = (getattr(self, name).float() for name in names)
        directions = mean.new_zeros(len(spanned), *mean.shape)
        directions[:, self.spanned] = spanned
        return ConditionalGaussian(Gaussian(mean, directions, variances, rest), *others)

    def denoiser(self, context: Tensor, process: Process) -> BatchDenoiser:
        """(z, t) -> E[x | z, covariates] for covariates (N, K, 2) of a batch, the encoding of `ldm3d.covariates`."""
        return self.gaussian.denoiser(*features(context, self.num_categories), process)

    def left(self, t: float | Tensor, process: Process) -> Tensor:
        """Standard deviation of what it leaves of each channel, (N or 1, C); see `ConditionalGaussian.left`."""
        return self.gaussian.left(t, process)

    def expected(self, context: Tensor) -> Tensor:
        """E[x | covariates], (N, C, X, Y, Z) in float32, for covariates (N, K, 2); open ones are integrated out."""
        gaussian, rows = self.gaussian, zip(*features(context, self.num_categories))
        return torch.cat([gaussian.given(values[None], known).mean for values, known in rows])


def in_eight_bits(gaussian: Gaussian) -> Gaussian:
    """The same with directions rounded to the numbers that a file has of them, so that nothing changes when it is saved.

    Most of a start's size is its directions, and slopes. Eight bits change a direction by 3 % of its length.
    """
    largest = gaussian.directions.flatten(1).abs().amax(dim=1).clamp_min(1e-30)
    scale = torch.finfo(EIGHT_BITS).max / largest
    directions = (gaussian.directions * scale[:, None, None, None, None]).to(EIGHT_BITS).float()
    return replace(gaussian, directions=directions, variances=gaussian.variances / scale**2)


def features(context: Tensor, num_categories: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Covariates (N, K, 2) as numbers: the value of a continuous one, and an indicator for each category but the first.

    Returns:
        (features, known), each (N, p).
    """
    columns = []
    for k, count in enumerate(num_categories):
        value = context[:, k, 0]
        columns += [(value == category).to(value) for category in range(1, count)] if count > 1 else [value]
    known = [context[:, k, 1] > 0.5 for k, count in enumerate(num_categories) for _ in range(max(count - 1, 1))]
    if not columns:
        return context.new_zeros(len(context), 0), torch.zeros(len(context), 0, dtype=torch.bool, device=context.device)
    return torch.stack(columns, dim=1), torch.stack(known, dim=1)
