"""A network as a denoiser: the one place where times are scaled, types cast and targets turned into clean latents.

Legend: x clean latent, z noisy latent, both (N, C, X, Y, Z); t time in [0, 1], 0 = data, 1 = noise. Conditions are the
other inputs of a network (`ldm3d.models.conditioning.Conditions`); here they are passed on.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm3d.diffusion.preconditioning import Estimated, Preconditioning
from ldm3d.diffusion.process import Process

Denoiser = Callable[[Tensor, float], Tensor]  # (z, t) -> the expected clean latent
BatchDenoiser = Callable[[Tensor, float | Tensor], Tensor]  # the same with a time for each row, too
Estimator = Callable[[Tensor, float | Tensor], Estimated]
TIMESTEPS = 1000  # what networks call the time t = 1, as MONAI's and diffusers' schedulers count


class ConditionalDenoiser(Protocol):
    """The expected clean latent of z at time t under conditions."""

    def __call__(self, z: Tensor, t: float, conditions: Any) -> Tensor: ...


class Estimate(Protocol):
    """A formula for the expected clean latent, whose remainder a network can learn (`ldm3d.start.GaussianStart`)."""

    def under(self, conditions: Any, process: Process) -> Estimator:
        """(z, t) -> what it says of x under these conditions; t a float or (N,)."""
        ...


class NetworkDenoiser:
    """E[x | z_t, conditions] by a network. Gradients pass, unless the caller disables them.

    Args:
        network: (z, timesteps (N,), conditions) -> prediction of `target`, like z. It may be wrapped for several
            processes, and computes in the type of its parameters.
        process: of the diffusion.
        target: what the network predicts, see `Process.target`.
        scales: of the channels, see `Preconditioning`.
        estimate: whose remainder the network has learned; None: it has learned x.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        target: str,
        scales: Sequence[float] = (),
        estimate: Estimate | None = None,
    ):
        self.network, self.process, self.estimate = network, process, estimate
        self.preconditioning = Preconditioning(process, target, scales, estimate is not None)

    def __call__(self, z: Tensor, t: float | Tensor, conditions: Any) -> Tensor:
        """The expected clean latent at time t, a float or (N,), like z, in float32."""
        g = None if self.estimate is None else self.estimate.under(conditions, self.process)(z, t)
        seen = self.preconditioning.input(z, t, g)
        output = call_network(self.network, seen, self.process.network_time(t), conditions)
        return self.preconditioning.to_data(output, z, t, g)

    def given(self, conditions: Any) -> Denoiser:
        """The denoiser (z, t) -> x under these conditions."""
        return lambda z, t: self(z, t, conditions)


def in_turn(first: Denoiser, then: Denoiser, until: float, process: Process) -> Denoiser:
    """`first` while sigma / alpha is above `until`, `then` from there on."""
    return lambda z, t: first(z, t) if process.sigma(t) > until * process.alpha(t) else then(z, t)


def call_network(network: nn.Module, z: Tensor, network_time: float | Tensor, conditions: Any) -> Tensor:
    """The prediction of a network for z, in float32; its times are in thousandths.

    Args:
        network: see `NetworkDenoiser`.
        z: (N, C, X, Y, Z).
        network_time: `Process.network_time`, a float or (N,).
        conditions: as the network takes them; they keep their type, because half precision would round covariates.
    """
    dtype = next(network.parameters()).dtype
    if isinstance(network_time, Tensor):
        timesteps = TIMESTEPS * network_time  # in their own type: bfloat16 would round 998.9 to 1000
    else:
        timesteps = torch.full((len(z),), TIMESTEPS * network_time, device=z.device)
    return network(z.to(dtype), timesteps, conditions).float()
