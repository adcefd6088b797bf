"""Diffusion processes: how data turns into noise, and what a network may predict on the way back.

z_t = alpha(t) x + sigma(t) e with e ~ N(0, 1); time t in [0, 1], 0 = data, 1 = noise.

Legend: x clean latent, e noise, z noisy latent, all (N, C, X, Y, Z); t a float or a floating-point tensor (N,);
lambda = log(alpha / sigma), half the log signal-to-noise ratio, falls from +inf at t = 0; SNR = (alpha / sigma)^2.

Schedules are worked out in float64 whatever the type of t: 1 - alpha^2 near t = 0 loses every digit in float32.
"""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from ldm3d.errors import InputError

TARGETS = ("noise", "v", "data", "velocity")
TIME_SAMPLING = ("uniform", "logit-normal")
LOSS_WEIGHTS = ("none", "min-snr")
SPACINGS = ("uniform", "quadratic", "share", "lambda", "karras")
LEADING = "leading"  # a spacing of DDPM chains alone

ALPHA_FLOOR = 1e-3  # below it a noise prediction says nothing about x: its errors would be multiplied by > 1000
RATE_FLOOR = 1e-4  # derivatives are taken at t >= this: sigma' is infinite at t = 0 in variance-preserving processes
TIME_FLOOR = 1e-9  # stands for "just after t = 0" where the noise begins with a jump
KARRAS_RHO = 7.0


Time = TypeVar("Time", bound=float | Tensor)


