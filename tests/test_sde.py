"""The SDE's samplers: their marginals, at the end and on the way, against the exact ones of Gaussian data."""

import math

import pytest
import torch
from test_samplers import AXES, MEAN, VARIANCES, gaussian_denoiser

from ldm3d.diffusion.samplers import recommended_spacing, sample
from ldm3d.diffusion.schedules import PROCESSES, Flow, make_process
from ldm3d.diffusion.sde import sample_predictor_corrector, sample_sde_euler, sample_sde_heun
from ldm3d.errors import InputError

SAMPLERS = {"sde-euler": sample_sde_euler, "sde-heun": sample_sde_heun, "sde-pc": sample_predictor_corrector}


@pytest.fixture(params=PROCESSES)
def process(request):
    return make_process(request.param)


def draws(n, seed=0):
    """A stream of independent noise for n samples."""
    random = torch.Generator().manual_seed(seed)
    return lambda _: torch.randn(n, 1, 2, 2, 1, dtype=torch.float64, generator=random)


def moments_of(z):
    """(mean, variances along the data's axes) of samples."""
    return z.flatten(1).mean(0), (AXES.T @ z.flatten(1).T.cov() @ AXES).diag()


class Law:
    """The exact distribution of a sampler that is linear in z and noise, as it is for Gaussian data: no Monte Carlo error.

    Samplers are run on the sum of all they were ever given: column j of the batch is the answer to the j-th of those inputs
    alone, and one more column, all inputs zero, is the mean. The covariance is then the sum over columns.
    """

    def __init__(self, draws: int):
        self.draws = draws
        self.size = 4 * (1 + draws) + 1

    def noise(self, i):
        """Noise number i: the identity in its own four columns."""
        return self._own(1 + i)

    def start(self):
        return self._own(0)

    def _own(self, block):
        z = torch.zeros(self.size, 4, dtype=torch.float64)
        z[4 * block : 4 * block + 4] = torch.eye(4, dtype=torch.float64)
        return z.reshape(-1, 1, 2, 2, 1)

    @staticmethod
    def moments(z):
        mean = z.flatten(1)[-1]
        parts = (z.flatten(1)[:-1] - mean) @ AXES
        return mean, parts.T @ parts  # covariance in the data's axes


def law_of(name, process, steps, times=None, draws=None, **options):
    """(mean, covariance along the data's axes) of a sampler's answer, exactly."""
    law = Law(draws or 2 * steps)
    times = times or process.times(steps, recommended_spacing(name, process))
    return Law.moments(SAMPLERS[name](gaussian_denoiser(process), law.start(), times, process, noise=law.noise, **options))


# Known answers


@pytest.mark.parametrize("name, tolerance", [("sde-euler", 0.05), ("sde-heun", 0.02), ("sde-pc", 0.06)])
def test_the_marginal_is_the_data(process, name, tolerance):
    """From pure noise to t = 0: the exact mean and covariance of what 300 steps draw (150 of Heun)."""
    steps = 150 if name == "sde-heun" else 300
    mean, covariance = law_of(name, process, steps, process.times(steps, "share"))
    assert (mean - MEAN).abs().max() < 0.02
    torch.testing.assert_close(covariance, VARIANCES.diag(), rtol=tolerance, atol=0.004)


