"""What the training loops are made of: batches, optimisers, averages, losses, checkpoints, the latent cache."""

import copy
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from monai.networks.nets import ResNetFeatures
from safetensors.torch import load_file, save_file

from ldm3d.config.sections import DiffusionConfig
from ldm3d.config.training import AdversarialConfig, TrainingConfig
from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.data.batches import TrainingBatches
from ldm3d.data.latents import check_latents, describe_noise, is_fresh, noise_share, read_latents, write_latents
from ldm3d.errors import InputError
from ldm3d.models.unet import UNet
from ldm3d.randomness import generator
from ldm3d.training import checkpoint
from ldm3d.training.ema import EMA
from ldm3d.training.losses import kl_divergence
from ldm3d.training.monai_losses import Adversary, PerceptualLoss
from ldm3d.training.optimizer import Muon, learning_rate, make_optimizer, orthogonalise, set_learning_rate

# Batches


def read(sample, rng):
    return {"sample": torch.tensor(sample), "noise": torch.randn(3, generator=rng)}


def batches(num_samples=7, batch_size=12, accumulation=1, seed=5, rank=0, world=1, subjects=None):
    return TrainingBatches(read, num_samples, batch_size, accumulation, seed, rank, world, subjects)


def joined(parts):
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("world, accumulation", [(2, 1), (1, 3), (2, 3), (4, 1)])
def test_processes_and_parts_together_are_one_batch(world, accumulation):
    """Same samples in the same order with the same random numbers, however the batch is cut."""
    whole = batches()
    parts = [batches(accumulation=accumulation, rank=rank, world=world) for rank in range(world)]
    for step in (0, 3):
        micro = range(step * accumulation, (step + 1) * accumulation)
        assert equal(whole[step], joined([part[m] for m in micro for part in parts]))


def test_resumed_run_reads_what_an_uninterrupted_one_reads():
    uninterrupted = list(batches(accumulation=2).loader(0, 6, 0, False))
    resumed = list(batches(accumulation=2).loader(4, 6, 0, False))
    assert len(uninterrupted) == 12
    assert len(resumed) == 4
    assert all(equal(a, b) for a, b in zip(uninterrupted[8:], resumed))


def test_items_do_not_depend_on_what_was_read_before():
    forwards, backwards = batches(), batches()
    assert equal([forwards[step] for step in range(5)][1], [backwards[step] for step in reversed(range(5))][3])


VISITS = "aaaaaabbc"  # of three people, one with six


@pytest.mark.parametrize("world, accumulation", [(1, 1), (3, 1), (2, 3)])
def test_by_subject_a_batch_follows_from_seed_and_step_alone(world, accumulation):
    """On any number of processes, in any number of parts, and in a run that is resumed at step 2."""
    whole = list(batches(9, subjects=VISITS).loader(0, 4, 0, False))
    parts = [batches(9, accumulation=accumulation, rank=rank, world=world, subjects=VISITS) for rank in range(world)]
    for step in (2, 3):
        micro = range(step * accumulation, (step + 1) * accumulation)
        assert equal(whole[step], joined([part[m] for m in micro for part in parts]))
    assert not equal(whole[2], batches(9)[2])


def test_by_subject_everybody_counts_once_and_visits_take_turns():
    several = batches(9, 6, subjects=VISITS)
    epochs = torch.cat([several[step]["sample"] for step in range(30)]).view(-1, 3).tolist()
    assert all(sorted(VISITS[sample] for sample in epoch) == ["a", "b", "c"] for epoch in epochs)
    counts = torch.bincount(torch.tensor(epochs).flatten()).tolist()
    assert counts == [10] * 6 + [30] * 2 + [60]  # 60 epochs
    assert len({tuple(VISITS[sample] for sample in epoch) for epoch in epochs}) == 6  # in every order
    assert several.samples(7) == several[7]["sample"].tolist()  # as messages name them


@pytest.mark.parametrize("num_samples, batch_size", [(7, 3), (5, 12), (4, 4)])
def test_each_epoch_visits_each_sample_once(num_samples, batch_size):
    several = batches(num_samples, batch_size)
    order = torch.cat([several[step]["sample"] for step in range(num_samples)]).view(-1, num_samples)
    assert (order.sort(dim=1).values == torch.arange(num_samples)).all()
    assert len(order.unique(dim=0)) > 1, "every epoch has an order of its own"


def test_seed_decides_order_and_random_numbers():
    one, same, other = batches(30)[0], batches(30)[0], batches(30, seed=6)[0]
    assert equal(one, same)
    assert not torch.equal(one["sample"], other["sample"])
    assert not torch.equal(one["noise"], other["noise"])


