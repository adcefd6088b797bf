"""Training objectives: a loss for each sample, from clean latents, noise and quantiles of the time.

Legend: x clean latents, e noise, both (N, C, X, Y, Z); u quantiles in [0, 1), (N,), that determine the times. `predict`
is the network, (z, network time (N,)) -> prediction of the target, like z.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ldm3d.diffusion.denoiser import Estimator
from ldm3d.diffusion.preconditioning import Preconditioning
from ldm3d.diffusion.process import Process, quantile_of_time, time_of_ratio, times_from_quantiles
from ldm3d.diffusion.schedules import make_process
from ldm3d.diffusion.vdm import VDMSchedule, vdm_losses

Predict = Callable[[Tensor, Tensor], Tensor]
MARGIN = 1e-5  # of quantiles: 0 and 1 have no finite logit


class Objective(Protocol):
    """A loss, and the process of its network."""

    @property
    def process(self) -> Process:
        """In its present state, if it is learned."""
        ...

    @property
    def schedule(self) -> VDMSchedule | None:
        """The learned part of the process; None if the process is given."""
        ...

    def losses(
        self,
        predict: Predict,
        x: Tensor,
        e: Tensor,
        u: Tensor,
        estimate: Estimator | None = None,
        lacking: Tensor | None = None,
    ) -> Tensor:
        """(N,), like x.

        Args:
            predict, x, e, u: see above.
            estimate: where the network learns what it leaves of x.
            lacking: channels of each sample, (N, C), that are not known; they do not count. None: all count.
        """
        ...


class Denoising:
    """Weighted mean squared error of the predicted target, w(t) |net(z_t, t) - target|^2.

    Args:
        process: given.
        target: see `Process.target`.
        weight: see `Process.loss_weight`.
        times: "uniform" or "logit-normal", see `times_from_quantiles`.
        location, scale: of logit-normal times.
        scales: of the channels, see `Preconditioning`.
        until: times are drawn from this distribution below `until`; 1 for all of it.
        estimated: whether what an estimate leaves is learned, see `Preconditioning`.
    """

    schedule = None

    def __init__(
        self,
        process: Process,
        target: str,
        weight: str,
        times: str,
        location: float = 0.0,
        scale: float = 1.0,
        scales: Sequence[float] = (),
        until: float = 1.0,
        estimated: bool = False,
    ):
        self.process, self.weight = process, weight
        self.preconditioning = Preconditioning(process, target, scales, estimated)
        self.times, self.location, self.scale = times, location, scale
        self.share = quantile_of_time(times, until, location, scale)

    def losses(
        self,
        predict: Predict,
        x: Tensor,
        e: Tensor,
        u: Tensor,
        estimate: Estimator | None = None,
        lacking: Tensor | None = None,
    ) -> Tensor:
        u = (u * self.share).clamp(MARGIN, 1 - MARGIN)
        t = times_from_quantiles(self.times, u, self.location, self.scale)
        z = self.process.add_noise(x, e, t)
        g = estimate(z, t) if estimate else None
        error = predict(self.preconditioning.input(z, t, g), self.process.network_time(t))
        error = error - self.preconditioning.target_of(x, e, t, g)
        return self.preconditioning.loss(self.weight, t, error.square(), g, lacking)


class VDMObjective:
    """The bound's diffusion term in nats per dimension, with a schedule that is learned: `vdm_losses`.

    Args:
        schedule: gamma(t).
        target: "noise", "v" or "data".
    """

    def __init__(self, schedule: VDMSchedule, target: str):
        self.schedule, self.target = schedule, target

    @property
    def process(self) -> Process:
        return self.schedule.process()

    def losses(
        self,
        predict: Predict,
        x: Tensor,
        e: Tensor,
        u: Tensor,
        estimate: Estimator | None = None,
        lacking: Tensor | None = None,
    ) -> Tensor:
        assert lacking is None  # the config says so: the bound is of all elements of a latent
        return vdm_losses(self.schedule, predict, self.target, x, e, u.clamp(MARGIN, 1 - MARGIN))


def make_objective(
    process: Mapping[str, Any],
    target: str,
    loss_weight: str,
    time_sampling: Mapping[str, Any],
    scales: Sequence[float] = (),
    start: Mapping[str, Any] | None = None,
    estimated: bool = False,
) -> Objective:
    """What a U-Net is trained on, by the keys of the config; a vdm's gamma is still a straight line.

    Args:
        process, target, loss_weight, time_sampling, start: sections of the config.
        scales: of the channels.
        estimated: whether what an estimate leaves is learned.
    """
    if process["kind"] == "vdm":
        return VDMObjective(VDMSchedule(**{end: process[end] for end in ("gamma_min", "gamma_max") if end in process}), target)
    times, location, scale = (time_sampling[name] for name in ("kind", "location", "scale"))
    of_config = make_process(**process)
    until = time_of_ratio(of_config, start["until"]) if start else 1.0
    return Denoising(of_config, target, loss_weight, times, location, scale, scales, until, estimated)
