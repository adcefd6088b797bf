"""A pipeline's decoder as the sampler of posteriors wants it: differentiable, not clipped, with its Jacobian.

Legend: x normalised latent as the U-Net takes it (padded), (N, c, x, y, z); J the Jacobian of the volume (N, C, X, Y, Z).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ldm3d.diffusion.posterior import Jacobian
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.blocks import depth_to_space, space_to_depth
from ldm3d.models.recomputing import decode_recomputed
from ldm3d.models.unet import cut_to
from ldm3d.pipeline import Pipeline


class LatentDecoder:
    """D: the decoder of a pipeline, in float32.

    Its Jacobian is that of the autoencoder's linear path, where it has one: one convolution on the latent grid, against the
    whole decoder, and close, because the network only corrects it.
    """

    def __init__(self, pipe: Pipeline):
        self.autoencoder = pipe.autoencoder
        self.dtype = pipe.dtype
        self.shape = pipe.autoencoder.latent_shape(pipe.grid.shape)[1:]

    def __call__(self, x: Tensor) -> Tensor:
        latent = self.autoencoder.denormalise(cut_to(x, self.shape)).to(self.dtype)
        if torch.is_grad_enabled() and latent.requires_grad:
            return decode_recomputed(self.autoencoder, latent).float()
        return self.autoencoder.decode(latent).float()

    def jacobian(self, x: Tensor) -> Jacobian:
        if isinstance(self.autoencoder, Autoencoder) and self.autoencoder.synthesis is not None:
            return LinearPath(self.autoencoder, self.shape, x.shape[2:])
        return Exact(self, x)


class LinearPath:
    """J of an autoencoder's linear path.

    Args:
        autoencoder: with such a path.
        shape: of its latents, (x, y, z).
        padded: of those of the U-Net.
    """

    def __init__(self, autoencoder: Autoencoder, shape: tuple[int, ...], padded: torch.Size):
        assert autoencoder.synthesis is not None
        self.factor, self.shape = autoencoder.downsampling, shape
        self.kernel = autoencoder.synthesis.weight.float() * autoencoder.latent_std.float()[:, None, None, None]
        before = [(m - n) // 2 for n, m in zip(shape, padded)]
        # functional.pad names the last axis first
        self.padding = [side for n, m, first in reversed([*zip(shape, padded, before)]) for side in (first, m - n - first)]

    def __call__(self, v: Tensor) -> Tensor:
        return depth_to_space(functional.conv3d(cut_to(v, self.shape), self.kernel, padding=1), self.factor)

    def transpose(self, w: Tensor) -> Tensor:
        latent = functional.conv_transpose3d(space_to_depth(w, self.factor), self.kernel, padding=1)
        return functional.pad(latent, self.padding)


class Exact:
    """J at x, by automatic differentiation in both directions: each product costs more than a pass through the decoder."""

    def __init__(self, decode: Callable[[Tensor], Tensor], x: Tensor):
        self.decode, self.x = decode, x.detach()
        with torch.enable_grad():
            self.variable = self.x.clone().requires_grad_()
            self.image = decode(self.variable)

    def __call__(self, v: Tensor) -> Tensor:
        change: Tensor = torch.func.jvp(self.decode, (self.x,), (v,))[1]
        return change

    def transpose(self, w: Tensor) -> Tensor:
        return torch.autograd.grad(self.image, self.variable, w, retain_graph=True)[0]
