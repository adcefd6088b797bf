"""Counterfactuals: nothing changed is nothing changed, a Gaussian's answer is exact, and what is asked is read right."""

import pytest
import torch
from test_placed import AFFINES, scan, tiny_pipeline
from test_samplers import exact_ode, gaussian_denoiser, noise

from ldm3d.applications.changes import parse_pairs, targets_of
from ldm3d.applications.edit import edit
from ldm3d.diffusion.inversion import invert_steps
from ldm3d.diffusion.samplers import follow
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError
from ldm3d.models.unet import pad_to
from ldm3d.start import GaussianStart


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def started():
    """A pipeline whose sampling starts with a Gaussian of latents that rise by 0.5 a standard deviation of age everywhere."""
    pipe = tiny_pipeline()
    generator = torch.Generator().manual_seed(2)
    context = torch.stack([torch.randn(60, generator=generator), torch.ones(60)], dim=-1)  # (60, 2), age
    sex = torch.stack([(torch.rand(60, generator=generator) > 0.5).float(), torch.ones(60)], dim=-1)
    latents = 0.5 * context[:, 0, None, None, None, None] + 0.1 * torch.randn(60, 4, 6, 6, 6, generator=generator)
    shape = pipe.unet.padded_shape((5, 6, 5))
    latents = latents[..., : shape[0], : shape[1], : shape[2]]
    pipe.start = GaussianStart.fit(latents, torch.stack([context, sex], dim=1), [0, 2], 3, until=1.0)
    return pipe


@pytest.fixture(scope="module")
def placed(pipe):
    return pipe.encode(scan(AFFINES["along the axes"]))


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_steps_are_inverted_and_not_the_ode(name):
    """20 steps lead back to 1e-3, where the ODE's inversion in as many is off by fifty times as much."""
    flow = make_process("flow")
    denoise, x = gaussian_denoiser(flow), exact_ode(noise(0), 1.0, 0.0, flow)
    times = flow.times(20)
    z = invert_steps(denoise, x, flow, times, name=name)
    assert (follow(name, denoise, z, times, flow) - x).abs().max() < 1e-3 * x.std()
    partly = times[10:]
    z = invert_steps(denoise, x, flow, partly, name=name)
    assert (follow(name, denoise, z, partly, flow) - x).abs().max() < 1e-3 * x.std()


def test_a_sample_is_inverted_alike_in_any_batch():
    flow = make_process("flow")
    denoise, times = gaussian_denoiser(flow), flow.times(8)
    x = torch.cat([exact_ode(noise(0), 1.0, 0.0, flow), 3 * exact_ode(noise(1), 1.0, 0.0, flow)])
    together = invert_steps(denoise, x, flow, times)
    torch.testing.assert_close(together[:1], invert_steps(denoise, x[:1], flow, times), rtol=0, atol=1e-6)


def round_trip(pipe, placed, age):
    """Largest error of a latent that is inverted and sampled again, in deviations."""
    denoise, times = pipe.denoiser(pipe.parse([{"age": age}])), pipe.process.times(20)
    x = pad_to(placed.z, pipe.unet.padded_shape(placed.z.shape[2:]))
    with torch.no_grad():
        z = invert_steps(denoise, x, pipe.process, times)
        again = follow("heun", denoise, z, times, pipe.process)
    return ((again - x).square().mean().sqrt() / x.std()).item()


def test_round_trip_of_a_network(pipe, placed):
    assert round_trip(pipe, placed, 50) < 1e-3


def test_round_trip_where_a_gaussian_starts(started, placed):
    """Through the noise level at which the network takes over."""
    assert round_trip(started, placed, 50) < 1e-3


@pytest.mark.parametrize("how", [{}, {"strength": 0.4}, {"samples": 2}, {"guidance": 3.0}, {"samples": 2, "average": True}])
def test_to_what_it_is_changes_nothing(pipe, placed, how):
    done = edit(pipe, placed, {"age": 50, "sex": "F"}, age=50, steps=4, **how)
    assert (done.latents - placed.z).abs().max() < 1e-5
    returned = done.image().get_fdata()
    assert abs(returned - placed.scan[0]).max() <= 1e-3 * placed.scan.max()


