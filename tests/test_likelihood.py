"""Likelihood: against Gaussian data, of which -log p is known and the denoiser exact.

Both estimates score x' = x + (sigma_0 / alpha_0) e, whose distribution is N(MEAN, COVARIANCE + (sigma_0 / alpha_0)^2).
"""

import math
from itertools import pairwise

import pytest
import scipy.stats
import torch
from test_samplers import AXES, COVARIANCE, MEAN, VARIANCES, gaussian_denoiser

from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.diffusion.likelihood import low_discrepancy, ode_nll, variational_bound, window
from ldm3d.diffusion.schedules import PROCESSES, VDM, Flow, make_process
from ldm3d.errors import InputError
from ldm3d.evaluation.likelihood import laplace_log_probability, laplace_nats, score
from ldm3d.geometry import Grid
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.unet import LatentUNet, UNet
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator

N = 400


@pytest.fixture(params=PROCESSES)
def process(request):
    return make_process(request.param)


def noise(i, n=N):
    return torch.randn(n, 1, 2, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 + i))


def data(n=N):
    """Samples of N(MEAN, COVARIANCE), in pairs mirrored at the mean."""
    half = noise(-1, n // 2).flatten(1) @ (AXES * VARIANCES.sqrt()).T
    return (MEAN + torch.cat([half, -half])).reshape(n, 1, 2, 2, 1)


def true_nll(x, e, lam_0):
    """-log p(x') of these very x' in nats, (N,)."""
    spread = math.exp(-lam_0)
    law = torch.distributions.MultivariateNormal(MEAN, COVARIANCE + spread**2 * torch.eye(4, dtype=torch.float64))
    return -law.log_prob((x + spread * e).flatten(1))


def hadamard(i):
    """noise(0), then sign vectors whose mean is the exact trace of any 4 x 4 matrix."""
    rows = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    return noise(0) if i == 0 else torch.tensor(rows[i - 1], dtype=torch.float64).reshape(1, 1, 2, 2, 1).expand(N, 1, 2, 2, 1)


def squared_error(process, lam):
    """E |x - denoise(z)|^2 at lambda, exactly."""
    t = process.t_of_lam(lam)
    alpha, sigma = process.alpha(t), process.sigma(t)
    return (VARIANCES * sigma**2 / (alpha**2 * VARIANCES + sigma**2)).sum().item()


# The bound


def test_bound_of_the_exact_denoiser_is_the_true_nll(process):
    """As the exact reverse process loses nothing. Within three standard errors, which the noise of the path makes."""
    x = data()
    bound = variational_bound(gaussian_denoiser(process), x, process, noise, low_discrepancy(300))
    truth = torch.stack([true_nll(x, noise(2000 + i), window(process)[0]) for i in range(50)]).mean(0)
    difference = bound.total - truth
    assert difference.std() / math.sqrt(N) < 0.08  # the test can see something
    assert difference.mean().abs() < 3 * difference.std() / math.sqrt(N)
    torch.testing.assert_close(bound.total, bound.prior + bound.reconstruction + bound.diffusion)
    torch.testing.assert_close(bound.nats_per_dimension, bound.total / 4)


def test_parts_of_the_bound_by_hand():
    """For one x of known distance: the KL of two Gaussians, an entropy, and a denoiser that is off by a known amount."""
    x = torch.full((1, 1, 2, 2, 1), 3.0, dtype=torch.float64)
    process = VDM((-4.0, 2.0))
    bound = variational_bound(lambda z, t: x - 0.1, x, process, lambda i: noise(i, 1), low_discrepancy(500))
    alpha2, sigma2 = (torch.sigmoid(torch.tensor(g, dtype=torch.float64)) for g in (-2.0, 2.0))
    prior = torch.distributions.kl_divergence(
        torch.distributions.Normal(3 * alpha2.sqrt(), sigma2.sqrt()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(bound.prior, 4 * prior[None])
    entropy = 0.5 * math.log(2 * math.pi * math.e * math.exp(-4))
    assert bound.reconstruction.item() == pytest.approx(4 * entropy)
    # 1 / 2 (SNR_0 - SNR_1) |x - x'|^2
    assert bound.diffusion.item() == pytest.approx((math.exp(4) - math.exp(-2)) / 2 * 4 * 0.01, rel=1e-4)


@pytest.mark.parametrize("even_in", ["t", "lambda"])
def test_steps_approach_the_continuous_bound_from_above(process, even_in):
    """Against the exact sums and integral for Gaussian data, with the same few latents and the noise averaged out."""
    lam_0, lam_1 = window(process)
    bounds = {}
    for steps in (8, 16, 32, 64, 512):
        nodes = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        if even_in == "lambda":
            lams = (lam_0 + nodes * (lam_1 - lam_0)).tolist()
        else:
            t_0, t_1 = process.t_of_lam(lam_0), process.t_of_lam(lam_1)
            lams = [process.lam(t_0 + q * (t_1 - t_0)) for q in nodes.tolist()]
        exact = [(math.exp(2 * s) - math.exp(2 * t)) / 2 * squared_error(process, t) for s, t in pairwise(lams)]
        bounds[steps] = sum(exact)
        if steps <= 16:
            options = {"steps": steps, "even_in": even_in}
            found = variational_bound(gaussian_denoiser(process), data(), process, noise, low_discrepancy(steps), **options)
            # The first steps make nearly all of it, so that the sample's own noise is what is left
            assert found.diffusion.mean().item() == pytest.approx(bounds[steps], rel=0.12)
    values = list(bounds.values())
    assert all(more > fewer for more, fewer in pairwise(values))
    grid = torch.linspace(lam_1, lam_0, 801, dtype=torch.float64)
    integrand = torch.tensor([math.exp(2 * lam) * squared_error(process, lam) for lam in grid.tolist()])
    continuous = torch.trapezoid(integrand.double(), grid).item()
    assert continuous < values[-1]
    if even_in == "lambda":
        assert values[-1] == pytest.approx(continuous, rel=0.03)
        assert (values[2] - continuous) / (values[3] - continuous) > 1.7  # first order
    everywhere = variational_bound(
        gaussian_denoiser(process), data(), process, noise, low_discrepancy(400), even_in="lambda"
    ).diffusion
    assert everywhere.mean().item() == pytest.approx(continuous, abs=4 * everywhere.std().item() / math.sqrt(N))


def test_bound_does_not_depend_on_the_inner_schedule():
    """The same ends, three inner schedules, quantiles even in t: one bound (Kingma et al. 2021, eq. 18)."""
    schedules = [(-10.0, 8.0), (-10.0, -2.0, 0.0, 8.0), (-10.0, -9.0, -5.0, 8.0)]
    totals = []
    for knots in schedules:
        process = VDM(knots)
        totals.append(variational_bound(gaussian_denoiser(process), data(), process, noise, low_discrepancy(400)).total)
    means = [total.mean().item() for total in totals]
    error = max((total - totals[0]).std().item() for total in totals) / math.sqrt(N)
    assert error < 0.08
    assert max(means) - min(means) < 4 * error
    other_ends = VDM((-10.0, 0.0))  # while the ends do matter
    other = variational_bound(gaussian_denoiser(other_ends), data(), other_ends, noise, low_discrepancy(400)).total
    assert other.mean().item() - means[0] > 0.5


def test_low_discrepancy_times_lower_the_variance():
    """One x, the exact denoiser, 16 times: variance over 200 repeats, of low-discrepancy and of independent times."""
    process, random = Flow(), torch.Generator().manual_seed(0)
    x, denoise = data()[:1].expand(8, -1, -1, -1, -1), gaussian_denoiser(Flow())

    def repeat(quantiles):
        fresh = lambda _: torch.randn(x.shape, dtype=torch.float64, generator=random)  # noqa: E731
        return variational_bound(denoise, x, process, fresh, quantiles).total

    even, independent = [], []
    for _ in range(200):
        even.append(repeat(low_discrepancy(16, torch.rand((), generator=random).item())).mean())
        independent.append(repeat(torch.rand(16, generator=random).tolist()).mean())
    even, independent = torch.stack(even), torch.stack(independent)
    assert even.var() < independent.var() / 3
    error = math.sqrt((even.var() + independent.var()) / 200)
    assert (even.mean() - independent.mean()).abs() < 4 * error  # and neither is biased against the other


def test_low_discrepancy_is_even_and_uniform():
    quantiles = low_discrepancy(8, 0.97)
    assert all(b - a == pytest.approx(1 / 8) for a, b in pairwise(quantiles))
    assert quantiles[0] == pytest.approx(0.97 / 8)
    assert low_discrepancy(2) == [0.25, 0.75]


# The ODE


def test_ode_is_the_true_nll_of_every_sample(process):
    """With an exact trace, what is left is Heun's error and the prior's, which takes z at the end to be N(0, 1)."""
    found = ode_nll(gaussian_denoiser(process), data(), process, hadamard, steps=100, probes=4)
    truth = true_nll(data(), noise(0), window(process)[0])
    assert found.dtype == torch.float64
    assert (found - truth).mean().abs() < 0.015
    assert (found - truth).abs().max() < 0.15


def test_ode_converges_with_order_two():
    """With ends far enough apart that the prior is exact."""
    truth, error = true_nll(data(), noise(0), 4.0), {}
    for steps in (50, 100):
        found = ode_nll(gaussian_denoiser(Flow()), data(), Flow(), hadamard, steps=steps, probes=4, ends=(4.0, -12.0))
        error[steps] = (found - truth).norm().item()
    assert math.log2(error[50] / error[100]) == pytest.approx(2, abs=0.2)


def test_hutchinson_is_unbiased():
    """Random signs and exact traces give one mean; the difference is within four standard errors and not nothing."""
    arguments = gaussian_denoiser(Flow()), data(), Flow()
    difference = ode_nll(*arguments, noise, steps=20) - ode_nll(*arguments, hadamard, steps=20, probes=4)
    assert difference.std() > 0.05
    assert difference.mean().abs() < 4 * difference.std() / math.sqrt(N)
    more = ode_nll(*arguments, noise, steps=20, probes=8) - ode_nll(*arguments, hadamard, steps=20, probes=4)
    assert more.std() < 0.6 * difference.std()


def test_bound_and_ode_agree_and_a_worse_denoiser_scores_worse(process):
    exact = gaussian_denoiser(process)

    def shrunk(z, t):
        return 0.8 * exact(z, t)

    bounds = [
        variational_bound(denoise, data(), process, noise, low_discrepancy(100)).total.mean() for denoise in (exact, shrunk)
    ]
    odes = [ode_nll(denoise, data(), process, hadamard, steps=50, probes=4).mean() for denoise in (exact, shrunk)]
    assert (bounds[0] - odes[0]).abs() < 0.25
    assert bounds[1] > bounds[0] + 1
    assert odes[1] > odes[0] + 0.1
    assert bounds[1] > odes[1]


def test_float32_is_enough(process):
    single, double = (
        {"x": data().to(dtype), "noise": lambda i, d=dtype: noise(i).to(d)} for dtype in (torch.float32, torch.float64)
    )
    denoise = gaussian_denoiser(process)
    bounds = [
        variational_bound(denoise, process=process, quantiles=low_discrepancy(20), **each).total for each in (single, double)
    ]
    torch.testing.assert_close(*bounds, rtol=1e-4, atol=2e-3)
    odes = [ode_nll(denoise, process=process, steps=20, **each) for each in (single, double)]
    torch.testing.assert_close(*odes, rtol=1e-4, atol=2e-3)


def test_a_sample_does_not_depend_on_its_batch():
    denoise = gaussian_denoiser(Flow())
    for estimate in (
        lambda x, fresh: variational_bound(denoise, x, Flow(), fresh, low_discrepancy(7)).total,
        lambda x, fresh: ode_nll(denoise, x, Flow(), fresh, steps=5),
    ):
        whole, alone = estimate(data(), noise), estimate(data()[3:4], lambda i: noise(i)[3:4])
        torch.testing.assert_close(whole[3:4], alone)


def test_windows():
    assert window(Flow()) == (5, -5)
    assert window(VDM((-12.0, 6.0))) == (6, -3)
    chain = make_process("vp-linear")
    assert window(chain)[0] == pytest.approx(chain.lam(1 / 1000))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f, x: variational_bound(f, x, Flow(), noise, []), "0 quantiles"),
        (lambda f, x: variational_bound(f, x, Flow(), noise, [1.0]), r"in \[0, 1\)"),
        (lambda f, x: variational_bound(f, x, Flow(), noise, [0.5], steps=0), "0 steps"),
        (lambda f, x: variational_bound(f, x, Flow(), noise, [0.5], even_in="lamda"), "did you mean 'lambda'"),
        (lambda f, x: variational_bound(f, x, Flow(), noise, [0.5], ends=(-5, 5)), "that fall"),
        (lambda f, x: variational_bound(f, x, VDM(), noise, [0.5], ends=(5, -7)), "no further than -5"),
        (lambda f, x: ode_nll(f, x, Flow(), noise, steps=0), "0 steps"),
        (lambda f, x: ode_nll(f, x, Flow(), noise, probes=0), "0 probes"),
    ],
)
def test_errors_name_the_way_out(call, message):
    with pytest.raises(InputError, match=message):
        call(gaussian_denoiser(Flow()), data())


