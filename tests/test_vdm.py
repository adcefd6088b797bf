"""The learned noise schedule: its ends, what it may not change, and that learning it lowers the bound's variance."""

import json
import math
from itertools import pairwise

import pytest
import torch
from test_samplers import AXES, MEAN, VARIANCES, gaussian_denoiser

from ldm3d.diffusion.likelihood import low_discrepancy, variational_bound
from ldm3d.diffusion.schedules import VDM, Cosine, Flow, make_process
from ldm3d.diffusion.vdm import LEARNABLE_TARGETS, VDMSchedule, vdm_losses
from ldm3d.errors import InputError
from ldm3d.models.unet import UNet

T = torch.linspace(0, 1, 201, dtype=torch.float64)


def curved(knots=9, seed=0, **ends):
    """A schedule that is no straight line."""
    schedule = VDMSchedule(knots=knots, **ends).double()
    torch.nn.init.normal_(schedule.logits, generator=torch.Generator().manual_seed(seed))
    return schedule


def batch(n, random):
    """(x, e, t) of Gaussian data, times even over the batch."""
    x = MEAN + torch.randn(n, 4, generator=random, dtype=torch.float64) @ (AXES * VARIANCES.sqrt()).T
    e = torch.randn(n, 1, 2, 2, 1, generator=random, dtype=torch.float64)
    t = torch.tensor(low_discrepancy(n, torch.rand((), generator=random).item()), dtype=torch.float64)
    return x.reshape(n, 1, 2, 2, 1), e, t


def exact_noise(schedule):
    """The network that knows the data, told z and the noise level alone: it predicts e."""

    def predict(z, level):
        gamma = (schedule.gamma_min + level * (schedule.gamma_max - schedule.gamma_min))[:, None]
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        centred = (z.flatten(1) - alpha * MEAN) @ AXES  # (N, 4)
        x = MEAN + centred * (alpha * VARIANCES / (alpha**2 * VARIANCES + sigma**2)) @ AXES.T
        return ((z.flatten(1) - alpha * x) / sigma).reshape(z.shape)

    return predict


# The schedule


def test_it_starts_straight_and_its_ends_are_exact():
    gamma, rate = VDMSchedule(-12.0, 8.0).double()(T)
    torch.testing.assert_close(gamma, -12 + 20 * T)
    torch.testing.assert_close(rate, torch.full_like(T, 20.0))
    for seed in range(5):
        gamma, rate = curved(seed=seed)(T)
        assert (gamma[0].item(), gamma[-1].item()) == (-13.3, 10.0)
        assert (gamma.diff() > 0).all() and (rate > 0).all()


def test_rate_is_the_derivative():
    schedule, h, inner = curved(), 1e-6, T[1:-1] + 0.0007  # between knots
    (before, _), (after, _), (_, rate) = schedule(inner - h), schedule(inner + h), schedule(inner)
    torch.testing.assert_close((after - before) / (2 * h), rate, rtol=1e-6, atol=1e-6)


def test_the_process_is_the_schedule():
    schedule = curved()
    process, t = schedule.process(), T[1:]
    gamma, rate = schedule(t)
    torch.testing.assert_close(-2 * process.lam(t), gamma.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(-2 * process.lam_rate(t), rate.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.network_time(t), ((gamma + 13.3) / 23.3).detach())
    assert process.network_time(0.0) == 0 and process.network_time(1.0) == 1
    again = make_process(**json.loads(json.dumps(process.to_dict())))
    assert again == process and hash(again) == hash(process)
    single = curved().float()
    assert (single.process().gamma[0], single.process().gamma[-1]) == (-13.3, 10.0)
    torch.testing.assert_close(-2 * single.process().lam(t), single(t)[0].detach().double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learned", [-1000.0, 1000.0])
def test_whatever_is_learned_gamma_rises(learned):
    """In float32, with one step that wants all of the rise, or none: a model can be saved, and no stretch of t is lost."""
    schedule = VDMSchedule()
    schedule.logits.data[40] = learned
    gaps = torch.tensor(schedule.process().gamma, dtype=torch.float64).diff()
    assert gaps.min().item() == pytest.approx(1e-3 * 23.3 / 64, rel=0.05)


def test_process_jumps_from_the_data_to_its_least_noise():
    process = VDM((-10.0, 0.0, 10.0))
    assert (process.alpha(0.0), process.sigma(0.0), process.lam(0.0)) == (1, 0, math.inf)
    assert process.lam(1e-12) == pytest.approx(5)
    assert 0 < process.t_of_lam(5.0) < 1e-6 and 0 < process.t_of_lam(7.0) < 1e-6
    assert process.lam_range == (-5, 5)


def test_other_processes_tell_the_time_itself():
    assert Flow().network_time(0.3) == 0.3
    assert torch.equal(Cosine().network_time(T), T)


@pytest.mark.parametrize("process", [Flow(), Cosine(), make_process("vp-linear"), curved().process()])
def test_rate_of_lambda(process):
    t, h = T[2:-2] + 0.0003, 1e-6
    torch.testing.assert_close(process.lam_rate(t), (process.lam(t + h) - process.lam(t - h)) / (2 * h), rtol=1e-5, atol=1e-5)
    assert process.lam_rate(0.3003) == pytest.approx((process.lam(0.3003 + h) - process.lam(0.3003 - h)) / (2 * h), rel=1e-5)


def test_share_spacing():
    for process in (Flow(), Cosine(), make_process("vp-linear"), curved().process()):
        share = [1 / (1 + math.exp(process.lam(t))) for t in process.times(20, "share")]
        gaps = torch.tensor(share, dtype=torch.float64).diff()
        torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps), rtol=1e-6, atol=1e-9)
    assert Flow().times(20, "share") == pytest.approx(Flow().times(20))


