"""The diffusion processes, each a schedule alpha(t), sigma(t); legend in `ldm3d.diffusion.process`."""

import math
from abc import abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm3d.diffusion.process import Process, Time, as_double, of_type
from ldm3d.errors import InputError, choose

RATE_FLOOR = 1e-4  # derivatives are taken at t >= this: sigma' is infinite at t = 0 in variance-preserving processes
TIME_FLOOR = 1e-9  # stands for "just after t = 0" where the noise begins with a jump


@dataclass(frozen=True)
class Flow(Process):
    """The straight path, alpha = 1 - t, sigma = t (Lipman et al. 2023; Liu et al. 2023)."""

    kind: ClassVar[str] = "flow"

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)


class VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1, so `_log_alpha` (with its derivative) and its inverse `_t_of_log_alpha` say everything."""

    @abstractmethod
    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    def _t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        raise NotImplementedError  # by a process that overrides `_t_of_lam`

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha, _ = self._log_alpha(t)
        return log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.clamp(min=RATE_FLOOR)
        (alpha, sigma), (_, rate) = self._alpha_sigma(t), self._log_alpha(t)
        return alpha * rate, -(alpha**2) * rate / sigma

    def _t_of_lam(self, lam: Tensor) -> Tensor:  # alpha^2 = sigmoid(2 lambda)
        return self._t_of_log_alpha(torch.nn.functional.logsigmoid(2 * lam) / 2).clamp(0, 1)


@dataclass(frozen=True)
class Cosine(VariancePreserving):
    """alpha = cos(phi(t)) / cos(phi(0)), phi = (t + s) / (1 + s) pi / 2 (Nichol & Dhariwal 2021, eq. 17; s: offset).

    phi stops 0.0001 short of pi / 2, which concerns t > 0.9999 only: alpha(1) = 0.0001 and lambda(1) = -9.2 is finite.
    The DDPM of T steps made from this schedule has alpha((k + 1) / T) at step k, but for its own clipped last step.
    """

    kind: ClassVar[str] = "vp-cosine"
    offset: float = 0.008

    def __post_init__(self) -> None:
        if not 0 <= self.offset < 1:
            raise InputError(f"offset {self.offset} of the vp-cosine process must be in [0, 1); 0.008 is usual")

    def _phi(self, t: Tensor) -> Tensor:
        return ((t + self.offset) / (1 + self.offset) * (math.pi / 2)).clamp(max=math.pi / 2 - 1e-4)

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        phi, start = self._phi(t), self._phi(torch.zeros_like(t))
        return torch.log(phi.cos() / start.cos()), -phi.tan() * (math.pi / 2) / (1 + self.offset)

    def _t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        start = self._phi(torch.zeros_like(log_alpha))
        return (log_alpha.exp() * start.cos()).acos() / (math.pi / 2) * (1 + self.offset) - self.offset


@dataclass(frozen=True)
class LinearBetas(VariancePreserving):
    """The DDPM's chain with variances beta_start..beta_end (Ho et al. 2020, sec. 4), made continuous.

    Step k in 0..T-1 of the chain, the integer that MONAI's and diffusers' schedulers count with, is t = (k + 1) / T:
    alpha(t) is the chain's sqrt(alphabar_k) there, and t = 0 is the data itself, which has no step of its own. In
    between log(alpha) is linear.
    """

    kind: ClassVar[str] = "vp-linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    train_steps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1 or self.train_steps < 1:
            raise InputError(
                f"beta_start {self.beta_start}, beta_end {self.beta_end}, train_steps {self.train_steps} of the "
                f"{self.kind} process must satisfy 0 < beta_start <= beta_end < 1 and train_steps >= 1"
            )

    def t_of_step(self, step: int) -> float:
        """The time of the chain's step 0..T-1; the input of a network trained on the chain is t T - 1."""
        return (step + 1) / self.train_steps

    def _leading_times(self, steps: int) -> list[float]:
        if steps > self.train_steps:
            raise InputError(f"spacing leading in {steps} steps: the chain has {self.train_steps}; ask for fewer")
        stride = self.train_steps // steps
        return [*(self.t_of_step(stride * i) for i in reversed(range(steps))), 0.0]

    @property
    def lam_range(self) -> tuple[float, float]:  # not below step 0, where a network trained on the chain knows nothing
        first, last = super().lam_range
        return first, min(last, self.lam(self.t_of_step(0)))

    def _betas(self) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, self.train_steps, dtype=torch.float64)

    @cached_property
    def _table(self) -> "PiecewiseLinear":  # -log(alpha) at t = 0, 1 / T, ..., 1
        return PiecewiseLinear(-torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-self._betas()).cumsum(0) / 2]))

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        value, rate = self._table(t)
        return -value, -rate

    def _t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        return self._table.inverse(-log_alpha)


