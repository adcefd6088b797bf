"""Processes: against closed forms, against the DDPM's discrete chain, and there and back."""

import json
import math
import pickle
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler

from ldm3d.diffusion.process import SPACINGS, TARGETS, times_from_quantiles
from ldm3d.diffusion.schedules import PROCESSES, Cosine, Flow, LinearBetas, ScaledLinearBetas, make_process
from ldm3d.errors import InputError

T = torch.linspace(0, 1, 101, dtype=torch.float64)
INSIDE = T[1:-1]


@pytest.fixture(params=PROCESSES)
def process(request):
    return make_process(request.param)


def latents(n: int, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    return (torch.randn(n, 2, 3, 2, 1, dtype=dtype, generator=random) for _ in range(2))


# Schedules


def test_ends_are_data_and_noise(process):
    assert (process.alpha(0.0), process.sigma(0.0), process.lam(0.0)) == (1, 0, math.inf)
    assert process.alpha(1.0) < 0.02
    assert process.sigma(1.0) > 0.999
    assert Flow().lam(1.0) == -math.inf
    assert Cosine().lam(1.0) == pytest.approx(math.log(1e-4), abs=1e-3)


def test_noise_only_grows(process):
    assert (process.alpha(T).diff() < 0).all()
    assert (process.sigma(T).diff() > 0).all()
    assert (process.lam(INSIDE).diff() < 0).all()


def test_variance_is_preserved_by_all_but_the_flow(process):
    total = process.alpha(T) ** 2 + process.sigma(T) ** 2
    if process.kind == "flow":
        assert torch.equal(process.alpha(T) + process.sigma(T), torch.ones_like(T))
    else:
        torch.testing.assert_close(total, torch.ones_like(T))


def test_lambda_and_its_inverse(process):
    torch.testing.assert_close(process.lam(INSIDE), (process.alpha(INSIDE) / process.sigma(INSIDE)).log())
    torch.testing.assert_close(process.t_of_lam(process.lam(INSIDE)), INSIDE)
    assert process.t_of_lam(process.lam(0.0123)) == pytest.approx(0.0123, abs=1e-12)
    assert process.t_of_lam(math.inf) == 0
    assert process.t_of_lam(-math.inf) == pytest.approx(1, abs=1e-4)  # the cosine is flat after t = 0.9999


def test_type_of_t_is_the_type_of_the_answer_and_costs_no_digits(process):
    t = torch.tensor([0.0005, 0.5, 0.999], dtype=torch.float32)
    for function in (process.alpha, process.sigma, process.lam):
        exact = [function(value) for value in t.tolist()]
        assert all(isinstance(value, float) for value in exact)
        assert function(t).dtype == torch.float32
        assert function(t).tolist() == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("ours, theirs", [(LinearBetas, "linear"), (ScaledLinearBetas, "scaled_linear")])
def test_chain_is_the_one_of_diffusers(ours, theirs):
    """Both ways round: diffusers' step k is our t_of_step(k). diffusers rounds its chain to float32."""
    betas = {"beta_start": 0.0012, "beta_end": 0.018}
    for process, chain in (
        (ours(), DDPMScheduler(beta_schedule=theirs, beta_start=ours.beta_start, beta_end=ours.beta_end)),
        (ours(**betas), DDPMScheduler(beta_schedule=theirs, **betas)),
        (ours(train_steps=50, **betas), DDPMScheduler(50, beta_schedule=theirs, **betas)),
    ):
        t = torch.tensor([process.t_of_step(k) for k in range(process.train_steps)], dtype=torch.float64)
        torch.testing.assert_close(process.alpha(t) ** 2, chain.alphas_cumprod.double(), rtol=2e-5, atol=0)


def test_cosine_is_the_discrete_one_until_its_clipped_last_step():
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    chain = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    torch.testing.assert_close(Cosine().alpha(t)[:-1] ** 2, chain[:-1], rtol=1e-4, atol=1e-9)


def test_rates_are_the_derivatives(process):
    h = 1e-6
    t = INSIDE + 0.0003  # between the knots of the chains
    alpha, sigma = process._rates(t)
    torch.testing.assert_close(alpha, (process.alpha(t + h) - process.alpha(t - h)) / (2 * h), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sigma, (process.sigma(t + h) - process.sigma(t - h)) / (2 * h), rtol=1e-6, atol=1e-6)


# Targets and weights


@pytest.mark.parametrize("target", TARGETS)
def test_target_and_back(process, target):
    x, e = latents(len(INSIDE))
    z = process.add_noise(x, e, INSIDE)
    torch.testing.assert_close(process.to_data(target, process.target(target, x, e, INSIDE), z, INSIDE), x)
    for i in (0, 50):  # a float for the batch is the same as one time per sample
        t = INSIDE[i].item()
        torch.testing.assert_close(process.add_noise(x, e, t)[i], z[i])
        torch.testing.assert_close(process.target(target, x, e, t)[i], process.target(target, x, e, INSIDE)[i])


def test_targets_by_hand():
    x, e = latents(3)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(Flow().target("velocity", x, e, t), e - x)
    torch.testing.assert_close(Flow().target("v", x, e, t)[1], 0.75 * e[1] - 0.25 * x[1])
    vp = LinearBetas()
    torch.testing.assert_close(vp.target("v", x, e, t)[1], vp.alpha(0.25) * e[1] - vp.sigma(0.25) * x[1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_finite_and_known_where_they_can_be(process, target, dtype):
    x, e = latents(2, dtype)
    t = torch.tensor([0.0, 1.0], dtype=dtype)
    output = process.target(target, x, e, t)
    back = process.to_data(target, output, process.add_noise(x, e, t), t)
    assert output.isfinite().all() and back.isfinite().all()
    assert output.dtype == back.dtype == dtype
    torch.testing.assert_close(back[0], x[0], atol=1e-5, rtol=1e-5)
    if target == "noise" and process.alpha(1.0) < 1e-3:
        assert not back[1].any()  # pure noise and its prediction say nothing about x
    elif dtype == torch.float64:
        torch.testing.assert_close(back[1], x[1])


def test_min_snr_known_values():
    t = LinearBetas().t_of_lam(torch.tensor([math.log(10), math.log(2)], dtype=torch.float64) / 2)  # SNR 10 and 2
    weight = {target: LinearBetas().loss_weight("min-snr", target, t).tolist() for target in ("data", "noise", "v")}
    assert weight["data"] == pytest.approx([5, 2])
    assert weight["noise"] == pytest.approx([0.5, 1])
    assert weight["v"] == pytest.approx([5 / 11, 2 / 3])
    flow = Flow().loss_weight("min-snr", "velocity", torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64))
    assert flow.tolist() == pytest.approx([0, 0.05, 0.25, 0])  # min((1 - t)^2, 5 t^2)
    assert Flow().loss_weight("none", "v", 0.3) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_min_snr_makes_every_target_the_same_loss(process, target):
    """The weighted error in any target is min(SNR, 5) times the error in x that it stands for."""
    x, wrong = latents(len(INSIDE))
    z = process.add_noise(x, wrong, INSIDE)
    outputs = torch.ones_like(x), torch.zeros_like(x)
    in_output = process.loss_weight("min-snr", target, INSIDE)
    in_x = (process.to_data(target, outputs[0], z, INSIDE) - process.to_data(target, outputs[1], z, INSIDE)) ** 2
    torch.testing.assert_close(in_output, in_x[:, 0, 0, 0, 0] * (2 * process.lam(INSIDE)).exp().clamp(max=5))


def test_min_snr_is_finite_at_the_ends(process):
    for target in TARGETS:
        assert process.loss_weight("min-snr", target, T).isfinite().all()


# Times


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_times_go_from_noise_to_data(process, spacing, steps):
    times = process.times(steps, spacing)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1, 0)
    assert all(s < t for t, s in pairwise(times))


def test_spacings_are_even_in_what_they_say(process):
    def gaps(values):
        return torch.tensor(values[1:-1], dtype=torch.float64).diff()

    for even in (
        gaps(process.times(20)),
        gaps([t**0.5 for t in process.times(20, "quadratic")]),
        gaps([process.lam(t) for t in process.times(20, "lambda")]),
        gaps([math.exp(-process.lam(t) / 7) for t in process.times(20, "karras")]),
    ):
        torch.testing.assert_close(even, even[:1].expand_as(even), rtol=1e-6, atol=1e-9)
    assert process.lam(process.times(20, "lambda")[-2]) == pytest.approx(process.lam_range[1])


def test_times_of_a_chain_stay_on_what_was_trained():
    assert ScaledLinearBetas().times(10, "lambda")[-2] == pytest.approx(1 / 1000)


def test_times_from_quantiles():
    u = torch.tensor([0.5, 0.8413447, 0.0, 1.0])
    assert torch.equal(times_from_quantiles("uniform", u), u)
    t = times_from_quantiles("logit-normal", u, location=0.5, scale=2)
    assert t[:2].tolist() == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-2.5))])
    assert t[2:].tolist() == [0, 1]  # a generator can return 0
    assert t.dtype == u.dtype


