"""Guidance: identities that hold for any network."""

import pytest
import torch

from ldm3d.diffusion.guidance import autoguided, classifier_free, rescaled
from ldm3d.diffusion.process import TARGETS
from ldm3d.diffusion.schedules import PROCESSES, make_process
from ldm3d.errors import InputError
from ldm3d.models.conditioning import Conditions

Z = torch.randn(3, 2, 4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ASKED = Conditions(torch.arange(6, dtype=torch.float64).reshape(3, 1, 2) + 1)
OPEN = ASKED.open()


class Network:
    """x = tanh(z) (1 + its own context), in the first channel twice: a mix-up of anything shows. Keeps batch sizes."""

    def __init__(self):
        self.batches = []

    def __call__(self, z, t, conditions):
        self.batches.append(len(z))
        strength = conditions.covariates.sum((1, 2))[:, None] * torch.tensor([2.0, 1.0])  # (N, C)
        return torch.tanh(z) * (1 + strength)[..., None, None, None] + t


def test_mixture_in_one_batched_call():
    network = Network()
    x = classifier_free(network, ASKED, OPEN, 2.5)(Z, 0.3)
    assert network.batches == [6]
    with_condition, without = network(Z, 0.3, ASKED), network(Z, 0.3, OPEN)
    torch.testing.assert_close(x, without + 2.5 * (with_condition - without))


@pytest.mark.parametrize("scale, conditions", [(1.0, ASKED), (0.0, OPEN)])
def test_scales_that_need_one_side_ask_for_one(scale, conditions):
    network = Network()
    x = classifier_free(network, ASKED, OPEN, scale, rescale=0.7)(Z, 0.3)
    assert network.batches == [3]
    assert torch.equal(x, network(Z, 0.3, conditions))


def test_outside_the_interval_the_condition_alone_counts():
    network = Network()
    guided = classifier_free(network, ASKED, OPEN, 3.0, interval=(0.2, 0.8))
    for t in (0.1, 0.9):
        assert torch.equal(guided(Z, t), network(Z, t, ASKED))
    network.batches.clear()
    for t in (0.2, 0.5, 0.8):
        guided(Z, t)
    assert network.batches == [6, 6, 6]
    everywhere = classifier_free(network, ASKED, OPEN, 3.0)
    network.batches.clear()
    everywhere(Z, 1.0), everywhere(Z, 0.0)
    assert network.batches == [6, 6]


def test_rescale_brings_back_each_samples_standard_deviation():
    network = Network()
    x_c = network(Z, 0.3, ASKED)
    plain, half, full = (classifier_free(network, ASKED, OPEN, 4.0, rescale=r)(Z, 0.3) for r in (0, 0.5, 1))

    def std(x):
        return x.flatten(1).std(1)

    assert (std(plain) > 1.1 * std(x_c)).all()
    torch.testing.assert_close(std(full), std(x_c))
    torch.testing.assert_close(half, (plain + full) / 2)
    factor = (full / plain).flatten(1)  # one for all channels
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))
    assert rescaled(torch.ones_like(Z), Z, 1.0).isfinite().all()  # a constant prediction has no deviation to rescale


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("target", TARGETS)
def test_guiding_data_is_guiding_the_networks_output(kind, target):
    process, network, t = make_process(kind), Network(), 0.4

    def denoise(z, t, conditions):
        return process.to_data(target, network(z, t, conditions), z, t)

    x = classifier_free(denoise, ASKED, OPEN, 3.0)(Z, t)
    with_condition, without = network(Z, t, ASKED), network(Z, t, OPEN)
    torch.testing.assert_close(x, process.to_data(target, without + 3 * (with_condition - without), Z, t))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interval": (0.8, 0.2)}, "guidance interval"),
        ({"interval": (0.0, 1000)}, "guidance interval"),
        ({"rescale": 7.5}, "rescale 7.5"),
    ],
)
def test_errors_name_the_way_out(options, message):
    with pytest.raises(InputError, match=message):
        classifier_free(Network(), **{"conditions": ASKED, "null": OPEN, "scale": 2.0, **options})


def test_autoguidance_leads_away_from_the_worse_model():
    def good(z, t):
        return z + 1

    def bad(z, t):
        return z - 2

    torch.testing.assert_close(autoguided(good, bad, 2.0)(Z, 0.5), Z + 4)
    torch.testing.assert_close(autoguided(good, bad, 1.0)(Z, 0.5), Z + 1)
    torch.testing.assert_close(autoguided(good, bad, 2.0, (0.6, 1.0))(Z, 0.5), Z + 1)