def test_no_random_number_comes_twice():
    several = batches()
    noise = torch.cat([several[step]["noise"] for step in range(50)])
    assert len(noise.unique()) == noise.numel()


@pytest.mark.parametrize("batch_size", [1, 4, 12, 256])
def test_quantiles_are_stratified(batch_size):
    """One in each of batch_size equal parts of [0, 1), up to a shift that all share."""
    several = batches(batch_size=batch_size)
    shifts = []
    for step in range(200):
        quantile = several[step]["quantile"].double()
        assert quantile.shape == (batch_size,)
        assert 0 <= quantile.min() <= quantile.max() < 1
        ordered = quantile.sort().values
        torch.testing.assert_close(ordered.diff(), torch.full_like(ordered[1:], 1 / batch_size), atol=1e-6, rtol=0)
        shifts.append(ordered[0].item() * batch_size)
    assert np.histogram(shifts, 4, (0, 1))[0].min() > 25, "the shift changes from step to step"


def test_batch_that_does_not_divide():
    with pytest.raises(InputError, match="batch_size 10 must be divisible by accumulation 2 times 3 processes; try 12"):
        batches(batch_size=10, accumulation=2, world=3)


# Generators


def numbers(*position):
    return torch.rand(8, generator=generator(*position)).tolist()


def test_generator_follows_from_its_position():
    assert numbers(1, 2, 3) == numbers(1, 2, 3)
    different = [(1, 2, 3), (1, 3, 2), (2, 1, 3), (1, 2, 4), (1, 2), (2, 1), (1,), (3,), (123,)]
    assert len({tuple(numbers(*position)) for position in different}) == len(different)


@pytest.mark.parametrize(
    "one, other",
    [
        ((0, 3), (0, 3, 0)),  # sample 3 of a seed, and row 0 of training step 3
        ((0,), (0, 0)),
        ((5, 2**40 + 3), (5, 3, 256)),  # order of epoch 3, and row 256 (or, for batches of 256, the quantiles) of step 3
    ],
)
def test_generators_of_different_positions_are_independent(one, other):
    assert numbers(*one) != numbers(*other)


def test_generators_of_neighbours_do_not_correlate():
    rows = torch.stack([torch.randn(2000, generator=generator(0, 0, row)) for row in range(20)])
    correlation = torch.corrcoef(rows) - torch.eye(20)
    assert correlation.abs().max() < 5 / math.sqrt(2000)


# Optimisers


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (32, 432)])
def test_orthogonalise_brings_singular_values_near_1(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix)
    values = torch.linalg.svdvals(found)
    assert found.dtype == matrix.dtype
    assert 0.6 < values.min() <= values.max() < 1.3
    # It keeps the directions: close to the nearest semi-orthogonal matrix, U V^T
    assert torch.nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_orthogonalise_does_not_care_for_scale():
    matrix = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalise(matrix / 2**13), orthogonalise(matrix), atol=0.02, rtol=0)  # exact in bfloat16
    assert torch.isfinite(orthogonalise(torch.zeros(3, 4))).all()


def matrices(*parameters):
    return [{"params": list(parameters), "orthogonal": True}]


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (8, 4, 3, 3, 3)])
def test_muon_s_update_of_a_matrix_has_adamw_s_size(shape):
    """Singular values of 0.2 sqrt(max(rows, columns)) times the learning rate, within those of `orthogonalise`."""
    g = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=g))
    before, gradient = parameter.detach().clone(), torch.randn(shape, generator=g)
    parameter.grad = gradient.clone()
    Muon(matrices(parameter), lr=0.01).step()
    step = (before - parameter.detach()).flatten(1)
    values = torch.linalg.svdvals(step) / (0.01 * 0.2 * math.sqrt(max(step.shape)))
    assert 0.6 < values.min() <= values.max() < 1.3
    assert (step * gradient.flatten(1)).sum() > 0, "downhill"


def test_muon_s_momentum_with_nesterov_s_correction(monkeypatch):
    """Without orthogonalisation: m <- 0.9 m + 0.1 g, direction 0.1 g + 0.9 m."""
    monkeypatch.setattr("ldm3d.training.optimizer.orthogonalise", lambda matrix: matrix)
    parameter = torch.nn.Parameter(torch.zeros(1, 4))
    optimizer = Muon(matrices(parameter), lr=1.0, momentum=0.9)
    expected, momentum = 0.0, 0.0
    for gradient in (1.0, -2.0, 3.0):
        parameter.grad = torch.full((1, 4), gradient)
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        expected -= 0.2 * math.sqrt(4) * (0.1 * gradient + 0.9 * momentum)
        torch.testing.assert_close(parameter.detach(), torch.full((1, 4), expected))