# The loss


@pytest.mark.parametrize("target", LEARNABLE_TARGETS)
def test_losses_are_the_bounds_integrand(target):
    """Of a wrong network, in any target: gamma' / 2 |e - e'|^2, which is SNR |x - x'|^2 times -d lambda / dt."""
    schedule, random = curved(), torch.Generator().manual_seed(0)
    process = schedule.process()

    def denoised(z, level):
        return 0.7 * torch.tanh(z)

    def predict(z, level):
        t = process.t_of_lam(-(schedule.gamma_min + level * (schedule.gamma_max - schedule.gamma_min)) / 2)
        alpha, sigma = (f(t)[:, None, None, None, None] for f in (process.alpha, process.sigma))
        x = denoised(z, level)
        return {"data": x, "noise": (z - alpha * x) / sigma, "v": (alpha * z - x) / sigma}[target]

    x, e, t = batch(2000, random)
    with torch.no_grad():
        losses = vdm_losses(schedule, predict, target, x, e, t)
    rate, lam = -2 * process.lam_rate(t), process.lam(t)
    z = process.add_noise(x, e, t)
    by_hand = rate / 2 * (2 * lam).exp() * (x - denoised(z, None)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, by_hand, rtol=1e-6, atol=1e-8)


def test_mean_loss_is_the_bounds_diffusion_term():
    """Of the exact network, per dimension: what training sees is what `variational_bound` reports."""
    schedule, random = curved(), torch.Generator().manual_seed(0)
    process = schedule.process()
    with torch.no_grad():
        losses = vdm_losses(schedule, exact_noise(schedule), "noise", *batch(20_000, random))

    def noise(_):
        return torch.randn(400, 1, 2, 2, 1, dtype=torch.float64, generator=random)

    x, _, _ = batch(400, random)
    per_dimension = variational_bound(gaussian_denoiser(process), x, process, noise, low_discrepancy(200)).diffusion / 4
    error = math.sqrt(losses.var() / 20_000 + per_dimension.var() / 400)
    assert error < 0.15  # of 6
    assert (losses.mean() - per_dimension.mean()).abs() < 4 * error


@pytest.mark.parametrize("target", LEARNABLE_TARGETS)
def test_gradients_of_the_loss(target):
    """Of network and schedule, through z, the level and the rate: against the loss written in the noise alone."""
    schedule, weight = curved(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x, e, t = batch(32, torch.Generator().manual_seed(0))

    def predict(z, level):
        return weight * torch.sin(z + level[:, None, None, None, None])

    vdm_losses(schedule, predict, target, x, e, t).mean().backward()

    gamma, rate = (value[:, None, None, None, None] for value in schedule(t))
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    z = alpha * x + sigma * e
    output = weight * torch.sin(z + (gamma + 13.3) / 23.3)
    noise = {"noise": output, "v": sigma * z + alpha * output, "data": (z - alpha * output) / sigma}[target]
    expected = torch.autograd.grad((rate / 2 * (e - noise) ** 2).mean(), (weight, schedule.logits))
    torch.testing.assert_close(weight.grad, expected[0])
    torch.testing.assert_close(schedule.logits.grad, expected[1], rtol=1e-6, atol=1e-9)


def test_variance_gradient():
    """Over several batches, what `learn_variance` leaves is the gradient of their losses' squared distance from their mean."""
    schedule, random = curved(), torch.Generator().manual_seed(0)
    batches = [batch(8, random) for _ in range(3)]

    def loss(each):
        return vdm_losses(schedule, exact_noise(schedule), "noise", *each).mean()

    mean, found = 5.0, 0.0
    for each in batches:
        schedule.logits.grad = None
        schedule.mean_loss.fill_(mean)
        loss(each).backward()
        schedule.learn_variance(loss(each).detach())
        found = found + schedule.logits.grad
        assert schedule.mean_loss.item() == pytest.approx(0.9 * mean + 0.1 * loss(each).item())
    (expected,) = torch.autograd.grad(sum((loss(each) - mean) ** 2 for each in batches), schedule.logits)
    torch.testing.assert_close(found, expected)


def test_first_step_teaches_the_schedule_nothing():
    """There is no mean to compare with yet; and the running mean is of the state that a checkpoint keeps."""
    schedule = VDMSchedule(knots=5)
    schedule.logits.grad = torch.ones(4)
    schedule.learn_variance(torch.tensor(3.0))
    assert not schedule.logits.grad.any() and schedule.state_dict()["mean_loss"] == 3


def test_learning_lowers_the_variance_of_the_batch_and_leaves_the_bound():
    """8 low-discrepancy times, data of 128 dimensions, the exact network: 250 steps take a third of the deviation away."""
    random = torch.Generator().manual_seed(0)
    deviations = torch.tensor([0.1, 0.3, 1.0, 2.0], dtype=torch.float64).repeat(32).reshape(1, 1, 128, 1, 1)

    def loss(schedule):
        def predict(z, level):
            gamma = (schedule.gamma_min + level * (schedule.gamma_max - schedule.gamma_min))[:, None, None, None, None]
            alpha2, sigma2 = torch.sigmoid(-gamma), torch.sigmoid(gamma)
            return z * sigma2.sqrt() / (alpha2 * deviations**2 + sigma2)

        e, x = (torch.randn(8, 1, 128, 1, 1, dtype=torch.float64, generator=random) for _ in range(2))
        t = torch.tensor(low_discrepancy(8, torch.rand((), generator=random).item()), dtype=torch.float64)
        return vdm_losses(schedule, predict, "noise", deviations * x, e, t).mean()

    def repeated(schedule):
        with torch.no_grad():
            return torch.stack([loss(schedule) for _ in range(400)])

    schedule = VDMSchedule(knots=33).double()
    before = repeated(schedule)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.01)
    for _ in range(250):
        optimizer.zero_grad()
        value = loss(schedule)
        value.backward()
        schedule.learn_variance(value.detach())
        optimizer.step()
    after = repeated(schedule)
    assert after.std() < 0.67 * before.std()
    assert (after.mean() - before.mean()).abs() < 4 * math.sqrt((before.var() + after.var()) / 400)
    knots = schedule.knots().tolist()
    assert (knots[0], knots[-1]) == pytest.approx((-13.3, 10.0)) and all(low < high for low, high in pairwise(knots))