@dataclass(frozen=True)
class Process(ABC):
    """Base of all processes: `_alpha_sigma`, `_rates` (their derivatives) and `_t_of_lam` make one.

    These work on float64 tensors of any shape. Public methods take t as a float (and return a float) or as a
    floating-point tensor (and return its type); where latents are involved, t of shape (N,) meets the batch axis.
    """

    kind: ClassVar[str]

    @abstractmethod
    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _t_of_lam(self, lam: Tensor) -> Tensor: ...

    def alpha(self, t: Time) -> Time:
        """How much of the data is left at t; 1 at t = 0."""
        return _like(t, self._alpha_sigma(_double(t))[0])

    def sigma(self, t: Time) -> Time:
        """Standard deviation of the noise at t; 0 at t = 0."""
        return _like(t, self._alpha_sigma(_double(t))[1])

    def lam(self, t: Time) -> Time:
        """log(alpha / sigma): +inf at t = 0, and -inf at t = 1 where alpha(1) = 0."""
        alpha, sigma = self._alpha_sigma(_double(t))
        return _like(t, alpha.log() - sigma.log())

    def t_of_lam(self, lam: Time) -> Time:
        """Inverse of `lam`; a value outside its range gives the nearest time."""
        return _like(lam, self._t_of_lam(_double(lam)))

    def lam_rate(self, t: Time) -> Time:
        """d lambda / dt, negative."""
        (alpha, sigma), (alpha_rate, sigma_rate) = self._alpha_sigma(_double(t)), self._rates(_double(t))
        return _like(t, alpha_rate / alpha - sigma_rate / sigma)

    def network_time(self, t: Time) -> Time:
        """What a network is told of the time t, in [0, 1]: t itself, where the schedule never changes."""
        return t

    @property
    def lam_range(self) -> tuple[float, float]:
        """Where "lambda" and "karras" sampling times lie; beyond +-5 less than 1 % of a latent's std is at stake."""
        return max(self.lam(1.0), -5.0), 5.0

    def add_noise(self, x: Tensor, e: Tensor, t: float | Tensor) -> Tensor:
        """z_t = alpha x + sigma e."""
        alpha, sigma = self._alpha_sigma(_double(t))
        return _per_sample(alpha, x) * x + _per_sample(sigma, x) * e

    def target(self, kind: str, x: Tensor, e: Tensor, t: float | Tensor) -> Tensor:
        """What the network has to predict at z_t.

        "noise": e (Ho et al. 2020). "v": alpha e - sigma x (Salimans & Ho 2022, appendix D). "data": x. "velocity":
        dz/dt = alpha' x + sigma' e, which is e - x for the flow process (Lipman et al. 2023).
        """
        choose("target", kind, TARGETS)
        if kind in ("noise", "data"):
            return e if kind == "noise" else x
        alpha, sigma = self._alpha_sigma(_double(t))
        of_x, of_e = (-sigma, alpha) if kind == "v" else self._rates(_double(t))
        return _per_sample(of_x, x) * x + _per_sample(of_e, x) * e

    def to_data(self, kind: str, output: Tensor, z: Tensor, t: float | Tensor) -> Tensor:
        """The expected clean latent, from the network's output for z at time t.

        Solves z = alpha x + sigma e and the target's definition for x. With "noise" that divides by alpha; where
        alpha < 0.001 the output cannot know x and 0, the mean of normalised latents, is returned. Always finite.
        """
        of_z, of_output = self._data_coefficients(kind, _double(t))
        return _per_sample(of_z, z) * z + _per_sample(of_output, z) * output

    def _data_coefficients(self, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of x = a z + b output."""
        choose("target", kind, TARGETS)
        alpha, sigma = self._alpha_sigma(t)
        if kind == "data":
            return torch.zeros_like(t), torch.ones_like(t)
        if kind == "noise":
            inverse = torch.where(alpha < ALPHA_FLOOR, 0.0, 1 / alpha)
            return inverse, -sigma * inverse
        of_x, of_e = (-sigma, alpha) if kind == "v" else self._rates(t)
        determinant = of_e * alpha - of_x * sigma  # > 0: alpha^2 + sigma^2 for v, 1 for the flow's velocity
        return of_e / determinant, -sigma / determinant

    def loss_weight(self, kind: str, target: str, t: Time, gamma: float = 5.0) -> Time:
        """What a sample's mean squared error in `target` is multiplied by; type and shape of t.

        "none": 1. "min-snr" (Hang et al. 2023): the loss counts as min(SNR, gamma) times the loss in x. As
        x = a z + b output with z given, |x - x'|^2 = b^2 |output - output'|^2: the weight is min(SNR, gamma) b^2.

            data      b = 1               min(SNR, gamma)
            noise     b = -sigma / alpha  min(SNR, gamma) / SNR
            v         b = -sigma          min(SNR, gamma) / (SNR + 1)      where alpha^2 + sigma^2 = 1
            velocity  b = -t              min((1 - t)^2, gamma t^2)        for flow, where x = z - t (e - x)
        """
        choose("loss weight", kind, LOSS_WEIGHTS)
        time = _double(t)
        if kind == "none":
            return _like(t, torch.ones_like(time))
        alpha, sigma = self._alpha_sigma(time)
        snr = (alpha / sigma) ** 2  # infinite at t = 0, which the minimum makes finite
        if target == "noise":  # 0 / 0 at alpha = 0 when written with b
            return _like(t, (gamma / snr).clamp(max=1.0))
        return _like(t, snr.clamp(max=gamma) * self._data_coefficients(target, time)[1] ** 2)

    def times(self, steps: int, spacing: str = "uniform") -> list[float]:
        """Sampling times: steps + 1 of them, decreasing, from exactly 1 (but for "leading") to exactly 0.

        "uniform": even in t (for the DDPM processes the spacing known as "trailing"). "quadratic": even in sqrt(t). "share":
        even in sigma / (alpha + sigma), which the flow process is by itself. "lambda": even in lambda. "karras": even in
        (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5). The latter two place times[:-1] over `lam_range`, then move the
        first one to exactly 1, where pure noise belongs.

        "leading": steps 0, r, 2 r, ... of a DDPM's chain of T, r = T // steps, from the last of them down to the data: how
        DDIM counted in MONAI's generative models (980, 960, ..., 0 for 50 of 1000). Noise is what it starts from, although
        a little of the data is left at its first time. For vp-linear and vp-scaled-linear alone.
        """
        choose("spacing", spacing, (*SPACINGS, LEADING))
        if steps < 1:
            raise InputError(f"sampling in {steps} steps is impossible; ask for 1 or more")
        if spacing in ("uniform", "quadratic"):
            return [((steps - i) / steps) ** (1 if spacing == "uniform" else 2) for i in range(steps + 1)]
        if spacing == "share":
            share = torch.linspace(1 / (1 + math.exp(self.lam(1.0))), 0, steps + 1, dtype=torch.float64)[1:-1]
            return [1.0, *self._t_of_lam(-share.logit()).tolist(), 0.0]
        if spacing == LEADING:
            return self._leading_times(steps)
        even = torch.linspace(0, 1, steps, dtype=torch.float64)
        first, last = self.lam_range
        if spacing == "lambda":
            lam = first + even * (last - first)
        else:
            high, low = math.exp(-first / KARRAS_RHO), math.exp(-last / KARRAS_RHO)
            lam = -KARRAS_RHO * torch.log(high + even * (low - high))
        return [1.0, *self._t_of_lam(lam)[1:].tolist(), 0.0]

    def _leading_times(self, steps: int) -> list[float]:
        raise InputError(
            f"spacing leading counts the steps of a DDPM's chain, which the {self.kind} process has not; use uniform, or a "
            "vp-linear or vp-scaled-linear process"
        )

    def to_dict(self) -> dict:
        """Plain JSON; `make_process(**process.to_dict())` is the same process."""
        return {"kind": self.kind, **asdict(self)}


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
        raise NotImplementedError

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
class Linear(VariancePreserving):
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
        """The time of the chain's step 0..T-1; a network trained on the chain wants t T - 1 back."""
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
    def _table(self) -> "_Table":  # log(alpha) at t = 0, 1 / T, ..., 1
        return _Table(torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-self._betas()).cumsum(0) / 2]))

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table, position = self._table.beside(t), t * self.train_steps
        i = position.long().clamp(0, self.train_steps - 1)
        return torch.lerp(table[i], table[i + 1], position - i), (table[i + 1] - table[i]) * self.train_steps

    def _t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        table = self._table.beside(log_alpha)
        i = torch.searchsorted(-table, -log_alpha.contiguous()).clamp(1, self.train_steps)
        return (i - 1 + (log_alpha - table[i - 1]) / (table[i] - table[i - 1])) / self.train_steps