def test_muon_is_pytorch_s_for_one_matrix_after_the_other():
    """Several of each shape, tall and wide, over a few steps; PyTorch's own iterates in bfloat16."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=g) for shape in [(12, 30), (30, 12), (12, 30), (8, 8), (30, 12), (12, 30)]]
    mine, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    ours = Muon(matrices(*mine), lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(mine, theirs):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        ours.step(), reference.step()
    for before, a, b in zip(start, mine, theirs):
        moved, expected = a.detach() - before, b.detach() - before
        assert (moved - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("shape", [(3, 12, 30), (3, 30, 12)])
def test_matrices_are_orthogonalised_by_themselves(shape):
    several = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100, 0.01])[:, None, None]
    torch.testing.assert_close(orthogonalise(several), torch.stack([orthogonalise(matrix) for matrix in several]))


def skipping(kind):
    net = unet()
    return net, make_optimizer(net, settings(optimizer=kind, weight_decay=0.1))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_skipped_on_the_device_changes_nothing(kind, first):
    """Neither weights nor momenta nor counters, whatever is in the gradients; later steps are those of a run without it."""
    (net, optimizer), (other, expected) = skipping(kind), skipping(kind)

    def step(net, optimizer, number, bad=0.0):
        for i, parameter in enumerate(net.parameters()):
            gradient = torch.randn(parameter.shape, generator=generator(number, i))
            parameter.grad = gradient * float("nan") if bad else gradient
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()

    for number in range(3):
        step(other, expected, number)
        if number == (0 if first else 1):
            step(net, optimizer, 100, bad=1.0)
        step(net, optimizer, number)
    assert equal(net.state_dict(), other.state_dict())
    assert equal(checkpoint.optimizer_tensors(net, optimizer), checkpoint.optimizer_tensors(other, expected))


def test_muon_s_step_never_waits_for_a_device():
    """On a device without values, whatever asks for one is an error."""
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Conv3d(3, 4, 3), torch.nn.Linear(5, 6), torch.nn.LayerNorm(6))
        optimizer = make_optimizer(net, settings(optimizer="muon"))
        for _ in range(2):
            for parameter in net.parameters():
                parameter.grad = torch.empty_like(parameter)
            optimizer.found_inf = torch.empty(())
            optimizer.step()


def test_muon_decays_matrices_only():
    matrix, vector = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))
    matrix.grad, vector.grad = torch.zeros(3, 3), torch.zeros(3)
    Muon([*matrices(matrix), {"params": [vector], "orthogonal": False}], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), torch.full((3, 3), 0.95))
    assert (vector == 1).all()


def test_muon_s_other_part_is_adamw():
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(6, generator=g), torch.randn(1, 5, generator=g)]
    mine, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    muon = Muon([{"params": mine, "orthogonal": False}], lr=0.01)
    adamw = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0)
    for step in range(6):
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        for a, b in zip(mine, theirs):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        muon.step()
        adamw.step()
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def settings(**changes):
    return TrainingConfig(**{"steps": 1000, "batch_size": 4, "learning_rate": 0.1, "warmup_steps": 100, **changes})


def unet():
    torch.manual_seed(0)
    net = UNet(2, 2, [0, 2], [8, 8], 1, [False, True], head_channels=4, context_dim=6)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_optimised_once(kind):
    net = unet()
    groups = make_optimizer(net, settings(optimizer=kind)).param_groups
    chosen = [id(p) for group in groups for p in group["params"]]
    assert sorted(chosen) == sorted(map(id, net.parameters()))
    assert {group["lr"] for group in groups} == {0.1}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_module_s_own_learning_rate_factor(kind):
    """The same gradient moves it by that multiple of what it moves others."""
    torch.manual_seed(0)
    net = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(2)])
    net[1].learning_rate_factor = 0.25
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim))
    optimizer = make_optimizer(net, settings(optimizer=kind))
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    moved = [parameter.detach() - start for parameter, start in zip(net.parameters(), before)]
    for full, quarter in zip(moved[:2], moved[2:]):
        torch.testing.assert_close(quarter, full / 4)
        assert full.abs().max() > 0


def test_norms_biases_and_tokens_are_not_decayed():
    net = unet()
    groups = make_optimizer(net, settings(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        small = parameter.ndim < 2 or name in ("tokens.null", "tokens.embed.1.weight")
        assert decay[id(parameter)] == (0.0 if small else 0.3), name


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.001),  # 1/100 of the way
        (49, 0.05),
        (99, 0.1),
        (100, 0.1),
        (550, 0.1 * (0.01 + 0.99 / 2)),  # half of the cosine
        (1000, 0.001),  # 1% is left
        (5000, 0.001),
    ],
)
def test_learning_rate_with_cosine(step, expected):
    assert learning_rate(step, settings()) == pytest.approx(expected)


def test_learning_rate_without():
    assert [learning_rate(step, settings(schedule="constant")) for step in (0, 100, 900)] == pytest.approx([0.001, 0.1, 0.1])
    assert learning_rate(0, settings(warmup_steps=0)) == pytest.approx(0.1)
    assert all(0 < learning_rate(step, settings(steps=3)) <= 0.1 for step in range(4))  # shorter than its warm-up


# Averages


def test_ema_follows_its_recursion():
    net = torch.nn.BatchNorm1d(1)
    net.weight.data.fill_(0.0)
    ema = EMA(net, 0.5)
    net.weight.data.fill_(1.0)
    net.running_mean.fill_(7.0)
    expected = 0.0
    for step in range(12):
        decay = min(0.5, (1 + step) / (10 + step))  # 0.1, 2/11, ... 0.5
        expected = decay * expected + (1 - decay)
        ema.update(net, step)
        assert ema.network.weight.item() == pytest.approx(expected)
    assert ema.network.running_mean.item() == 7.0  # a buffer is copied
    assert net.weight.item() == 1.0


def test_ema_of_decay_0_is_the_network():
    net = torch.nn.Linear(3, 2)
    ema = EMA(net, 0.0)
    torch.nn.init.normal_(net.weight)
    ema.update(net, 100)
    assert torch.equal(ema.network.weight, net.weight)
    assert not ema.network.weight.requires_grad
    assert not ema.network.training


# Losses


def test_kl_divergence_against_torch():
    moments = torch.randn(3, 4, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    mean, log_variance = moments.chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 3
    assert kl_divergence(moments).item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl_divergence(torch.zeros(2, 4, 1, 1, 1)).item() == 0


@pytest.fixture(scope="module")
def perceptual_weights(tmp_path_factory):
    torch.manual_seed(0)
    state = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1).state_dict()
    path = tmp_path_factory.mktemp("weights") / "resnet10.safetensors"
    save_file({f"module.{name}": value for name, value in state.items()}, path)  # as MedicalNet publishes them
    return path


def test_perceptual_loss(perceptual_weights):
    loss = PerceptualLoss(perceptual_weights)
    g = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 1, 24, 24, 24, generator=g), torch.rand(2, 1, 24, 24, 24, generator=g)
    assert loss(one, one).abs().max() == 0
    other.requires_grad_()
    far, near = loss(other, one).mean(), loss(one + 0.05 * (other - one), one).mean()
    assert 0 < near < far
    far.backward()
    assert other.grad.abs().sum() > 0, "the autoencoder learns from it"
    assert not any(p.requires_grad for p in loss.parameters())
    assert not loss.training
    assert torch.equal(loss.model.features.conv1.weight, load_file(perceptual_weights)["module.conv1.weight"])


def test_perceptual_weights_that_cannot_be_used(perceptual_weights, tmp_path):
    with pytest.raises(InputError, match=r"none\.safetensors do not exist"):
        PerceptualLoss(tmp_path / "none.safetensors")
    pickled = tmp_path / "resnet_10.pth"
    torch.save({"state_dict": {"conv1.weight": torch.ones(3)}}, pickled)
    with pytest.raises(InputError, match=r"not safetensors .*convert a PyTorch file with safetensors\.torch\.save_file"):
        PerceptualLoss(pickled)
    # The way out that it names works
    converted = tmp_path / "converted.safetensors"
    save_file(torch.load(pickled, weights_only=True)["state_dict"], converted)
    with pytest.raises(InputError, match="of another configuration"):
        PerceptualLoss(converted)


def adversary():
    torch.manual_seed(0)
    return Adversary(AdversarialConfig(weight=1, start=0, channels=4, layers=1), in_channels=1)


class Constant(torch.nn.Module):
    """A discriminator whose answer to a volume is the volume's mean."""

    def forward(self, x):
        return [x.mean(dim=(2, 3, 4), keepdim=True)]