def test_losses_without_a_gradient_to_the_schedule():
    """Validation, and training with a schedule that is to stay."""
    schedule, weight = curved(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    schedule.requires_grad_(False)
    x, e, t = batch(4, torch.Generator().manual_seed(0))
    vdm_losses(schedule, lambda z, level: weight * z, "v", x, e, t).mean().backward()
    assert weight.grad is not None and schedule.logits.grad is None


def test_a_u_net_learns_with_it():
    """In float32, with the time embedding in between; every parameter and the schedule get a finite gradient."""
    torch.manual_seed(0)
    unet, schedule = UNet(1, 1, [], [8], 1, [False]), VDMSchedule(knots=5)
    x, e, t = (value.float() for value in batch(4, torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam([*unet.parameters(), *schedule.parameters()], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        losses = vdm_losses(schedule, lambda z, level: unet(z, 1000 * level), "v", x, e, t)
        losses.mean().backward()
        optimizer.step()
    assert losses.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*unet.parameters(), *schedule.parameters()])
    assert schedule.logits.grad.abs().max() > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: VDMSchedule(3.0, -3.0), "from 3.0 to -3.0"),
        (lambda: VDMSchedule(knots=1), "1 knots"),
        (lambda: VDM((0.0, 0.0)), "numbers that rise"),
        (lambda: make_process("vdm", gamma=[1.0]), "two or more"),
        (lambda: make_process("vdm", gama=[1.0]), "did you mean 'gamma'"),
        (lambda: vdm_losses(VDMSchedule(), None, "velocity", *[torch.zeros(1)] * 3), "known: noise, v, data"),
    ],
)
def test_errors_name_the_way_out(call, message):
    with pytest.raises(InputError, match=message):
        call()


# Fourier features


def test_fourier_features_show_fine_detail():
    """sin(2^n pi z) and cos(2^n pi z) beside z, by hand; off by default, and then nothing of the network is another."""
    torch.manual_seed(0)
    plain, unet = UNet(2, 2, [], [8], 1, [False]), UNet(2, 2, [], [8], 1, [False], fourier_features=[0, 3])
    assert plain.conv_in.weight.shape[1] == 2 and unet.conv_in.weight.shape[1] == 10
    assert unet.arguments["fourier_features"] == [0, 3] and plain.arguments["fourier_features"] is None
    seen = []
    unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    z = torch.randn(1, 2, 3, 4, 3)
    assert unet(z, torch.tensor([500.0])).shape == z.shape
    expected = [z, *(wave(2.0**n * math.pi * z) for n in (0, 3) for wave in (torch.sin, torch.cos))]
    torch.testing.assert_close(seen[0], torch.cat(expected, dim=1))
    half = UNet(2, 2, [], [8], 1, [False], fourier_features=[6]).to(torch.bfloat16)
    half.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    half(z.bfloat16(), torch.tensor([500.0]))
    exact = torch.sin(64 * math.pi * z.bfloat16().double())
    torch.testing.assert_close(seen[1][:, 2:4].double(), exact, rtol=0, atol=0.01)  # the angle is not rounded