@dataclass(frozen=True)
class ScaledLinear(Linear):
    """As `Linear`, with sqrt(beta) evenly spaced: latent diffusion's (Rombach et al. 2022; Pinaya et al. 2022)."""

    kind: ClassVar[str] = "vp-scaled-linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195

    def _betas(self) -> Tensor:
        return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class Variational(VariancePreserving):
    """The variational diffusion model's (Kingma et al. 2021): gamma(t) = -2 lambda(t) rises as it was learned to.

    `gamma` is given at evenly spaced t and linear in between, so that a schedule that was learned (`ldm3d.diffusion.vdm`)
    is these numbers and nothing else. As in the paper, the least noisy z is not yet the data: just after t = 0 the noise
    is that of gamma[0], and t = 0 is the data x itself.
    """

    kind: ClassVar[str] = "vdm"
    gamma: tuple[float, ...] = (-13.3, 10.0)  # the paper's first; the last leaves 0.7 % of the data

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", tuple(self.gamma))  # JSON has lists only
        if len(self.gamma) < 2 or not all(low < high for low, high in pairwise(self.gamma)):
            raise InputError(f"gamma {list(self.gamma)} of the vdm process must be two or more numbers that rise")

    def network_time(self, t: Time) -> Time:
        """(gamma(t) - gamma(0)) / (gamma(1) - gamma(0)): a noise level, which means the same under every schedule."""
        value, _ = self._gamma(_double(t))
        return _like(t, (value - self.gamma[0]) / (self.gamma[-1] - self.gamma[0]))

    @property
    def lam_range(self) -> tuple[float, float]:
        return -self.gamma[-1] / 2, -self.gamma[0] / 2

    @cached_property
    def _table(self) -> "_Table":
        return _Table(torch.tensor(self.gamma, dtype=torch.float64))

    def _gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(gamma, its derivative) at t > 0, and their limits at t = 0."""
        table = self._table.beside(t)
        position = t * (len(table) - 1)
        i = position.long().clamp(0, len(table) - 2)
        return torch.lerp(table[i], table[i + 1], position - i), (table[i + 1] - table[i]) * (len(table) - 1)

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        value, rate = self._gamma(t)  # alpha^2 = sigmoid(-gamma)
        log_alpha = torch.nn.functional.logsigmoid(-value) / 2
        return torch.where(t > 0, log_alpha, 0.0), -torch.sigmoid(value) * rate / 2

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        table = self._table.beside(lam)
        i = torch.searchsorted(table, -2 * lam.contiguous()).clamp(1, len(table) - 1)
        t = (i - 1 + (-2 * lam - table[i - 1]) / (table[i] - table[i - 1])) / (len(table) - 1)
        return torch.where(lam == math.inf, 0.0, t.clamp(TIME_FLOOR, 1))


_ALL: tuple[type[Process], ...] = (Flow, Cosine, Linear, ScaledLinear, Variational)
PROCESSES = {process.kind: process for process in _ALL}


def make_process(kind: str, **options: Any) -> Process:
    """The process of a kind ("flow", "vp-cosine", "vp-linear", "vp-scaled-linear", "vdm") with that kind's own options."""
    cls = PROCESSES[choose("process", kind, PROCESSES)]
    for option in options:
        choose(f"option of the {kind} process", option, [field.name for field in fields(cls)])
    return cls(**options)


