"""Variational diffusion models, VDM (Kingma et al. 2021): the noise schedule is learned, and the loss is the bound's.

z = alpha x + sigma e with alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma); gamma(t) = -log SNR rises over t in [0, 1].

The bound on the likelihood depends on the two ends of gamma(t) alone (their eq. 18); what lies in between changes the
variance of its estimate from random times. So the ends are given and the inside is learned to make that variance small, while
the network minimises the bound. The network's input is gamma, not t, because t changes its meaning as the schedule is learned
(`Process.network_time`).

In a training step, with `losses` over the batch as the network's loss:

    losses = vdm_losses(schedule, predict, target, x, e, t)
    losses.mean().backward()
    schedule.learn_variance(losses.mean().detach())
    (step both optimisers)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm3d.diffusion.schedules import VDM
from ldm3d.errors import InputError, choose

# Not velocity: it is a rate in t, which does not follow from gamma, the network's input
LEARNABLE_TARGETS = ("noise", "v", "data")
FLOOR = 1e-3  # least slope of gamma, relative to a straight line's: float32 must tell knots apart
MEAN_DECAY = 0.9  # of the running mean of losses: old ones are outdated, since the network learns


class VDMSchedule(nn.Module):
    """gamma(t), learned: rising, linear between knots at evenly spaced t, its ends exact. It starts as a straight line.

    The buffer `mean_loss` is a running mean of the batches' losses.

    Args:
        gamma_min, gamma_max: gamma at t = 0 and 1.
        knots: how many, with the two ends.

    Raises:
        InputError: ends that do not rise, or fewer than two knots.
    """

    mean_loss: Tensor

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 10.0, knots: int = 65):
        super().__init__()
        if not gamma_min < gamma_max or knots < 2:
            raise InputError(
                f"gamma from {gamma_min} to {gamma_max} with {knots} knots: it must rise, over 2 knots or more; "
                "-13.3 to 10 with 65 is usual"
            )
        self.gamma_min, self.gamma_max = gamma_min, gamma_max
        # Softmax of these: each step's share of the rise beyond FLOOR
        self.logits = nn.Parameter(torch.zeros(knots - 1))
        self.register_buffer("mean_loss", torch.tensor(float("nan")))

    def knots(self) -> Tensor:
        """gamma at evenly spaced t, (knots,)."""
        rise = self.gamma_max - self.gamma_min
        share = (1 - FLOOR) * torch.softmax(self.logits, dim=0) + FLOOR / len(self.logits)
        inside = self.gamma_min + rise * share.cumsum(0)[:-1]
        ends = inside.new_tensor([self.gamma_min, self.gamma_max])
        return torch.cat([ends[:1], inside, ends[1:]])

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(gamma, d gamma / dt) at t (N,), of the parameters' type; gradients reach the schedule."""
        knots, position = self.knots(), t.to(self.logits.dtype) * len(self.logits)
        i = position.long().clamp(0, len(self.logits) - 1)
        rise = knots[i + 1] - knots[i]
        return knots[i] + (position - i) * rise, rise * len(self.logits)

    @torch.no_grad()
    def learn_variance(self, loss: Tensor) -> None:
        """Turn the gradient of a batch's loss L, in `logits.grad`, into that of L's variance (Kingma et al. 2021, app. I.2).

        As the mean of L does not depend on the schedule, that is E 2 (L - c) dL for any c; the running mean of L as c leaves
        the least noise. L is the mean over a full batch with its low-discrepancy times. Squares of single samples' losses are
        not used: they are minimal at the best schedule for independent times. With that one, for latents of 512 dimensions
        and 16 times, L varied three times as much as with the straight line.

        Args:
            loss: mean over the batch, all processes and accumulated parts, as the gradient has to be. If it is NaN or
                infinite, so is the gradient, and the running mean stays as it is.
        """
        mean = torch.where(self.mean_loss.isnan(), loss, self.mean_loss)
        if self.logits.grad is not None:
            self.logits.grad *= 2 * (loss - mean)
        self.mean_loss.copy_(torch.where(loss.isfinite(), torch.lerp(mean, loss.to(mean), 1 - MEAN_DECAY), self.mean_loss))

    def process(self) -> VDM:
        """The process for sampling, likelihood and a saved pipeline."""
        return VDM((self.gamma_min, *self.knots()[1:-1].tolist(), self.gamma_max))


def vdm_losses(
    schedule: VDMSchedule, predict: Callable[[Tensor, Tensor], Tensor], target: str, x: Tensor, e: Tensor, t: Tensor
) -> Tensor:
    """Each sample's diffusion loss, nats per dimension: gamma'(t) / 2 |e - e'|^2 (Kingma et al. 2021, eq. 17), |.|^2 a mean.

    Its mean over uniform t, e and data, with the prior and reconstruction terms of `ldm3d.diffusion.likelihood`, is the bound;
    those two depend on the ends of gamma alone and have no gradient. Gradients reach the schedule, too: through z, through the
    network's time and through gamma'. `VDMSchedule.learn_variance` makes them lower the variance.

    Args:
        schedule: gamma(t).
        predict: the network, (z, network time (N,)) -> prediction of the target.
        target: "noise", "v" or "data".
        x: clean latents (N, C, X, Y, Z).
        e: noise like x.
        t: (N,), uniform in [0, 1], best low-discrepancy over the batch as `ldm3d.data.batches` draws its quantiles.

    Returns:
        (N,), like x.

    Raises:
        InputError: another target.
    """
    choose("target for a learned schedule", target, LEARNABLE_TARGETS)
    gamma, rate = schedule(t)
    level = ((gamma - schedule.gamma_min) / (schedule.gamma_max - schedule.gamma_min)).to(x.dtype)
    gamma, rate = (value.to(x.dtype)[:, None, None, None, None] for value in (gamma, rate))
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    output = predict(alpha * x + sigma * e, level).to(x.dtype)
    # Errors in the target as errors in e: e' = (z - alpha x') / sigma; x' = alpha z - sigma v'
    wanted, factor = {
        "noise": (e, torch.ones_like(gamma)),
        "v": (alpha * e - sigma * x, alpha),
        "data": (x, alpha / sigma),
    }[target]
    return (rate / 2 * (factor * (output - wanted)) ** 2).flatten(1).mean(dim=1)
