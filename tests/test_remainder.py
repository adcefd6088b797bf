"""What an autoencoder cannot hold: its size is found again, and draws given a measurement are the posterior's."""

import torch

from ldm3d.applications.remainder import Remainder
from ldm3d.diffusion.operators import mask, slices

SHAPE = (1, 4, 4, 8)
LIKE = torch.zeros(1, *SHAPE, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(operator):
    eye = torch.eye(LIKE.numel(), dtype=torch.float64).reshape(-1, *SHAPE)
    return operator(eye).flatten(1).T  # (measurements, voxels)


def test_draws_are_the_posteriors():
    """Of white noise whose size differs by place, seen in slices of two voxels."""
    n, operator, noise = 20_000, slices(2, 8, 2, profile="box"), 0.3
    remainder = Remainder(operator, noise, SHAPE, LIKE)
    remainder.variance = (1 + random(1, *SHAPE).abs()).square()
    a, prior = dense(operator), remainder.variance.flatten().diag()
    seen = a @ random(LIKE.numel(), seed=1)
    gain = prior @ a.T @ torch.linalg.inv(a @ prior @ a.T + noise**2 * torch.eye(len(seen), dtype=torch.float64))
    residual = seen.reshape(1, 1, 4, 4, 4)
    torch.testing.assert_close(remainder.mean(residual).flatten(), gain @ seen, rtol=1e-3, atol=2e-3)
    stream = torch.Generator().manual_seed(2)
    drawn = remainder.draw(
        residual.expand(n, -1, -1, -1, -1), lambda shape: torch.randn(n, *shape, dtype=torch.float64, generator=stream)
    ).flatten(1)
    assert (drawn.mean(0) - gain @ seen).abs().max() < 0.15  # standard error 0.03
    wanted = prior - gain @ a @ prior
    assert (drawn.T.cov() - wanted).abs().max() < 0.05 * wanted.max()


def test_noise_of_a_measurement_is_that_of_the_remainder_and_the_scan():
    """Slices of two voxels average: half of the variance."""
    remainder = Remainder(slices(2, 8, 2, profile="box"), 0.3, SHAPE, LIKE, guess=0.4)
    torch.testing.assert_close(remainder.operator.noise_std, torch.full((1, 1, 4, 4, 4), (0.08 + 0.09) ** 0.5).double())


def test_its_size_is_learned_by_place():
    """Ten times as large in one half, as large as the neighbourhood in a hole, and without the scan's noise."""
    shape, noise = (1, 24, 24, 24), 0.05
    size = torch.full(shape, 0.02, dtype=torch.float64)
    size[:, 12:] = 0.2
    known = torch.ones(24, 24, 24)
    known[15:20, 8:14, 8:14] = 0
    operator = mask(known)
    residual = operator(size * random(1, *shape) + noise * random(1, *shape, seed=1))
    remainder = Remainder(operator, noise, shape, residual)
    learned = remainder.learn(residual)
    found = remainder.variance.sqrt()[0, 0]
    assert abs(found[20:, :, :].mean() - 0.2) < 0.01
    assert abs(found[17, 10, 10] - 0.2) < 0.06  # in the hole
    assert found[:6].mean() < 0.03
    torch.testing.assert_close(learned.noise_std[0, 0, 20:].mean(), torch.tensor(0.206).double(), rtol=0.05, atol=0)


def test_a_mask_without_noise_completes_the_volume():
    """Where all was seen the remainder is the residual itself."""
    known = torch.ones(4, 4, 8)
    known[1:3] = 0
    operator = mask(known)
    remainder = Remainder(operator, 1e-6, SHAPE, LIKE, guess=0.5)
    residual = operator(random(1, *SHAPE))
    torch.testing.assert_close(remainder.mean(residual), residual, rtol=1e-3, atol=1e-3)
