"""Where sampling starts: a Gaussian of the training latents that knows the covariates, used while there is much noise.

At high noise the best denoiser is nearly linear, and a Gaussian that is fitted in closed form gives it (Wang & Vastola 2024).
A network takes long to learn the same. So the Gaussian denoises down to a noise level `until`, and the network from there on,
for which alone it is trained.

Legend: as in `ldm3d.diffusion.gaussian`.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.gaussian import ConditionalGaussian, Gaussian, fit_conditional
from ldm3d.diffusion.process import Process
from ldm3d.models.pretrained import Pretrained


class GaussianStart(Pretrained):
    """A `ConditionalGaussian` as weights.

    Args:
        shape: of the normalised latents, as the U-Net takes them, (C, X, Y, Z).
        num_categories: of each covariate; 0 for a continuous one.
        components: k.
        until: sigma / alpha down to which it denoises.
    """

    def __init__(self, shape: Sequence[int], num_categories: Sequence[int], components: int, until: float):
        super().__init__()
        self.shape, self.num_categories, self.until = tuple(shape), tuple(num_categories), until
        p = sum(max(n - 1, 1) for n in num_categories)
        sizes = {"mean": shape, "directions": (components, *shape), "variances": (components,), "rest": (shape[0],)}
        sizes |= {"slopes": (p, *shape), "centre": (p,), "covariance": (p, p)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(*size))

    @classmethod
    def fit(cls, latents: Tensor, context: Tensor, num_categories: Sequence[int], components: int, until: float) -> Self:
        """Fit it to training latents (N, C, X, Y, Z) and their covariates (N, K, 2).

        Raises:
            InputError: too few latents for so many components.
        """
        fitted = fit_conditional(latents, *features(context, num_categories), components)
        start = cls(latents.shape[1:], num_categories, components, until)
        start.load_state_dict({**vars(fitted.residual), **{n: getattr(fitted, n) for n in ("slopes", "centre", "covariance")}})
        return start.requires_grad_(False)

    @property
    def gaussian(self) -> ConditionalGaussian:
        """In float32: the covariance of a latent has large and small parts."""
        names = ("mean", "directions", "variances", "rest", "slopes", "centre", "covariance")
        mean, directions, variances, rest, *others = (getattr(self, name).float() for name in names)
        return ConditionalGaussian(Gaussian(mean, directions, variances, rest), *others)

    def denoiser(self, context: Tensor, process: Process) -> Denoiser:
        """(z, t) -> E[x | z, covariates] for covariates (N, K, 2) of a batch, the encoding of `ldm3d.covariates`."""
        return self.gaussian.denoiser(*features(context, self.num_categories), process)

    def expected(self, context: Tensor) -> Tensor:
        """E[x | covariates], (N, C, X, Y, Z) in float32, for covariates (N, K, 2); open ones are integrated out."""
        gaussian, rows = self.gaussian, zip(*features(context, self.num_categories))
        return torch.cat([gaussian.given(values[None], known).mean for values, known in rows])


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