@pytest.mark.parametrize("name, order", [("sde-euler", 1), ("sde-heun", 2)])
def test_order_of_convergence(process, name, order):
    """In distribution, from and to inner times, starting from the marginal of the first: 2^order with twice the steps."""
    first, last = process.t_of_lam(-3.0), process.t_of_lam(2.0)
    error = {}
    for n in (40, 80):
        times = process.t_of_lam(torch.linspace(-3, 2, n + 1, dtype=torch.float64)).tolist()
        law = Law(n)
        std = (process.alpha(first) ** 2 * VARIANCES + process.sigma(first) ** 2).sqrt()
        start = law.start().flatten(1) @ (AXES * std @ AXES.T) + process.alpha(first) * MEAN
        z = SAMPLERS[name](gaussian_denoiser(process), start.reshape(-1, 1, 2, 2, 1), times, process, noise=law.noise)
        mean, covariance = Law.moments(z)
        exact = (process.alpha(last) ** 2 * VARIANCES + process.sigma(last) ** 2).diag()
        error[n] = (covariance - exact).norm().item() + (mean - process.alpha(last) * MEAN).norm().item()
    assert math.log2(error[40] / error[80]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", ["sde-euler", "sde-heun"])
def test_as_much_is_forgotten_as_the_sde_forgets(process, name):
    """What is left of the start: z_t = a z_s + noise forwards, so backwards z_s = a Var z_s / Var z_t z_t + noise.

    A sampler with more or less noise in each step has the right marginals, too, but is no sampler of this SDE.
    """
    first, last = process.t_of_lam(-1.0), process.t_of_lam(1.0)
    times = process.t_of_lam(torch.linspace(-1, 1, 81, dtype=torch.float64)).tolist()
    law = Law(80)
    z = SAMPLERS[name](gaussian_denoiser(process), law.start(), times, process, noise=law.noise)
    response = AXES.T @ (z.flatten(1)[:4] - z.flatten(1)[-1]).T @ AXES
    before, after = (process.alpha(t) ** 2 * VARIANCES + process.sigma(t) ** 2 for t in (first, last))
    exact = process.alpha(first) / process.alpha(last) * after / before
    torch.testing.assert_close(response, exact.diag(), rtol=0.05, atol=0.004)


def test_law_is_what_samples_have():
    """The columns of `Law` against 20,000 samples."""
    n, steps = 20_000, 10
    for name in SAMPLERS:
        mean, covariance = law_of(name, Flow(), steps, Flow().times(steps))
        fresh = draws(n)
        z = sample(name, gaussian_denoiser(Flow()), fresh(0), Flow(), steps, spacing="uniform", noise=fresh)
        found, variances = moments_of(z)
        torch.testing.assert_close(found, mean, rtol=0, atol=0.06)
        torch.testing.assert_close(variances, covariance.diag(), rtol=0.05, atol=0)


def test_corrections_mend_what_the_predictor_did():
    """With few steps the predictor makes too little variance; Langevin steps bring it back, most with a larger snr."""
    times = Flow().times(12)
    wrong = [
        (law_of("sde-pc", Flow(), 12, times, draws=12 * (n + 1), corrections=n, snr=0.3)[1][3, 3] - VARIANCES[3]).abs()
        for n in (0, 2, 8)
    ]
    assert wrong[2] < wrong[1] < wrong[0]


def test_langevin_alone_is_as_wrong_as_it_says():
    """At a time where the data are a point, corrections alone end in a variance of sigma^2 / (1 - snr^2)."""
    t, snr, law = 0.5, 0.4, Law(402)

    def point(z, t):
        return torch.zeros_like(z)

    z = sample_predictor_corrector(point, law.start(), [0.5 + 1e-9, t], Flow(), noise=law.noise, corrections=400, snr=snr)
    _, covariance = Law.moments(z)
    exact = Flow().sigma(t) ** 2 / (1 - snr**2) * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(covariance, exact, rtol=1e-6, atol=1e-9)


def test_heun_from_pure_noise_forgets_it_as_the_sde_does():
    """alpha(1) = 0: however large the step, only the denoised latent, which is the mean, and fresh noise are left."""
    mean, covariance = law_of("sde-heun", Flow(), 1, [1.0, 0.9])
    torch.testing.assert_close(mean, 0.1 * MEAN)
    torch.testing.assert_close(covariance, 0.81 * torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_few_steps_stay_bounded(process, name, steps):
    """No step, however large, blows noise up: at most five times the data's standard deviation."""
    _, covariance = law_of(name, process, steps)
    assert torch.isfinite(covariance).all() and covariance.diag().max() < 25 * VARIANCES.max()


# The interface


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_draw_of_noise_is_another(name):
    asked = []

    def noted(i):
        asked.append(i)
        return draws(3, i)(i)

    options = {"corrections": 2} if name == "sde-pc" else {}
    sample(name, gaussian_denoiser(Flow()), draws(3)(0), Flow(), 5, noise=noted, **options)
    assert len(set(asked)) == len(asked) == (12 if name == "sde-pc" else 4)  # none in the last step


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sde-euler", {}, "give noise="),
        ("sde-heun", {}, "give noise="),
        ("sde-pc", {}, "give noise="),
        ("sde-pc", {"noise": draws(3), "corrections": -1}, "corrections -1"),
        ("sde-pc", {"noise": draws(3), "snr": 1.5}, "snr 1.5"),
        ("sde-pc", {"noise": draws(3), "correction": 1}, "did you mean 'corrections'"),
    ],
)
def test_errors_name_the_way_out(name, options, message):
    with pytest.raises(InputError, match=message):
        sample(name, gaussian_denoiser(Flow()), draws(3)(0), Flow(), 5, **options)
