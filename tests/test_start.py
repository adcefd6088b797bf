"""Sampling that starts with a Gaussian of the training latents: against dense linear algebra, through files and training."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from torture.generation import make_pipeline

from ldm3d.diffusion.denoiser import in_turn
from ldm3d.diffusion.gaussian import ConditionalGaussian, Gaussian
from ldm3d.diffusion.gaussian_fit import fit_conditional, fit_incomplete
from ldm3d.diffusion.objective import Denoising
from ldm3d.diffusion.process import quantile_of_time, time_of_ratio, times_from_quantiles
from ldm3d.diffusion.samplers import sample
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError
from ldm3d.models.unet import cut_to
from ldm3d.pipeline import Pipeline
from ldm3d.preemption import Stop
from ldm3d.start import GaussianStart, features

SHAPE = (2, 3, 2, 2)  # D = 24
PROCESS = make_process("flow")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def truth():
    """Two features with a correlation of 0.6, and what they change."""
    directions = torch.linalg.qr(random(24, 3))[0].T.reshape(3, *SHAPE)
    rest, variances = torch.tensor([0.3, 0.05], dtype=torch.float64), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    residual = Gaussian(random(*SHAPE, seed=1), directions, variances, rest)
    return ConditionalGaussian(residual, random(2, *SHAPE, seed=2), torch.tensor([0.5, -1.0]).double(), covariance)


def dense(gaussian):
    u = gaussian.directions.flatten(1)
    return u.T @ torch.diag(gaussian.variances) @ u + torch.diag(gaussian.rest.repeat_interleave(12))


def drawn(truth, count, seed=10):
    f = truth.centre + random(count, 2, seed=seed) @ torch.linalg.cholesky(truth.covariance).T
    x = truth.residual.sample(random(count, *SHAPE, seed=seed + 1), random(count, 3, seed=seed + 2))
    return x + torch.einsum("np,pcxyz->ncxyz", f, truth.slopes), f


@pytest.mark.parametrize("pattern", [(True, True), (True, False), (False, False)])
def test_missing_features_are_integrated_out(truth, pattern):
    """The mean and covariance of x given what is known, from the joint covariance of x and f."""
    known, f = torch.tensor(pattern), torch.tensor([[1.7, 0.3]], dtype=torch.float64)
    b = truth.slopes.flatten(1)  # (2, 24)
    of_x = dense(truth.residual) + b.T @ truth.covariance @ b
    mean = truth.residual.mean.flatten() + truth.centre @ b
    across = (truth.covariance @ b)[known]  # (known, 24)
    weights = torch.linalg.solve(truth.covariance[known][:, known], across) if known.any() else across
    expected = mean + (f[0, known] - truth.centre[known]) @ weights
    given = truth.given(f, known)
    torch.testing.assert_close(given.mean.flatten(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense(given), of_x - across.T @ weights, rtol=1e-9, atol=1e-9)


def test_rows_of_different_patterns_do_not_mix(truth):
    """A row alone has the same bits as beside rows of which other features are known."""
    f, z = random(3, 2, seed=5), random(3, *SHAPE, seed=6)
    known = torch.tensor([[1, 1], [0, 1], [1, 1]]).bool()
    mixed = truth.denoiser(f, known, PROCESS)(z, 0.7)
    for row in range(3):
        alike = truth.denoiser(f, known[row].expand(3, 2), PROCESS)(z, 0.7)
        assert torch.equal(mixed[row], alike[row])
    assert not torch.equal(mixed[1], truth.denoiser(f, known[0].expand(3, 2), PROCESS)(z, 0.7)[1])


def test_samples_follow_the_features(truth):
    f = torch.tensor([[2.0, -1.0], [-2.0, 1.0]], dtype=torch.float64).repeat_interleave(4000, dim=0)
    denoise = truth.denoiser(f, torch.ones_like(f).bool(), PROCESS)
    x = sample("heun", denoise, random(8000, *SHAPE, seed=7), PROCESS, 40).reshape(2, 4000, *SHAPE)
    expected = truth.residual.mean + torch.einsum("np,pcxyz->ncxyz", f[::4000], truth.slopes)
    torch.testing.assert_close(x.mean(dim=1), expected, rtol=0, atol=0.15)


def test_the_fit_finds_slopes_and_covariances_with_values_missing(truth):
    x, f = drawn(truth, 4000)
    known = torch.rand(4000, 2, generator=torch.Generator().manual_seed(3)) > 0.3
    fitted = fit_conditional(x, torch.where(known, f, torch.nan).nan_to_num(99.0), known, 3)
    torch.testing.assert_close(fitted.covariance.double(), truth.covariance, rtol=0, atol=0.06)
    torch.testing.assert_close(fitted.slopes.double(), truth.slopes, rtol=0, atol=0.15)
    at = torch.tensor([1.0, 0.0], dtype=torch.float64)[None]
    means = [g.given(at, torch.ones(2).bool()).mean.double() for g in (fitted, truth)]
    torch.testing.assert_close(*means, rtol=0, atol=0.2)


def test_expectation_maximisation_undoes_what_is_missing_by_the_other_value():
    """The second value is missing where the first is high: its own mean is too low by far, the estimate is not."""
    true = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    values = random(5000, 2, seed=8) @ torch.linalg.cholesky(true).T
    known = torch.stack([torch.ones(5000).bool(), values[:, 0] < 0.3], dim=1)
    centre, covariance = fit_incomplete(torch.where(known, values, 99.0), known)
    assert values[known[:, 1], 1].mean() < -0.35
    torch.testing.assert_close(centre, values.mean(dim=0), rtol=0, atol=0.03)
    torch.testing.assert_close(covariance, torch.cov(values.T), rtol=0, atol=0.04)


def test_categories_become_indicators_and_what_is_open_is_unknown():
    context = torch.tensor([[[0.7, 1], [2, 1], [0, 1]], [[0, 0], [0, 0], [1, 1]]])
    found, known = features(context, [0, 3, 2])
    assert found[0].tolist() == pytest.approx([0.7, 0, 1, 0]) and found[1, 3] == 1
    assert known.tolist() == [[True] * 4, [False, False, False, True]]
    assert features(torch.zeros(2, 0, 2), [])[0].shape == (2, 0)


def test_a_start_is_the_same_from_its_folder(tmp_path):
    context = torch.stack([random(60, 1, seed=1).float(), torch.ones(60, 1)], dim=2)
    start = GaussianStart.fit(random(60, *SHAPE, seed=2).float(), context, [0], components=5, until=1.5)
    start.save_pretrained(tmp_path)
    again, z = GaussianStart.from_pretrained(tmp_path), random(60, *SHAPE, seed=3).float()
    assert torch.equal(again.denoiser(context, PROCESS)(z, 0.8), start.denoiser(context, PROCESS)(z, 0.8))
    assert again.until == 1.5


def test_times_of_rows_are_times_of_their_own(truth):
    f, z, times = random(3, 2, seed=5), random(3, *SHAPE, seed=6), torch.tensor([0.1, 0.5, 0.9]).double()
    known = torch.tensor([[1, 1], [0, 1], [0, 0]]).bool()
    denoise = truth.denoiser(f, known, PROCESS)
    for row, t in enumerate(times):
        torch.testing.assert_close(denoise(z, times)[row], denoise(z, t.item())[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_what_an_estimate_leaves_has_its_deviation(truth, t):
    """Of 20,000 samples, by channel; the components of the fixture are orthogonal, but not within a channel."""
    x, f = drawn(truth, 20_000)
    z = PROCESS.add_noise(x, random(*x.shape, seed=20), t)
    error = truth.denoiser(f, torch.ones_like(f).bool(), PROCESS)(z, t) - x
    found = error.square().mean(dim=(0, 2, 3, 4)).sqrt()
    torch.testing.assert_close(truth.left(t, PROCESS)[0], found, rtol=0.1, atol=0)


def test_each_denoises_on_its_side_of_the_ratio():
    denoise = in_turn(lambda z, t: z + 1, lambda z, t: z - 1, 2.0, PROCESS)
    t = time_of_ratio(PROCESS, 2.0)
    assert t == pytest.approx(2 / 3)
    assert denoise(0, t + 1e-6) == 1 and denoise(0, t - 1e-6) == -1 and denoise(0, 1.0) == 1


@pytest.mark.parametrize("kind", ["uniform", "logit-normal"])
def test_training_times_stay_below_and_keep_their_distribution(kind):
    until, u = 0.6, torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    share = quantile_of_time(kind, until, 0.3, 1.2)
    all_times = times_from_quantiles(kind, u, 0.3, 1.2)
    assert share == pytest.approx((all_times < until).double().mean().item(), abs=0.002)
    seen = []
    objective = Denoising(PROCESS, "v", "none", kind, 0.3, 1.2, until=until)
    objective.losses(lambda z, t: seen.append(t) or z, torch.zeros(1000, 1, 1, 1, 1), torch.zeros(1000, 1, 1, 1, 1), u)
    below = all_times[all_times < until]
    assert seen[0].max() < until
    assert seen[0].quantile(0.5).item() == pytest.approx(below.quantile(0.5).item(), abs=0.01)


@pytest.fixture
def pipeline():
    made = make_pipeline()
    latents, context = latents_for(made)
    made.start = GaussianStart.fit(latents, context, made.schema.num_categories, components=4, until=1.0)
    return made


def latents_for(pipeline):
    """30 latents that the first covariate moves, and their contexts."""
    shape = pipeline.autoencoder.latent_shape(pipeline.grid.shape)
    padded = shape[0], *pipeline.unet.padded_shape(shape[1:])
    latents, context = random(30, *padded, seed=4).float(), torch.ones(30, len(pipeline.schema), 2)
    context[:, 0, 0] = torch.linspace(-1, 1, 30)
    return latents + 3 * context[:, 0, 0, None, None, None, None], context


def test_the_start_denoises_above_and_the_network_below(pipeline):
    requests = pipeline.parse([{}, {}])
    z = torch.randn(2, *pipeline.start.shape)
    denoise, t = pipeline.denoiser(requests, guidance=2.0), time_of_ratio(pipeline.process, 1.0)
    own = pipeline.start.denoiser(pipeline.schema.encode(requests), pipeline.process)
    assert torch.equal(denoise(z, t + 0.01), own(z, t + 0.01))
    pipeline.start, below = None, denoise(z, t - 0.01)
    assert torch.equal(pipeline.denoiser(requests, guidance=2.0)(z, t - 0.01), below)


def test_a_spread_draws_away_from_the_mean_under_the_covariates(pipeline, tmp_path):
    name = pipeline.schema.names[0]
    requests = pipeline.parse([{name: 20}, {name: 70}, {}])
    once, twice = (pipeline.latents(requests, pipeline.sampling.replace(steps=3, spread=s), range(3)) for s in (1.0, 1.5))
    mean = cut_to(pipeline.start.expected(pipeline.schema.encode(requests)), once.shape[2:])
    torch.testing.assert_close(twice - mean, 1.5 * (once - mean))
    assert (mean[0] - mean[1]).abs().min() > 0.1  # so that the mean of all would not do

    pipeline.sampling = pipeline.sampling.replace(steps=2, spread=1.1)
    pipeline.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", "cpu", torch.float32)
    assert again.sampling.spread == 1.1 and "spread" not in again.sampling.replace(spread=1.0).to_dict()
    pipeline.start = None
    with pytest.raises(InputError, match="only a model with a Gaussian"):
        pipeline()
    with pytest.raises(InputError, match="spread 0 must be above 0"):
        pipeline(spread=0)


def test_a_pipeline_keeps_its_start_and_what_it_draws(pipeline, tmp_path):
    sampling = pipeline.sampling.replace(steps=3)
    requests = pipeline.parse([{}] * 3)
    pipeline.denoising = {"0.2": (0.02, 0.05)}
    pipeline.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", "cpu", torch.float32)
    assert again.denoising == {"0.2": (0.02, 0.05)}
    assert "Gaussian starts, until sigma / alpha is 1" in repr(again)
    drawn = list(pipeline.volumes(requests, sampling))
    np.testing.assert_array_equal(drawn, list(again.volumes(requests, sampling)))
    alone = next(again.volumes(requests[1:2], sampling, numbers=[1]))
    np.testing.assert_array_equal(alone, drawn[1])
    assert again.to(dtype=torch.bfloat16).start.mean.dtype == torch.float32

    with_start = again.model_hash
    pipeline.start = None
    pipeline.save_pretrained(tmp_path / "model")  # over the other: nothing of it may be left
    without = Pipeline.from_pretrained(tmp_path / "model", "cpu", torch.float32)
    assert without.start is None and without.model_hash != with_start
    assert not np.array_equal(next(without.volumes(requests, sampling)), drawn[0])


def test_directions_are_rounded_before_training_and_not_again_when_saved(pipeline, tmp_path):
    start = pipeline.start
    start.save_pretrained(tmp_path / "half", torch.float16)
    again = GaussianStart.from_pretrained(tmp_path / "half")
    assert torch.equal(again.directions, start.directions) and again.directions.dtype == torch.float32
    assert torch.equal(again.slopes, start.slopes) and start.slopes.any()
    assert start.directions.flatten(1).abs().amax(dim=1).eq(448).all()
    start.directions /= 500  # as of a version that did not round them: eight bits would lose most of them
    start.save_pretrained(tmp_path / "older", torch.float16)
    older = GaussianStart.from_pretrained(tmp_path / "older")
    torch.testing.assert_close(older.directions.float(), start.directions, rtol=1e-3, atol=1e-4)
    start.directions *= 500
    latents, context = latents_for(pipeline)
    exact = fit_conditional(latents, *features(context, pipeline.schema.num_categories), 4).residual
    whole, rounded = (
        torch.einsum("kcxyz,k->cxyz", g.directions.square(), g.variances) for g in (exact, start.gaussian.residual)
    )
    torch.testing.assert_close(rounded, whole, rtol=0.1, atol=1e-3)


def test_a_network_that_has_learned_nothing_of_the_remainder_leaves_the_estimate_near(pipeline, tmp_path):
    """Its output is 0 at first, and then x = g + s a (z - alpha g) / r."""
    channels = pipeline.autoencoder.latent_channels
    context = pipeline.schema.encode(pipeline.parse([{}, {}]))
    start = GaussianStart(**{**pipeline.start.arguments, "residual": True})
    start.load_state_dict(pipeline.start.state_dict())
    pipeline.start, pipeline.scales, pipeline.target = start, (1.0,) * channels, "v"
    arguments = {**pipeline.unet.arguments, "in_channels": 2 * channels}
    pipeline.unet = type(pipeline.unet)(**arguments)
    z, t = torch.randn(2, *start.shape), time_of_ratio(pipeline.process, 0.5)
    g, s = start.denoiser(context, pipeline.process)(z, t), start.left(t, pipeline.process)[..., None, None, None].float()
    alpha, sigma = 2 / 3, 1 / 3
    expected = g + alpha * s**2 * (z - alpha * g) / (alpha**2 * s**2 + sigma**2)
    torch.testing.assert_close(pipeline.denoiser(pipeline.parse([{}, {}]))(z, t), expected, rtol=1e-4, atol=1e-4)

    pipeline.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", "cpu", torch.float32)
    assert torch.equal(again.denoiser(again.parse([{}, {}]))(z, t), pipeline.denoiser(pipeline.parse([{}, {}]))(z, t))
    description = json.loads((tmp_path / "model/start/config.json").read_text())
    description["arguments"]["residual"] = False
    (tmp_path / "model/start/config.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=f"U-Net takes {2 * channels} and gives {channels} instead of {channels}"):
        Pipeline.from_pretrained(tmp_path / "model")


def test_a_start_that_is_missing_or_of_other_latents_is_refused(pipeline, tmp_path):
    """The network alone would draw noise: it was not trained above the ratio."""
    pipeline.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model/start")
    with pytest.raises(InputError, match="start holds no GaussianStart"):
        Pipeline.from_pretrained(tmp_path / "model")
    channels, *sides = pipeline.start.shape
    other = GaussianStart((channels, *(n + 1 for n in sides)), pipeline.schema.num_categories, 4, 1.0)
    other.save_pretrained(tmp_path / "model/start")
    with pytest.raises(InputError, match="start is of latents"):
        Pipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("residual", [False, True])
def test_training_with_a_start_goes_on_after_a_stop_as_if_there_was_none(residual, experiment, tmp_path, train_here):
    config = yaml.safe_load((experiment / "config.yaml").read_text())
    config["diffusion"]["start"] = {"components": 5, "until": 2.0, "residual": residual}
    models = []
    for name, stops in (("whole", [Stop()]), ("parts", [Stop("SIGTERM"), Stop()])):
        shutil.copytree(experiment / "run", tmp_path / name, ignore=shutil.ignore_patterns("diffusion-training", "model"))
        config["output"] = str(tmp_path / name)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        for stop in stops:
            with contextlib.suppress(SystemExit):
                train_here("diffusion", tmp_path / "config.yaml", stop=stop)
        models.append(Pipeline.from_pretrained(tmp_path / name / "model", "cpu", torch.float32))
    assert models[0].start.until == 2.0 and models[0].start.directions.shape[0] == 5
    assert models[0].model_hash == models[1].model_hash


def test_a_learned_schedule_and_a_start_do_not_go_together(experiment, fails):
    settings = [f"diffusion.{key}" for key in ("process.kind=vdm", "time_sampling.kind=uniform", "start.until=1")]
    message = fails("encode", experiment / "config.yaml", *(part for s in settings for part in ("--set", s)))
    assert "start: leave it out" in message