def times_from_quantiles(kind: str, u: Tensor, location: float = 0.0, scale: float = 1.0) -> Tensor:
    """Training times from quantiles u in (0, 1): whoever draws u decides about all randomness; shape and type of u.

    "uniform": t = u. "logit-normal": logit(t) ~ N(location, scale^2) (Esser et al. 2024, eq. 19); a positive location
    means more noise.
    """
    choose("time sampling", kind, TIME_SAMPLING)
    return u if kind == "uniform" else _like(u, torch.sigmoid(location + scale * torch.special.ndtri(_double(u))))


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is known, else an InputError that gives the nearest alternative and all others."""
    known = list(known)
    if name in known:
        return name
    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise InputError(f"unknown {what} {name!r}; {hint}known: {', '.join(known) or 'none'}")


class _Table:
    """Numbers (n,) that are copied once to each device and type that asks for them: the host waits for such a copy."""

    def __init__(self, values: Tensor):
        self._copies = {(values.device, values.dtype): values}
        self._values = values

    def __reduce__(self) -> tuple[Any, ...]:
        return _Table, (self._values,)  # the copies are this process's

    def beside(self, t: Tensor) -> Tensor:
        place = t.device, t.dtype
        if place not in self._copies:
            with torch.inference_mode(False):  # a copy made there could not be used where gradients are
                self._copies[place] = self._values.to(t.device, t.dtype)
        return self._copies[place]


def _double(t: float | Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64)
    if not t.is_floating_point():
        raise InputError(f"times must be floats in [0, 1], got {t.dtype}; for integer steps see `t_of_step`")
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)  # Apple's GPUs have no float64


def _like(t: Time, value: Tensor) -> Time:
    return cast(Time, value.to(t.dtype) if isinstance(t, Tensor) else value.item())


def _per_sample(coefficient: Tensor, z: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1, 1) like z; a scalar stays as it is and takes z's type and device by itself."""
    return coefficient if coefficient.ndim == 0 else coefficient.to(z).reshape(-1, *[1] * (z.ndim - 1))
