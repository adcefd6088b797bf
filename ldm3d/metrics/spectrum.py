"""How much of a latent is structure that a network can predict, and how much looks like white noise.

Diffusion models draw coarse structure first because, in images, noise drowns fine detail first. Latents whose power lies at
high frequencies lose that order, and are harder to learn (Skorokhodov et al. 2025).
"""

import torch
from torch import Tensor


def high_frequency_share(z: Tensor) -> Tensor:
    """Share of each channel's power at frequencies above half of Nyquist along any axis.

    Args:
        z: (N, C, X, Y, Z), sides of 4 or more. The mean over positions of each latent does not count.

    Returns:
        (C,), in [0, 1]. White noise has the share of frequencies that lie there, 1 - 1/2^3 = 0.875 on a large grid.
    """
    z = z.double()
    power = torch.fft.fftn(z - z.mean(dim=(2, 3, 4), keepdim=True), dim=(2, 3, 4)).abs().square().sum(dim=0)  # (C, X, Y, Z)
    x, y, z_axis = (torch.fft.fftfreq(n, device=power.device).abs() > 0.25 for n in power.shape[1:])  # Nyquist is 0.5
    high = x[:, None, None] | y[:, None] | z_axis
    return (power * high).sum(dim=(1, 2, 3)) / power.sum(dim=(1, 2, 3)).clamp_min(1e-30)


def neighbour_correlation(z: Tensor) -> Tensor:
    """Correlation of each channel with itself one position on, averaged over the three axes: (N, C, X, Y, Z) -> (C,)."""
    z = z.double()
    z = z - z.mean(dim=(0, 2, 3, 4), keepdim=True)
    variance = z.square().mean(dim=(0, 2, 3, 4)).clamp_min(1e-30)
    products = [z.narrow(axis, 0, z.shape[axis] - 1) * z.narrow(axis, 1, z.shape[axis] - 1) for axis in (2, 3, 4)]
    return sum(product.mean(dim=(0, 2, 3, 4)) for product in products) / 3 / variance