def test_the_network_is_asked_under_both_covariates(pipe, placed):
    done = edit(pipe, placed, {"age": 50}, {"age": "50:70:10"}, steps=4)
    assert [row["age"] for row in done.targets] == [50, 60, 70] and done.latents.shape == (3, 1, 4, 5, 6, 5)
    moved = (done.latents - placed.z).flatten(1).norm(dim=1)
    assert moved[0] < 1e-4 < moved[1] < moved[2]
    sex = edit(pipe, placed, {"age": 50, "sex": "F"}, sex="M", steps=4)
    assert (sex.latents - placed.z).abs().max() > 1e-4


def test_samples_are_the_same_among_any_number(pipe, placed):
    two, one = (edit(pipe, placed, {"age": 50}, age="+20", method="noise", samples=n, steps=3) for n in (2, 1))
    torch.testing.assert_close(two.latents[:, :1], one.latents, rtol=0, atol=0)
    assert not torch.equal(two.latents[:, 0], two.latents[:, 1])
    change, spread = two.change()
    assert spread.shape == change.shape == (1, 1, 20, 24, 20) and one.change()[1] is None
    mean = edit(pipe, placed, {"age": 50}, age="+20", method="noise", samples=2, average=True, steps=3)
    torch.testing.assert_close(mean.latents[:, 0], two.latents.mean(dim=1))


def test_linear_is_the_regression(started, placed):
    """20 years are one deviation of age: 0.5 everywhere, by the latents above; sex tells nothing."""
    done = edit(started, placed, {"age": 40}, age="+20", method="linear")
    torch.testing.assert_close(done.latents[0] - placed.z, torch.full_like(placed.z, 0.5), rtol=0, atol=0.1)
    assert (edit(started, placed, {"age": 40, "sex": "F"}, sex="M", method="linear").latents[0] - placed.z).abs().mean() < 0.1


def test_a_gaussian_model_changes_by_its_regression(started, placed):
    """Where the Gaussian denoises to the end, sampling from the inverted noise moves the mean alone: the closed form."""
    pipe = tiny_pipeline()
    pipe.start = started.start
    pipe.start.until, until = 0.0, pipe.start.until
    try:
        sampled, linear = (edit(pipe, placed, {"age": 40}, age=60, method=m, steps=20) for m in ("ode", "linear"))
    finally:
        pipe.start.until = until
    torch.testing.assert_close(sampled.latents, linear.latents, rtol=0, atol=2e-2)


def test_changes_are_read(pipe):
    assert parse_pairs(["age=62,sex=F", "group=a, b"], "--from") == {"age": "62", "sex": "F", "group": "a, b"}
    own = {"age": 62.0, "sex": None}
    for to, ages in (
        ("72", ["72"]),
        ("+10", [72]),
        ("-10", [52]),
        ("50:60:5", [50, 55, 60]),
        ("50:59:5", [50, 55]),
        (80, [80]),
    ):
        assert [row["age"] for row in targets_of(pipe.schema, own, {"age": to})] == ages
    for to, reason in (
        ({}, "nothing is changed"),
        ({"aeg": 3}, "did you mean 'age'"),
        ({"age": "50:60:0"}, "step above 0"),
        ({"age": "60:50:5"}, "step above 0"),
        ({"age": "1:90:0.001"}, "2 to 100 points"),
    ):
        with pytest.raises(InputError, match=reason):
            targets_of(pipe.schema, own, to)
    with pytest.raises(InputError, match="relative to the scan's own age"):
        targets_of(pipe.schema, {"age": None, "sex": None}, {"age": "+10"})
    for text in ("62", "age=", "=3", "age=1,age=2"):
        with pytest.raises(InputError, match=r"--from"):
            parse_pairs([text], "--from")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"strength": 0}, "strength must be above 0"),
        ({"strength": 1.5}, "strength must be above 0"),
        ({"samples": 0}, "samples"),
        ({"samples": 2, "method": "ode"}, "draws no noise"),
        ({"method": "linear"}, "diffusion.start"),
        ({"method": "magic"}, "magic"),
        ({"age": 300}, "outside its range"),
        ({"sex": "X"}, "not one of F, M"),
    ],
)
def test_bad_requests(pipe, placed, options, reason):
    with pytest.raises(InputError, match=reason):
        edit(pipe, placed, {"age": 50}, **({"age": 60} | options))