@dataclass(frozen=True)
class ScaledLinearBetas(LinearBetas):
    """As `LinearBetas`, with sqrt(beta) evenly spaced: latent diffusion's (Rombach et al. 2022; Pinaya et al. 2022)."""

    kind: ClassVar[str] = "vp-scaled-linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195

    def _betas(self) -> Tensor:
        return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class VDM(VariancePreserving):
    """The variational diffusion model's (Kingma et al. 2021): gamma(t) = -2 lambda(t), learned by `ldm3d.diffusion.vdm`.

    `gamma` is given at evenly spaced t and linear in between. As in the paper, the least noisy z is not yet the data: just
    after t = 0 the noise is that of gamma[0], and t = 0 is the data x itself.
    """

    kind: ClassVar[str] = "vdm"
    gamma: tuple[float, ...] = (-13.3, 10.0)  # the paper's first; the last leaves 0.7 % of the data

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", tuple(self.gamma))  # JSON has lists only
        if len(self.gamma) < 2 or not all(low < high for low, high in pairwise(self.gamma)):
            raise InputError(f"gamma {list(self.gamma)} of the vdm process must be two or more numbers that rise")

    def network_time(self, t: Time) -> Time:
        """(gamma(t) - gamma(0)) / (gamma(1) - gamma(0)): a noise level, which means the same under every schedule."""
        value, _ = self._table(as_double(t))
        return of_type(t, (value - self.gamma[0]) / (self.gamma[-1] - self.gamma[0]))

    @property
    def lam_range(self) -> tuple[float, float]:
        return -self.gamma[-1] / 2, -self.gamma[0] / 2

    @cached_property
    def _table(self) -> "PiecewiseLinear":
        return PiecewiseLinear(torch.tensor(self.gamma, dtype=torch.float64))

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        value, rate = self._table(t)  # alpha^2 = sigmoid(-gamma)
        log_alpha = torch.nn.functional.logsigmoid(-value) / 2
        return torch.where(t > 0, log_alpha, 0.0), -torch.sigmoid(value) * rate / 2

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.where(lam == math.inf, 0.0, self._table.inverse(-2 * lam).clamp(TIME_FLOOR, 1))


PROCESSES = {process.kind: process for process in (Flow, Cosine, LinearBetas, ScaledLinearBetas, VDM)}


def make_process(kind: str, **options: Any) -> Process:
    """The process of a kind ("flow", "vp-cosine", "vp-linear", "vp-scaled-linear", "vdm") with that kind's own options."""
    cls = PROCESSES[choose("process", kind, PROCESSES)]
    for option in options:
        choose(f"option of the {kind} process", option, [field.name for field in fields(cls)])
    return cls(**options)


class PiecewiseLinear:
    """A rising function of t in [0, 1], linear between its values (n,) at evenly spaced t.

    The values are copied once to each device and type, because the host waits for such a copy.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copies = values, {(values.device, values.dtype): values}

    def __reduce__(self) -> tuple:
        return PiecewiseLinear, (self._values,)  # the copies stay in this process

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(value, derivative) at t."""
        values, pieces = self._values_like(t), len(self._values) - 1
        position = t * pieces
        i = position.long().clamp(0, pieces - 1)
        return torch.lerp(values[i], values[i + 1], position - i), (values[i + 1] - values[i]) * pieces

    def inverse(self, value: Tensor) -> Tensor:
        """The t of a value; beyond the range, the first and last piece go on."""
        values, pieces = self._values_like(value), len(self._values) - 1
        i = torch.searchsorted(values, value.contiguous()).clamp(1, pieces)
        return (i - 1 + (value - values[i - 1]) / (values[i] - values[i - 1])) / pieces

    def _values_like(self, t: Tensor) -> Tensor:
        key = t.device, t.dtype
        if key not in self._copies:
            with torch.inference_mode(False):  # a copy made in that mode could not be used where gradients are
                self._copies[key] = self._values.to(t.device, t.dtype)
        return self._copies[key]