# From and to a configuration


def test_process_survives_json_and_pickle(process):
    assert make_process(**json.loads(json.dumps(process.to_dict()))) == process
    process.alpha(0.5)  # fills the table, which must not get into the way
    assert pickle.loads(pickle.dumps(process)) == process
    assert set(process.to_dict()) <= {"kind", "offset", "beta_start", "beta_end", "train_steps", "gamma"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make_process("vp-cosin"), "did you mean 'vp-cosine'"),
        (lambda: make_process("vp-linear", beta_stop=1), "did you mean 'beta_start'"),
        (lambda: make_process("flow", offset=1), "known: none"),
        (lambda: make_process("vp-linear", beta_end=2.0), "beta_end 2.0"),
        (lambda: make_process("vp-cosine", offset=-1), "offset -1"),
        (lambda: Flow().target("epsilon", *latents(1), 0.5), "unknown target 'epsilon'; known: noise, v"),
        (lambda: Flow().times(10, "karas"), "did you mean 'karras'"),
        (lambda: Flow().times(0), "0 steps"),
        (lambda: Flow().loss_weight("snr", "v", 0.5), "did you mean 'min-snr'"),
        (lambda: times_from_quantiles("lognormal", torch.rand(1)), "did you mean 'logit-normal'"),
        (lambda: LinearBetas().alpha(torch.tensor([999])), "t_of_step"),
    ],
)
def test_errors_name_the_way_out(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("kind", ["vp-linear", "vp-scaled-linear", "vdm"])
def test_tables_are_copied_once_to_a_device(kind):
    """Such a copy makes the host wait for the GPU, three times a training step. "meta" is a device without values."""
    process = make_process(kind)
    t = torch.full((3,), 0.5, dtype=torch.float32)
    first = process._table._values_like(t)
    assert process._table._values_like(t.clone()) is first and first.dtype == torch.float32
    double = process._table._values_like(t.double())
    assert process._table._values_like(t.double()) is double and double.dtype == torch.float64
    assert process._table._values_like(t.to("meta")) is process._table._values_like(t.to("meta"))
    assert process == make_process(kind), "a copy is no part of what a process is"
