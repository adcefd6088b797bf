"""Samples given a measurement: for Gaussian latents and a linear decoder they are the posterior's, which is known."""

from dataclasses import replace

import pytest
import torch
from test_measurement import Pairs, posterior
from test_samplers import AXES, COVARIANCE, MEAN, VARIANCES, gaussian_denoiser

from ldm3d.diffusion.gaussian import Gaussian
from ldm3d.diffusion.posterior import informed_draw, sample_posterior
from ldm3d.diffusion.schedules import make_process

REST = 0.005
SHAPE = (1, 2, 2, 1)
PRIOR = Gaussian(MEAN.reshape(SHAPE), AXES.T.reshape(4, *SHAPE), VARIANCES - REST, torch.tensor([REST], dtype=torch.float64))


class Double:
    """D(x) = 2 x, or with a bend: 2 x + bend x^3."""

    def __init__(self, bend=0.0):
        self.bend = bend

    def __call__(self, x):
        return 2 * x + self.bend * x**3

    def jacobian(self, x):
        return Scale()


class Scale:
    def __call__(self, v):
        return 2 * v

    transpose = __call__


class Doubled(Pairs):
    """What Pairs says of x, as an operator of D(x) = 2 x."""

    matrix = Pairs.matrix / 2


def drawer(n, seed=0):
    random = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(n, *shape, dtype=torch.float64, generator=random)


def test_covariances_of_a_gaussian():
    v = drawer(3)(SHAPE)
    torch.testing.assert_close(PRIOR.covariance(v).flatten(1), v.flatten(1) @ COVARIANCE)
    torch.testing.assert_close(PRIOR.precision(v).flatten(1), v.flatten(1) @ torch.linalg.inv(COVARIANCE))
    narrow = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + 3 * torch.eye(4))
    torch.testing.assert_close(PRIOR.narrowed(3.0).covariance(v).flatten(1), v.flatten(1) @ narrow)


def test_precision_by_channel():
    """Two channels, each looked at with its own noise."""
    draw = drawer(2)
    prior = Gaussian(
        torch.zeros(2, 2, 1, 1).double(),
        draw((2, 2, 1, 1)),
        torch.tensor([2.0, 0.5]).double(),
        torch.tensor([0.3, 0.1]).double(),
    )
    eye = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2, 1, 1)
    dense = prior.covariance(eye).flatten(1)
    looked = torch.linalg.inv(torch.linalg.inv(dense) + torch.tensor([1.0, 1, 7, 7]).double().diag())
    torch.testing.assert_close(prior.narrowed(torch.tensor([1.0, 7.0]).double()).covariance(eye).flatten(1), looked)


@pytest.mark.parametrize("kind", ["flow", "vp-cosine"])
@pytest.mark.parametrize("levels", [1, 6])
def test_samples_are_the_posteriors(kind, levels):
    """One level is enough; more of them keep it."""
    n, process = 20_000, make_process(kind)
    y = torch.tensor([[1.0, -2.0]], dtype=torch.float64).expand(n, 2)
    draw = drawer(n)
    x = sample_posterior(
        gaussian_denoiser(process),
        lambda t: PRIOR.narrowed((process.alpha(t) / process.sigma(t)) ** 2),
        Double(),
        Doubled(),
        y,
        draw(SHAPE),
        process.times(levels),
        process,
        draw,
        corrections=1,
    ).flatten(1)
    mean, covariance = posterior(COVARIANCE, MEAN, y[0])
    assert (x.mean(0) - mean).abs().max() < 0.05  # standard error 0.014 of the largest variance
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0.05, atol=0.04)
    assert (x.T.cov() - COVARIANCE).abs().max() > 0.5  # which the measurement has changed


def test_a_bent_decoder_ends_at_the_minimum():
    """Where nothing is drawn the two squares are at their least, with a Jacobian, too, that is not quite the decoder's."""
    decoder, y = Double(0.02), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    operator, still = Doubled(), lambda shape: torch.zeros(1, *shape, dtype=torch.float64)
    m = MEAN.reshape(1, *SHAPE)
    slopes = []
    for corrections in (1, 12):
        x, residual = informed_draw(m, PRIOR, decoder, operator, y, still, corrections, 10)
        x.requires_grad_()
        misfit = y - operator(decoder(x))
        torch.testing.assert_close(misfit, residual)
        size = (misfit**2).sum() / Pairs.noise_std**2 + ((x - m) * PRIOR.precision(x - m)).sum()
        slopes.append(torch.autograd.grad(size, x)[0].abs().max())
    assert slopes[1] < 1e-3 * slopes[0]


def test_noise_can_be_learned_from_residuals():
    """`renew` is told y - A D(x) of every level, and its operator serves at the next."""
    process, seen = make_process("flow"), []

    def renew(residual):
        seen.append(residual.shape)
        operator = Doubled()
        operator.noise_std = 1e-4
        return operator

    y = torch.tensor([[1.0, -2.0]], dtype=torch.float64).expand(5, 2)
    draw = drawer(5)
    x = sample_posterior(
        gaussian_denoiser(process),
        lambda t: PRIOR.narrowed((process.alpha(t) / process.sigma(t)) ** 2),
        Double(),
        Doubled(),
        y,
        draw(SHAPE),
        process.times(3),
        process,
        draw,
        renew=renew,
    )
    assert seen == [(5, 2)] * 3
    torch.testing.assert_close(Pairs()(x), y, atol=1e-2, rtol=0)


def test_a_sample_is_the_same_alone():
    process, prior = make_process("flow"), replace(PRIOR, mean=PRIOR.mean[None])

    def samples(*seeds):
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw(shape):
            return torch.stack([torch.randn(*shape, dtype=torch.float64, generator=g) for g in streams])

        y = torch.tensor([[1.0, -2.0]], dtype=torch.float64).expand(len(seeds), 2)
        spread = lambda t: prior.narrowed((process.alpha(t) / process.sigma(t)) ** 2)  # noqa: E731
        return sample_posterior(
            gaussian_denoiser(process), spread, Double(0.1), Doubled(), y, draw(SHAPE), process.times(3), process, draw
        )

    torch.testing.assert_close(samples(4, 5)[1:], samples(5), rtol=1e-3, atol=1e-3)
