"""Where sampling starts: a Gaussian of the training latents that knows the covariates, used while there is much noise.

At high noise the best denoiser is nearly linear, and a Gaussian that is fitted in closed form gives it (Wang & Vastola 2024).
A network takes long to learn the same. So the Gaussian denoises down to a noise level `until`, and the network from there on,
for which alone it is trained. With `residual` the network sees the Gaussian's answer and learns what that leaves.

A model that is given images has its network at every level of noise, beside the Gaussian's answer. The Gaussian may know the
images, too (`with_images`): they shift its mean by a linear formula, and a second covariance is of what that leaves. Where all
images are left open it is the first Gaussian, to the bit.

Legend: as in `ldm3d.diffusion.gaussian`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import BatchDenoiser, Estimator
from ldm3d.diffusion.gaussian import ConditionalGaussian, Gaussian
from ldm3d.diffusion.gaussian_fit import fit_conditional
from ldm3d.diffusion.preconditioning import Estimated
from ldm3d.diffusion.process import Process, as_double
from ldm3d.models.conditioning import Conditions
from ldm3d.models.pretrained import EIGHT_BITS, Pretrained
from ldm3d.reading import Reading, is_given


class GaussianStart(Pretrained):
    """A `ConditionalGaussian` as weights.

    Args:
        shape: of the normalised latents, as the U-Net takes them, (C, X, Y, Z).
        num_categories: of each covariate; 0 for a continuous one.
        components: k.
        until: sigma / alpha down to which it denoises.
        residual: whether the network has learned what it leaves, see `ldm3d.diffusion.preconditioning`.
        image_channels: of the images that it knows; 0 for none.
    """

    of_eight_bits = ("directions", "slopes", "seeing.directions", "seeing.slopes")

    def __init__(
        self,
        shape: Sequence[int],
        num_categories: Sequence[int],
        components: int,
        until: float,
        residual: bool = False,
        image_channels: int = 0,
    ):
        super().__init__()
        self.shape, self.num_categories, self.until, self.residual = tuple(shape), tuple(num_categories), until, residual
        p = sum(max(n - 1, 1) for n in num_categories)
        sizes = {"mean": shape, "directions": (components, *shape), "variances": (components,), "rest": (shape[0],)}
        sizes |= {"slopes": (p, *shape), "centre": (p,), "covariance": (p, p)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(*size))
        self.image_channels, self.reading, self.seeing = image_channels, None, None
        if image_channels:
            self.reading = Reading(shape, image_channels)
            # Of what images leave
            self.seeing = GaussianStart(shape, num_categories, components, until)

    @classmethod
    def fit(
        cls,
        latents: Tensor,
        context: Tensor,
        num_categories: Sequence[int],
        components: int,
        until: float,
        residual: bool = False,
    ) -> Self:
        """Fit it to training latents (N, C, X, Y, Z) and their covariates (N, K, 2).

        Raises:
            InputError: too few latents for so many components.
        """
        fitted = fit_conditional(latents, *features(context, num_categories), components)
        start = cls(latents.shape[1:], num_categories, components, until, residual)
        rounded = in_eight_bits(fitted.residual)
        # Channels of latents vary by 0.1 to 100, so slopes need no scale of their own; beyond 448 there is no number
        slopes = fitted.slopes if (fitted.slopes.abs() > 448).any() else fitted.slopes.to(EIGHT_BITS).float()
        start.load_state_dict({**vars(rounded), "slopes": slopes, "centre": fitted.centre, "covariance": fitted.covariance})
        return start.requires_grad_(False)

    def with_images(self, latents: Tensor, context: Tensor, given: Callable[[Sequence[int]], Conditions]) -> "GaussianStart":
        """The same that knows images, too.

        Args:
            latents, context: as `fit` takes them.
            given: numbers of latents -> their images.

        Raises:
            InputError: too few latents have an image.
        """
        reading = Reading.fit(latents, given)
        numbers = [int(n) for n in is_given(given(range(len(latents)))).nonzero()[:, 0]]
        left = torch.stack([latents[n] - reading(given([n]).to("cpu"))[0] for n in numbers])
        options = self.num_categories, len(self.directions), self.until
        seeing = type(self).fit(left, context[numbers], *options)
        start = type(self)(**{**self.arguments, "image_channels": len(reading.usual)})
        parts = {"reading": reading, "seeing": seeing}
        own = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        start.load_state_dict({**self.state_dict(), **own})
        return start.requires_grad_(False)

    @property
    def estimate(self) -> Self | None:
        """Itself where the network has learned what it leaves, see `ldm3d.diffusion.denoiser.NetworkDenoiser`."""
        return self if self.residual else None

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        for each in (self, self.seeing):
            vars(each).pop("gaussian", None) if each is not None else None  # its buffers move
        return super()._apply(*args, **kwargs)

    @functools.cached_property
    def gaussian(self) -> ConditionalGaussian:
        """In float32: the covariance of a latent has large and small parts."""
        names = ("mean", "directions", "variances", "rest", "slopes", "centre", "covariance")
        mean, directions, variances, rest, *others = (getattr(self, name).float() for name in names)
        return ConditionalGaussian(Gaussian(mean, directions, variances, rest), *others)

    def denoiser(self, context: Tensor, process: Process) -> BatchDenoiser:
        """(z, t) -> E[x | z, covariates] for covariates (N, K, 2) of a batch, the encoding of `ldm3d.covariates`."""
        return self.gaussian.denoiser(*features(context, self.num_categories), process)

    def under(self, conditions: Conditions, process: Process) -> Estimator:
        """(z, t) -> what it says of x under these conditions; images are looked at if it knows them."""
        seen = is_given(conditions)
        if self.reading is None or self.seeing is None or not seen.any():
            denoise = self.denoiser(conditions.covariates, process)
            return lambda z, t: Estimated(denoise(z, t), self.left(t, process))
        shifts = self.reading(conditions)
        parts = [
            (rows, part, part.denoiser(conditions.covariates[rows], process))
            for rows, part in ((seen.nonzero()[:, 0], self.seeing), ((~seen).nonzero()[:, 0], self))
            if len(rows)
        ]

        def estimate(z: Tensor, t: float | Tensor) -> Estimated:
            times = as_double(t).to(z.device).expand(len(z))
            x, left = torch.empty_like(z), z.new_empty(z.shape[:2])
            for rows, part, denoise in parts:
                alpha = process.alpha(times[rows]).to(z)[:, None, None, None, None]
                shift = torch.where(seen[rows, None, None, None, None], shifts[rows], 0).to(z)
                x[rows] = shift + denoise(z[rows] - alpha * shift, times[rows])
                left[rows] = part.left(times[rows], process).to(z)
            return Estimated(x, left)

        return estimate

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
