"""What networks are trained on: known answers for every process, target and weight."""

import pytest
import torch

from ldm3d.diffusion.objective import Denoising, VDMObjective
from ldm3d.diffusion.process import LOSS_WEIGHTS, TARGETS
from ldm3d.diffusion.schedules import PROCESSES, make_process
from ldm3d.diffusion.vdm import LEARNABLE_TARGETS, VDMSchedule

RNG = torch.Generator().manual_seed(0)
X, E = torch.randn(4, 2, 3, 3, 3, generator=RNG), torch.randn(4, 2, 3, 3, 3, generator=RNG)
U = torch.tensor([0.05, 0.3, 0.6, 0.95])


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_truth_has_no_loss_and_zero_has(kind, target):
    process = make_process(kind)
    for weight in LOSS_WEIGHTS:
        objective = Denoising(process, target, weight, "uniform")
        truth = process.target(target, X, E, U)
        assert (objective.losses(lambda z, time, truth=truth: truth, X, E, U) < 1e-10).all()
        assert (objective.losses(lambda z, time: torch.zeros_like(z), X, E, U) > 1e-6).all()


@pytest.mark.parametrize("target", LEARNABLE_TARGETS)
def test_the_bound_is_0_for_the_truth(target):
    objective = VDMObjective(VDMSchedule(), target)
    truth = objective.process.target(target, X, E, U)
    assert (objective.losses(lambda z, time: truth, X, E, U) < 1e-6).all()
    assert (objective.losses(lambda z, time: torch.zeros_like(z), X, E, U) > 1e-4).all()


def test_a_network_is_asked_at_the_times_of_the_quantiles():
    asked = []

    def predict(z, time):
        asked.append(time)
        return z

    Denoising(make_process("flow"), "v", "none", "logit-normal", location=1.0).losses(predict, X, E, U)
    torch.testing.assert_close(asked[0].logit(), 1 + torch.special.ndtri(U.double()).float())
    Denoising(make_process("flow"), "v", "none", "uniform").losses(predict, X, E, torch.tensor([0.0, 0.3, 0.6, 1.0]))
    torch.testing.assert_close(asked[1], torch.tensor([1e-5, 0.3, 0.6, 1 - 1e-5]))


def test_a_schedule_learns_and_a_given_process_does_not():
    learned = VDMObjective(VDMSchedule(), "noise")
    learned.losses(lambda z, time: torch.zeros_like(z), X, E, U).mean().backward()
    assert learned.schedule.logits.grad.abs().sum() > 0
    assert Denoising(make_process("flow"), "v", "none", "uniform").schedule is None