def test_adversary_s_signs():
    """Least squares: real should be 1 and fake 0; the autoencoder wants its fake to be 1."""
    net = adversary()
    net.discriminator = Constant()
    ones, zeros = torch.ones(2, 1, 4, 4, 4), torch.zeros(2, 1, 4, 4, 4)
    assert net(None, ones).item() == pytest.approx(0)
    assert net(None, zeros).item() == pytest.approx(1)
    assert net(real=ones, fake=zeros).item() == pytest.approx(0)  # caught
    assert net(real=zeros, fake=ones).item() == pytest.approx(1)  # fooled
    assert net(real=ones, fake=ones).item() == pytest.approx(0.5)


def test_adversary_teaches_one_side_at_a_time():
    net = adversary()
    fake = torch.rand(2, 1, 16, 16, 16, requires_grad=True)
    net(torch.rand(2, 1, 16, 16, 16), fake).backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in net.parameters())
    net(None, fake).backward()
    assert fake.grad.abs().sum() > 0


def test_a_batch_in_two_parts_teaches_the_adversary_the_same():
    """As on two processes: a volume is judged by itself."""
    g = torch.Generator().manual_seed(0)
    volumes = torch.rand(2, 4, 1, 16, 16, 16, generator=g)  # real and fake
    volumes[1, 2:] *= 3  # batches that are alike would hide what one of them does to the other
    found = []
    for parts in (1, 2):
        net, losses = adversary(), []
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        for _ in range(3):
            several = [(net(None, fake), net(real, fake)) for real, fake in zip(*(v.chunk(parts) for v in volumes))]
            (sum(own for _, own in several) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append([sum(values).item() / parts for values in zip(*several)])
        found.append(torch.tensor(losses))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


def test_discriminator_learns_to_tell_apart():
    net = adversary()
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 1, 6, 6, 6, generator=g)  # of the same mean and variance: what differs is how smooth they are
    real, fake = torch.nn.functional.interpolate(coarse, scale_factor=2), torch.randn(4, 1, 12, 12, 12, generator=g)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    losses, fooled = [], []
    for _ in range(45):
        fooled.append(net(None, fake).item())
        loss = net(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert fooled[-1] > fooled[0]


# Checkpoints


SETTINGS = {"diffusion": {"training": {"steps": 8, "learning_rate": 0.1}, "network": {"channels": [8, 8]}}, "seed": 0}


def run_of(kind, device="cpu"):
    net = unet().to(device)
    return net, EMA(net, 0.9), make_optimizer(net, settings(optimizer=kind, learning_rate=0.01, weight_decay=0.1))


def train(net, ema, optimizer, steps):
    device = next(net.parameters()).device
    for step in steps:
        g = generator(1, step)
        x, context = torch.randn(2, 2, 4, 4, 4, generator=g), torch.ones(2, 2, 2)
        optimizer.zero_grad()
        net(x.to(device), torch.rand(2, generator=g).to(device), context.to(device)).square().mean().backward()
        optimizer.step()
        ema.update(net, step)


def save(run, step, net, ema, optimizer, best=None, described=SETTINGS):
    networks, optimizers = {"model": net, "ema": ema.network}, {"optimizer": (net, optimizer)}
    checkpoint.save_checkpoint(run, step, networks, optimizers, {"best": best, "settings": described}, best)


def restore(run, net, ema, optimizer, described=SETTINGS):
    """As the training loops do: networks first, optimisers second; gives the state."""
    restored = checkpoint.restore(run, checkpoint.newest_intact(run), {"model": net, "ema": ema.network}, described)
    if restored is None:
        return None
    checkpoint.restore_optimizers(restored[0], {"optimizer": (net, optimizer)})
    return restored[1]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_restored_run_goes_on_as_if_never_stopped(tmp_path, kind):
    parts = run_of(kind)
    train(*parts, range(3))
    save(tmp_path, 3, *parts, best=2)
    train(*parts, range(3, 5))

    again = run_of(kind)
    state = restore(tmp_path, *again)
    assert (state["step"], state["best"]) == (3, 2)
    train(*again, range(3, 5))
    for one, other in ((parts[0], again[0]), (parts[1].network, again[1].network)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    states = [checkpoint.optimizer_tensors(net, optimizer) for net, _, optimizer in (parts, again)]
    assert equal(*states)
    for name, value in states[1].items():  # in the parameters' memory format, or every step would have to convert it
        assert value.ndim < 5 or value.is_contiguous(memory_format=torch.channels_last_3d), name


def test_optimiser_state_is_named_after_parameters(tmp_path):
    net, _, optimizer = parts = run_of("adamw")
    assert checkpoint.optimizer_tensors(net, optimizer) == {}
    train(*parts, range(2))
    tensors = checkpoint.optimizer_tensors(net, optimizer)
    assert torch.equal(tensors["conv_in.bias/exp_avg"], optimizer.state[net.conv_in.bias]["exp_avg"])
    assert tensors["tokens.null/step"].item() == 2
    # Without a step there is nothing to restore, and that is no error
    fresh = run_of("adamw")
    save(tmp_path, 0, *fresh)
    assert restore(tmp_path, *fresh)["step"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fused AdamW keeps its step counters on the GPU")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_restored_run_goes_on_on_a_gpu(tmp_path, kind):
    parts = run_of(kind, "cuda")
    train(*parts, range(3))
    save(tmp_path, 3, *parts)
    train(*parts, range(3, 5))
    again = run_of(kind, "cuda")
    restore(tmp_path, *again)
    train(*again, range(3, 5))
    for name, value in parts[0].state_dict().items():
        torch.testing.assert_close(value, again[0].state_dict()[name], msg=lambda m, name=name: f"{name}: {m}")


def test_new_run_has_nothing_to_restore(tmp_path):
    assert checkpoint.newest_intact(tmp_path) is None
    assert restore(tmp_path, *run_of("adamw")) is None


def kept(run):
    return [int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(run)]


def test_the_last_two_and_the_best_are_kept(tmp_path):
    parts = run_of("adamw")
    history = []
    for step, best in [(2, None), (4, 4), (6, 4), (8, 4), (10, 10), (12, 10)]:
        save(tmp_path, step, *parts, best=best)
        history.append(kept(tmp_path))
    assert history == [[2], [2, 4], [4, 6], [4, 6, 8], [8, 10], [10, 12]]
    assert checkpoint.newest_intact(tmp_path) == 12
    assert checkpoint.load_checkpoint(tmp_path, 10)[1]["step"] == 10
    assert not list((tmp_path / "checkpoints").glob("partial-*"))
    last = tmp_path / "checkpoints/step-00000012"
    assert {path.name for path in last.iterdir()} == {"tensors.safetensors", "state.json", "SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=last, check=True)


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    parts = run_of("adamw")
    save(tmp_path, 2, *parts)
    train(*parts, range(1))
    save(tmp_path, 2, *parts)
    tensors, _ = checkpoint.load_checkpoint(tmp_path, 2)
    assert torch.equal(tensors["model"]["conv_in.bias"], parts[0].conv_in.bias)


def test_interrupted_write_is_ignored(tmp_path):
    parts = run_of("adamw")
    save(tmp_path, 2, *parts)
    last = tmp_path / "checkpoints/step-00000002"
    partial = last.with_name("partial-step-00000004")
    shutil.copytree(last, partial)
    (partial / "tensors.safetensors").write_bytes(b"half")
    assert kept(tmp_path) == [2]
    assert restore(tmp_path, *parts)["step"] == 2
    save(tmp_path, 4, *parts)  # its leftovers do no harm
    assert restore(tmp_path, *parts)["step"] == 4
    assert not partial.exists()


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_bit, cut, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "SHA256SUMS"])
def test_the_checkpoint_before_a_damaged_one_is_taken(tmp_path, capsys, name, damage):
    parts = run_of("adamw")
    train(*parts, range(1))
    save(tmp_path, 2, *parts)
    expected = copy.deepcopy(parts[0].state_dict())
    train(*parts, range(1, 2))
    save(tmp_path, 4, *parts)
    damage(tmp_path / "checkpoints/step-00000004" / name)
    assert restore(tmp_path, *parts)["step"] == 2
    assert equal(parts[0].state_dict(), expected)
    message = capsys.readouterr().out
    assert "step-00000004 is damaged" in message and name in message
    assert kept(tmp_path) == [2]
    assert restore(tmp_path, *parts)["step"] == 2 and capsys.readouterr().out == ""  # said once
    damage(tmp_path / "checkpoints/step-00000002" / name)
    assert restore(tmp_path, *parts) is None  # from the start


def test_a_damaged_best_checkpoint_leaves_the_last(tmp_path, capsys):
    parts = run_of("adamw")
    save(tmp_path, 2, *parts, best=2)
    saved = parts[1].network.conv_in.bias.clone()
    train(*parts, range(2))
    last = parts[1].network.conv_in.bias.clone()
    assert checkpoint.load_best(tmp_path, None, {"ema": parts[1].network}) is None
    assert checkpoint.load_best(tmp_path, {"step": 2}, {"ema": parts[1].network}) == {"step": 2}
    assert torch.equal(parts[1].network.conv_in.bias, saved)
    parts[1].network.conv_in.bias.copy_(last)
    flip_a_bit(tmp_path / "checkpoints/step-00000002/tensors.safetensors")
    assert checkpoint.load_best(tmp_path, {"step": 2}, {"ema": parts[1].network}) is None
    assert torch.equal(parts[1].network.conv_in.bias, last) and "taking the last" in capsys.readouterr().out


def changed(**training):
    described = copy.deepcopy(SETTINGS)
    described["diffusion"]["training"].update(training)
    return described


def test_other_settings_are_listed(tmp_path):
    parts = run_of("adamw")
    save(tmp_path, 2, *parts)
    described = {**changed(learning_rate=0.2, optimizer="muon"), "seed": 1}
    described["diffusion"]["network"]["channels"] = [8, 16]
    with pytest.raises(InputError, match="other settings") as caught:
        restore(tmp_path, *parts, described=described)
    message = str(caught.value)
    assert "diffusion.training.learning_rate: 0.1 -> 0.2" in message
    assert "diffusion.training.optimizer: None -> muon" in message
    assert "diffusion.network.channels: [8, 8] -> [8, 16]" in message
    assert "seed: 0 -> 1" in message


def test_settings_that_are_newer_than_a_checkpoint_have_their_defaults(tmp_path):
    """An old run is not another run because a key with a default has come since, in the config or in a covariate."""
    network = {"channels": [8, 8], "attention": [False, True], "head_channels": 4}
    stage = DiffusionConfig(network=network, training={"steps": 8, "batch_size": 4, "learning_rate": 0.1})
    schema = CovariateSchema((Covariate("age", "continuous", unit="years", range=(0, 120)),))
    now = {"diffusion": stage.model_dump(mode="json"), "covariates": checkpoint.as_json(schema.to_dict()), "seed": 0}
    before = copy.deepcopy(now)
    for section, key in ((before["diffusion"], "loss_weight"), (before["diffusion"]["training"], "schedule")):
        assert section.pop(key) is not None
    assert before["covariates"][0].pop("unit") == "years" and before["covariates"][0].pop("std") == 1.0
    now["covariates"][0]["unit"] = ""
    parts = run_of("adamw")
    save(tmp_path, 2, *parts, described=before)
    assert restore(tmp_path, *parts, described=now)["step"] == 2
    now["diffusion"]["loss_weight"] = "min-snr"
    with pytest.raises(InputError, match=r"diffusion\.loss_weight: none -> min-snr"):
        restore(tmp_path, *parts, described=now)


def test_a_network_of_another_version_is_told_as_such(tmp_path):
    parts = run_of("adamw")
    save(tmp_path, 2, *parts)
    parts[0].extra = torch.nn.BatchNorm3d(3)
    with pytest.raises(InputError, match=r"extra.*another version of ldm3d began this run.*delete"):
        restore(tmp_path, *parts)


def test_what_only_rounds_otherwise_may_change(tmp_path):
    parts = run_of("adamw")
    save(tmp_path, 2, *parts, described=changed(accumulation=1, mixed_precision="no", keep="last"))
    now = changed(accumulation=2, mixed_precision="bf16", keep="best")
    now["diffusion"]["network"] |= {"activation_checkpointing": True, "attention_backend": "math"}
    assert restore(tmp_path, *parts, described=now)["step"] == 2
    said = checkpoint.rounding_changes(changed(accumulation=1, steps=3), {**now, "seed": 1})
    assert said == [
        "diffusion.network.activation_checkpointing: None -> True",
        "diffusion.network.attention_backend: None -> math",
        "diffusion.training.accumulation: 1 -> 2",
    ]


def test_a_run_may_be_made_longer(tmp_path):
    parts = run_of("adamw")
    save(tmp_path, 2, *parts)
    assert restore(tmp_path, *parts, described=changed(steps=100, validate_every=7, workers=2))["step"] == 2
    with pytest.raises(InputError, match="batch_size"):
        restore(tmp_path, *parts, described=changed(steps=100, batch_size=7))


# The latent cache


ORIGIN = {"autoencoder": "a1", "prepared data": "b1"}


def cached(folder, n=5, batch_size=2, origin=ORIGIN):
    scans = pd.DataFrame(
        {
            "key": [f"00{i}" for i in range(n)],
            "subject": [f"0{i}" for i in range(n)],
            "age": [20.5, np.nan, *range(30, 28 + n)],
            "sex": [None, *"FM"[:1] * (n - 1)],
        }
    )

    def encode(volumes):  # (N, 1, 4, 4, 4) -> (N, 2, 2, 2, 2)
        assert volumes.shape[1:] == (1, 4, 4, 4)
        assert len(volumes) <= batch_size
        pooled = volumes[:, :, ::2, ::2, ::2]
        return np.concatenate([pooled, -pooled], axis=1).astype(np.float32)

    def load(key):
        return np.full((1, 4, 4, 4), int(key) + 0.25, dtype=np.float32)

    write_latents(folder, scans, load, encode, origin, batch_size)
    return scans


def moments_of(*log_variances):
    """Posteriors whose means have variance 1."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(300, len(log_variances), 4, 4, 4, generator=g)
    spread = torch.tensor(log_variances)[None, :, None, None, None].expand_as(mean)
    return torch.cat([mean + 5, spread], dim=1).numpy()


def test_share_of_the_posterior_s_noise():
    """v / (1 + v) of a posterior of variance v around means of variance 1, wherever these lie."""
    found = noise_share(moments_of(*np.log([0.01, 1 / 3, 1.0])))
    np.testing.assert_allclose(found, [0.01 / 1.01, 0.25, 0.5], rtol=0.02)
    np.testing.assert_allclose(noise_share(moments_of(0.0), most=10), 0.5, rtol=0.1)


@pytest.mark.parametrize("variances, told", [((0.1, 0.01), None), ((0.01, 0.12, 0.5), r"channel\(s\) 2 \(11%\), 3 \(33%\)")])
def test_channels_of_much_noise_are_named(variances, told):
    line, warning = describe_noise(noise_share(moments_of(*np.log(variances))))
    assert line.count("%") == len(variances)
    assert warning is None if told is None else re.search(told, warning)


def test_latent_cache_round_trip(tmp_path):
    folder = tmp_path / "latents"
    scans = cached(folder)
    moments, again = read_latents(folder, ORIGIN)
    assert moments.shape == (5, 2, 2, 2, 2)
    assert moments.dtype == np.float32
    assert moments[:, 0, 0, 0, 0].tolist() == [0.25, 1.25, 2.25, 3.25, 4.25]
    assert (moments[:, 1] == -moments[:, 0]).all()
    assert again["key"].tolist() == scans["key"].tolist(), "keys keep their leading zeros"
    assert again["subject"].tolist() == scans["subject"].tolist()
    assert (again["age"] == "n/a").tolist() == [False, True, False, False, False]
    assert (again["sex"] == "n/a").tolist() == [True, False, False, False, False]
    with pytest.raises(ValueError, match="read-only"):
        moments[0] = 0


def test_stale_cache_says_what_changed(tmp_path):
    cached(tmp_path)
    assert is_fresh(tmp_path, ORIGIN)
    for changes, told in [
        ({"autoencoder": "a2"}, "the autoencoder changed since"),
        ({"prepared data": "b2"}, "the prepared data changed since"),
        ({"autoencoder": "a2", "prepared data": "b2"}, "the autoencoder and the prepared data changed since"),
    ]:
        assert not is_fresh(tmp_path, {**ORIGIN, **changes})
        with pytest.raises(InputError, match=f"stale: {told}.*run `ldm3d encode CONFIG` again"):
            read_latents(tmp_path, {**ORIGIN, **changes})


def test_missing_cache(tmp_path):
    with pytest.raises(InputError, match=r"no latent cache in .*run `ldm3d encode CONFIG` first"):
        check_latents(tmp_path / "none", ORIGIN)


def test_interrupted_encoding_leaves_no_cache(tmp_path):
    cached(tmp_path)

    def load(key):
        if key == "2":
            raise KeyboardInterrupt
        return np.zeros((1, 4, 4, 4), dtype=np.float32)

    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path, pd.DataFrame({"key": ["1", "2"]}), load, lambda volumes: volumes, ORIGIN, batch_size=1)
    assert not is_fresh(tmp_path, ORIGIN)


def test_damaged_cache(tmp_path):
    """Cut short by a full disk or a bad copy: told like any other bad input, not by a traceback."""
    cached(tmp_path)
    text = (tmp_path / "latents.json").read_text()
    assert json.loads(text) == ORIGIN
    (tmp_path / "latents.json").write_text(text[:10])
    with pytest.raises(InputError, match="ldm3d encode CONFIG"):
        read_latents(tmp_path, ORIGIN)
    cached(tmp_path)
    (tmp_path / "moments.npy").unlink()
    with pytest.raises(InputError, match="ldm3d encode CONFIG"):
        read_latents(tmp_path, ORIGIN)
