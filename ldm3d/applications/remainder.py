"""What an autoencoder cannot hold of a volume, as noise of its own: how large it is at each place, what a scan tells of it.

A volume is x = D(z) + r. The remainder r of an autoencoder looks like white noise (its neighbours correlate by 0.1) whose
size differs by place: it is large at the brain's outline and small in the background. So r ~ N(0, T) with a smooth map T,
learned from what a measurement and the latents drawn for it leave: y - A D(z) = A r + s n.

Legend: A operator, y = A x + s n; residuals q = y - A D(z), (N, C, X', Y', Z'); volumes (N, C, X, Y, Z).
"""

import torch
from torch import Tensor

from ldm3d.diffusion.measurement import conjugate_gradients
from ldm3d.diffusion.operators import Chain, Linear, Measured, blur
from ldm3d.diffusion.posterior import Draw

REACH = 5.0  # voxels over which squares are averaged, full width at half maximum
LEAST = 1e-3  # deviation of a remainder; of the intensity range


class Remainder:
    """The size of r, from the first guess on.

    Args:
        linear: A.
        noise_std: s, of the scan.
        shape: of volumes, (C, X, Y, Z).
        like: gives type and device.
        guess: deviation of r before anything is known.
    """

    def __init__(self, linear: Linear, noise_std: float, shape: tuple[int, ...], like: Tensor, guess: float = 0.04):
        self.linear, self.noise_std, self.like = linear, noise_std, like
        self.variance = torch.full((1, *shape), guess**2).to(like)  # T
        self._near = Chain(*(blur(axis, n, REACH) for axis, n in enumerate(shape[1:])))
        ones = linear(torch.ones_like(self.variance))
        self.measured = ones.abs() > 1e-6
        signs = torch.where(torch.rand(ones.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0).to(ones)
        # (A A')_ii is alike wherever something is measured: 1 for a mask, 1/n for slices of n voxels
        self.share = linear.transpose(signs * self.measured).square().sum() / self.measured.sum()
        self._cover = linear.transpose(self.measured.to(like))

    @property
    def operator(self) -> Measured:
        """A with the noise of y given z: that of A r, and s."""
        variance = self.share * self._averaged(self.variance) + self.noise_std**2
        return Measured(self.linear, variance.sqrt().clamp_min(LEAST))

    def learn(self, residual: Tensor) -> Measured:
        """T from residuals, of each sample its own; the operator as it is then."""
        square = residual.square() * self.measured
        beyond = (square - self.noise_std**2) / self.share
        cover = self._near(self._cover)
        everywhere = (beyond * self.measured).flatten(1).sum(1).reshape(-1, 1, 1, 1, 1) / self.measured.sum()
        few = 1e-3 * self._cover.max()  # deep in a hole nothing is near, and the whole volume's mean counts
        near = (self._near(self.linear.transpose(beyond * self.measured)) + few * everywhere) / (cover + few)
        self.variance = near.clamp_min(LEAST**2)
        return self.operator

    def draw(self, residual: Tensor, draw: Draw) -> Tensor:
        """r given residuals, a draw of each sample."""
        return self._given(residual, self.variance.sqrt() * draw(self.variance.shape[1:]), draw(residual.shape[1:]))

    def mean(self, residual: Tensor) -> Tensor:
        """The expected r given residuals: where a mask measured without noise, it completes the volume to the scan."""
        return self._given(residual, torch.zeros_like(self.variance), torch.zeros_like(residual))

    def _given(self, residual: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
        """prior + T A' (A T A' + s^2)^-1 (q - A prior - s n): an exact draw where prior and n are random."""
        size = max(self.noise_std, LEAST) ** 2
        diagonal = self.share * self._averaged(self.variance) + size

        def system(w: Tensor) -> Tensor:
            return self.linear(self.variance * self.linear.transpose(w)) + size * w

        left = residual - self.linear(prior) - size**0.5 * noise
        weights = conjugate_gradients(system, left, 30, lambda v: v / diagonal, tolerance=1e-3)
        return prior + self.variance * self.linear.transpose(weights)

    def _averaged(self, variance: Tensor) -> Tensor:
        """T as a measurement sees it."""
        ones = self.linear(torch.ones_like(variance))
        return torch.where(self.measured, self.linear(variance) / torch.where(self.measured, ones, 1.0), 0.0).clamp_min(0)
