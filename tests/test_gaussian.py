"""The Gaussian in closed form: against dense linear algebra, and data whose distribution is known."""

import pytest
import torch

from ldm3d.diffusion.gaussian import ConditionalGaussian, Gaussian, denoising_errors
from ldm3d.diffusion.gaussian_fit import fit_gaussian
from ldm3d.diffusion.samplers import sample
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError

SHAPE = (2, 3, 2, 2)  # D = 24


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def gaussian():
    directions = torch.linalg.qr(random(24, 3))[0].T.reshape(3, *SHAPE)
    rest, variances = torch.tensor([0.3, 0.05], dtype=torch.float64), torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64)
    return Gaussian(random(*SHAPE, seed=1), directions, variances, rest)


def covariance(gaussian):
    u = gaussian.directions.flatten(1)
    return u.T @ torch.diag(gaussian.variances) @ u + torch.diag(gaussian.rest.repeat_interleave(12))


@pytest.mark.parametrize("kind", ["flow", "vp-cosine"])
@pytest.mark.parametrize("t", [0.02, 0.5, 0.97, 1.0])
def test_denoiser_is_the_posterior_mean(gaussian, kind, t):
    process, z = make_process(kind), random(5, *SHAPE, seed=2)
    alpha, sigma = process.alpha(t), process.sigma(t)
    s, mean = covariance(gaussian), gaussian.mean.flatten()
    dense = torch.linalg.solve(alpha**2 * s + sigma**2 * torch.eye(24).double(), (z.flatten(1) - alpha * mean).T)
    expected = mean + (alpha * s @ dense).T
    torch.testing.assert_close(gaussian.denoiser(process)(z, t).flatten(1), expected, rtol=1e-9, atol=1e-9)


def test_samples_and_samplers_have_its_covariance(gaussian):
    """Drawn directly, and by following the denoiser from noise."""
    drawn = gaussian.sample(random(20000, *SHAPE, seed=3), random(20000, 3, seed=4)).flatten(1)
    torch.testing.assert_close(torch.cov(drawn.T), covariance(gaussian), rtol=0, atol=0.15)
    process = make_process("flow")
    followed = sample("heun", gaussian.denoiser(process), random(20000, *SHAPE, seed=5), process, 40)
    torch.testing.assert_close(torch.cov(followed.flatten(1).T), covariance(gaussian), rtol=0, atol=0.2)


def test_variances_are_those_of_samples_that_were_left_out():
    """20 samples of 128 dimensions say too little of themselves; left-out ones meet the errors of mean and directions."""
    shape, rest = (2, 4, 4, 4), torch.tensor([0.3, 0.05], dtype=torch.float64)
    directions = torch.linalg.qr(random(128, 2))[0].T.reshape(2, *shape)
    true = Gaussian(random(*shape, seed=1), directions, torch.tensor([90.0, 40.0], dtype=torch.float64), rest)
    found, own = [], []
    for seed in range(4):
        x = true.sample(random(20, *shape, seed=60 + seed), random(20, 2, seed=70 + seed))
        fitted = fit_gaussian(x, 2)
        found.append(fitted.rest / rest)
        assert 0.6 < float(fitted.variances.sum() / 130) < 1.6
        u = fitted.directions.flatten(1).double()
        within = (x - x.mean(dim=0)).flatten(1)
        own.append((within - within @ u.T @ u).square().mean() / rest.mean())
    assert (torch.stack(found).mean(dim=0) > 1).all() and (torch.stack(found).mean(dim=0) < 1.4).all()
    assert torch.stack(own).mean() < 0.95


def test_fitted_denoiser_is_nearly_the_best_on_new_data(gaussian):
    process, times = make_process("flow"), [0.1, 0.4, 0.8]
    x = gaussian.sample(random(300, *SHAPE, seed=8), random(300, 3, seed=9))
    new = gaussian.sample(random(300, *SHAPE, seed=10), random(300, 3, seed=11))
    noise = random(*new.shape, seed=12)
    best, fitted, mean = (
        denoising_errors(g.denoiser(process), new, noise, times, process).mean()
        for g in (
            gaussian,
            fit_gaussian(x, 3),
            Gaussian(gaussian.mean, gaussian.directions, 0 * gaussian.variances, 0 * gaussian.rest),
        )
    )
    assert best < fitted < 1.05 * best
    assert fitted < 0.7 * mean


def test_too_few_samples_are_refused_with_how_many_components_they_can_have():
    with pytest.raises(InputError, match="at most 7"):
        fit_gaussian(random(10, *SHAPE), 8)
    fit_gaussian(random(10, *SHAPE), 7)


def test_autocast_leaves_it_alone(gaussian):
    """Trainings ask it within autocast, and its variances may differ by many orders of magnitude."""
    process, z = make_process("flow"), 100 * random(3, *SHAPE, seed=6).float()
    parts = gaussian.mean, gaussian.directions, gaussian.variances * 100, gaussian.rest / 100
    single = Gaussian(*(part.float() for part in parts))
    conditional = ConditionalGaussian(single, random(2, *SHAPE, seed=7).float(), torch.zeros(2), torch.eye(2))
    known = torch.tensor([[True, False]] * 3)

    def answers():
        features = random(3, 2, seed=8).float()
        yield from (
            single.denoiser(process)(z, 0.4),
            single.covariance(z),
            single.precision(z),
            single.narrowed(2.0).directions,
        )
        yield from (single.sample(z, features[:, [0, 0, 1]]))
        yield conditional.denoiser(features, known, process)(z, 0.4)

    plain = list(answers())
    with torch.autocast("cpu", torch.bfloat16):
        again = list(answers())
    assert all(torch.equal(one, other) for one, other in zip(plain, again))
