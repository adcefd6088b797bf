"""Denoisers that know a measurement: against Gaussian data, whose posterior is known in closed form."""

import pytest
import torch
from test_samplers import AXES, COVARIANCE, MEAN, VARIANCES, gaussian_denoiser, noise

from ldm3d.diffusion.measurement import conjugate_gradients, consistent, kept
from ldm3d.diffusion.samplers import sample
from ldm3d.diffusion.schedules import make_process

PROCESS = make_process("vp-cosine")


class Pairs:
    """Sums of the first two and of the last two elements of (N, 1, 2, 2, 1), measured with noise: y (N, 2)."""

    noise_std = 0.3
    matrix = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64)

    def __call__(self, x):
        return x.flatten(1) @ self.matrix.T

    def transpose(self, y):
        return (y @ self.matrix).reshape(-1, 1, 2, 2, 1)


def posterior(covariance, mean, y):
    """Mean and covariance of x ~ N(mean, covariance) given y = A x + s n."""
    a = Pairs.matrix
    gain = covariance @ a.T @ torch.linalg.inv(a @ covariance @ a.T + Pairs.noise_std**2 * torch.eye(2))
    return mean + (y - mean @ a.T) @ gain.T, covariance - gain @ a @ covariance


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_denoised_latent_given_noise_and_measurement_is_exact(t):
    z, y = noise(1), torch.tensor([[1.0, -2.0]], dtype=torch.float64).expand(16, 2)
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    left = AXES @ (VARIANCES * sigma**2 / (alpha**2 * VARIANCES + sigma**2)).diag() @ AXES.T  # of x given z
    wanted, _ = posterior(left, gaussian_denoiser(PROCESS)(z, t).flatten(1), y)
    with torch.no_grad():  # as sampling computes
        found = consistent(gaussian_denoiser(PROCESS), Pairs(), y, PROCESS)(z, t)
    torch.testing.assert_close(found.flatten(1), wanted)


def test_samples_are_the_posteriors():
    n = 4000
    random = torch.Generator().manual_seed(0)
    z = torch.randn(n, 1, 2, 2, 1, dtype=torch.float64, generator=random)
    y = torch.tensor([[1.0, -2.0]], dtype=torch.float64).expand(n, 2)
    denoise = consistent(gaussian_denoiser(PROCESS), Pairs(), y, PROCESS)
    x = sample("heun", denoise, z, PROCESS, 40).flatten(1)
    mean, covariance = posterior(COVARIANCE, MEAN, y[0])
    assert (x.mean(0) - mean).abs().max() < 0.1
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0.15, atol=0.1)
    assert (x.T.cov() - COVARIANCE).abs().max() > 0.5  # which the measurement has changed


def test_what_is_known_is_kept():
    known, mask = torch.full((16, 1, 2, 2, 1), 7.0, dtype=torch.float64), torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1, 1)
    denoise = gaussian_denoiser(PROCESS)
    x = kept(denoise, known, mask)(noise(2), 0.5)
    assert (x[:, :, 0] == 7).all()
    torch.testing.assert_close(x[:, :, 1], denoise(noise(2), 0.5)[:, :, 1])


def test_conjugate_gradients_solve_each_samples_system():
    random = torch.Generator().manual_seed(3)
    root = torch.randn(5, 4, 4, dtype=torch.float64, generator=random)
    matrix = root @ root.mT + torch.eye(4, dtype=torch.float64)
    b = torch.randn(5, 4, dtype=torch.float64, generator=random)
    w = conjugate_gradients(lambda v: (matrix @ v[..., None])[..., 0], b, 6)
    torch.testing.assert_close(w, torch.linalg.solve(matrix, b))