# Of a pipeline's volumes

SHAPE = (12, 14, 12)


class PaddedUNet(LatentUNet):
    """Asks for two planes more on each axis and answers 0, which is the exact v of N(0, 1) latents; keeps its inputs."""

    def __init__(self):
        super().__init__(3, 3)
        self.weight, self.asked = torch.nn.Parameter(torch.zeros(())), []

    def padded_shape(self, shape):
        return tuple(n + 2 for n in shape)

    def forward(self, x, timesteps, context=None):
        self.asked.append((x.detach(), timesteps))
        return self.weight * x


def pipeline(process, unet=None, log_variance=-4.0):
    """Networks as they start: the U-Net answers 0, and so is the exact denoiser of N(0, 1) for the target v."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(3, 2, [8], blocks=1).requires_grad_(False)
    autoencoder.to_moments.bias[3:] = log_variance
    autoencoder.latent_mean += 0.3
    autoencoder.latent_std *= 0.5
    autoencoder.fit_linear_path(volumes(4))
    unet = unet or UNet(3, 3, [0], [8, 8], 1, [False, False], context_dim=4)
    schema = CovariateSchema((Covariate("age", "continuous"),))
    return Pipeline(autoencoder.eval(), unet.eval(), schema, Grid.centred(SHAPE, (6.0,) * 3), process, "v")


def volumes(n):
    smooth = torch.nn.functional.avg_pool3d(torch.rand(n, 1, *SHAPE, generator=torch.Generator().manual_seed(5)), 3, 1, 1)
    return smooth.clamp(0, 1)


def load(i):
    return volumes(4)[i].numpy()


def posterior(pipe, i=0):
    """(mean, std) of the normalised latent of volume i."""
    mean, log_variance = pipe.autoencoder.encode(volumes(4)[i : i + 1]).chunk(2, dim=1)
    return pipe.autoencoder.normalise(mean).double(), (log_variance / 2).exp().double() / 0.5


@pytest.mark.parametrize("kind", ["flow", "vp-cosine", "vdm"])
def test_nats_of_a_volume_are_those_of_its_latent(kind):
    """The model of N(0, 1) latents: -log p(x') of the very latent that was drawn, from both methods."""
    pipe = pipeline(make_process(kind))
    row = score(pipe, [{"age": 40}], load, times=200, ode_steps=20).iloc[0]
    mean, std = posterior(pipe)
    fresh = {name: torch.randn(mean.shape, generator=generator("likelihood", 0, 0, name)) for name in ("posterior", 0)}
    x = mean + std * fresh["posterior"]
    delta = math.exp(-window(pipe.process)[0])
    nll = -torch.distributions.Normal(0.0, math.sqrt(1 + delta**2)).log_prob(x + delta * fresh[0]).mean().item()
    assert row["ode"] == pytest.approx(nll, abs=0.012)  # 20 steps of Heun
    assert row["bound"] == pytest.approx(nll, abs=0.06)
    assert row["bound"] == pytest.approx(row["prior"] + row["reconstruction"] + row["diffusion"])


def test_bits_per_voxel_by_hand():
    """Image, latent and entropy put together as a code would be; and nats per latent dimension are another thing."""
    pipe = pipeline(Flow())
    row = score(pipe, [{}], load, method="bound", times=16, levels=64).iloc[0]
    voxels, dimensions = math.prod(SHAPE), 3 * math.prod(SHAPE) // 8
    _, std = posterior(pipe)
    entropy = torch.distributions.Normal(0.0, (std**2 + math.exp(-10)).sqrt()).entropy().sum().item()
    assert row["entropy_bits"] == pytest.approx(entropy / math.log(2) / voxels, rel=1e-5)
    assert row["latent_bits"] == pytest.approx(row["bound"] * dimensions / math.log(2) / voxels)
    assert row["bits_per_voxel"] == pytest.approx(row["image_bits"] + row["latent_bits"] - row["entropy_bits"])
    assert 0 < row["bits_per_voxel"] < 8
    assert abs(row["bits_per_voxel"] - row["bound"] / math.log(2)) > 0.1


def test_bits_do_not_follow_the_units_of_the_latent():
    """Latents in other units have another density and another entropy; what the volume costs stays."""
    pipe = pipeline(Flow())
    one = score(pipe, [{}], load, method="bound", times=16).iloc[0]
    pipe.autoencoder.latent_std *= 2
    pipe.autoencoder.latent_mean.zero_()
    other = score(pipe, [{}], load, method="bound", times=16).iloc[0]
    assert abs(other["entropy_bits"] - one["entropy_bits"]) > 0.1
    assert other["image_bits"] == pytest.approx(one["image_bits"], rel=0.05)


def test_padding_costs_nothing():
    """A network that wants more planes sees noised zeros around z, the same noise at all times, and the score stays."""
    unet = PaddedUNet()
    padded = score(pipeline(Flow(), unet), [{}], load, times=8, ode_steps=2)
    plain = score(pipeline(Flow()), [{}], load, times=8, ode_steps=2)
    torch.testing.assert_close(torch.tensor(padded.to_numpy()), torch.tensor(plain.to_numpy()), rtol=1e-5, atol=1e-5)
    frames = []
    for whole, timesteps in unet.asked:
        assert whole.shape[2:] == (8, 9, 8)
        frames.append(whole[..., 0, :, :] / (timesteps / 1000))  # sigma of the flow is t
    assert all(torch.allclose(frame, frames[0], atol=1e-4) for frame in frames)
    assert 0.8 < frames[0].std() < 1.2


def test_network_is_told_its_own_time():
    unet = PaddedUNet()
    process = VDM((-13.3, -10.0, 10.0))
    score(pipeline(process, unet), [{}], load, method="bound", times=4)
    told = torch.cat([timesteps for _, timesteps in unet.asked]) / 1000
    gamma = torch.tensor([-2 * process.lam((i + u) / 4) for i in range(4) for u in [offset(0)]])
    torch.testing.assert_close(told, (gamma + 13.3) / 23.3, atol=1e-5, rtol=1e-5)


def offset(i):
    return torch.rand((), generator=generator("likelihood", 0, i, "offset")).item()


def test_subjects_are_scored_alike_alone():
    pipe = pipeline(Flow())
    both = score(pipe, [{"age": 30}, {"age": 60}], load, times=4, ode_steps=2)
    assert len(both) == 2 and both["bound"][0] != both["bound"][1]
    alone = score(pipe, [{"age": 30}], load, times=4, ode_steps=2)
    assert alone.iloc[0].to_dict() == pytest.approx(both.iloc[0].to_dict())


@pytest.mark.parametrize("scale", [0.05, 0.4, 3.0, 200.0])
@pytest.mark.parametrize("decoded", [0.0, 3.2, 14.5, 31.0, 33.0])
def test_probabilities_of_all_levels_sum_to_1(scale, decoded):
    level, decoded = torch.arange(32, dtype=torch.float64), torch.full((32,), decoded, dtype=torch.float64)
    log_probability = laplace_log_probability(level, decoded, torch.tensor(scale, dtype=torch.float64), 31)
    assert log_probability.isfinite().all()
    assert log_probability.exp().sum().item() == pytest.approx(1, abs=1e-12)
    inside = (
        scipy.stats.laplace(decoded[0], scale).cdf(k + 0.5) - scipy.stats.laplace(decoded[0], scale).cdf(k - 0.5)
        for k in (4, 14)
    )
    assert log_probability[[4, 14]].exp().tolist() == pytest.approx(list(inside), abs=1e-12)


def test_image_bits_of_known_errors():
    """Errors that are Laplace distributed cost their entropy, log2(2 e scale) bits; a perfect decoder next to nothing."""
    scale, n = 4.0, 40
    errors = torch.distributions.Laplace(0.0, scale)
    torch.manual_seed(0)
    decoded = torch.full((n, n, n), 0.5)
    volume = decoded + errors.sample((n, n, n)) / 255
    bits = laplace_nats(volume, decoded, 256) / math.log(2) / n**3
    assert bits == pytest.approx(math.log2(2 * math.e * scale), abs=0.02)
    exact = (volume * 255).round() / 255
    assert laplace_nats(exact, exact, 256) / math.log(2) / n**3 < 0.002


@pytest.mark.parametrize(
    "options, message",
    [({"method": "odd"}, "did you mean 'ode'"), ({"levels": 1}, "1 grey levels"), ({"subjects": []}, "0 volumes")],
)
def test_errors_of_scores(options, message):
    with pytest.raises(InputError, match=message):
        score(pipeline(Flow()), **{"subjects": [{}], "load": load, **options})
