"""What every diffusion process can do: add noise, turn predictions into clean latents, weigh losses, give sampling times.

The processes themselves are in `ldm3d.diffusion.schedules`.

z_t = alpha(t) x + sigma(t) e with e ~ N(0, 1); time t in [0, 1], 0 = data, 1 = noise.

Legend: x clean latent, e noise, z noisy latent, all (N, C, X, Y, Z); t a float or a floating-point tensor (N,);
lambda = log(alpha / sigma), half the log signal-to-noise ratio, falls from +inf at t = 0; SNR = (alpha / sigma)^2.

Schedules are worked out in float64 whatever the type of t: 1 - alpha^2 near t = 0 loses every digit in float32.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor

from ldm3d.errors import InputError, choose

TARGETS = ("noise", "v", "data", "velocity")
TIME_SAMPLING = ("uniform", "logit-normal")
LOSS_WEIGHTS = ("none", "min-snr")
SPACINGS = ("uniform", "quadratic", "share", "lambda", "karras")
LEADING = "leading"  # a spacing of DDPM chains alone

ALPHA_FLOOR = 1e-3  # below it x cannot be recovered from a noise prediction: errors would grow more than 1000-fold
KARRAS_RHO = 7.0


Time = TypeVar("Time", bound=float | Tensor)


@dataclass(frozen=True)
class Process(ABC):
    """Base of all processes: `_alpha_sigma`, `_rates` (their derivatives) and `_t_of_lam` make one.

    These work on float64 tensors of any shape. Public methods take t as a float (and return a float) or as a
    floating-point tensor (and return its type); with latents, t of shape (N,) has a time for each sample.
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
        return of_type(t, self._alpha_sigma(as_double(t))[0])

    def sigma(self, t: Time) -> Time:
        """Standard deviation of the noise at t; 0 at t = 0."""
        return of_type(t, self._alpha_sigma(as_double(t))[1])

    def lam(self, t: Time) -> Time:
        """log(alpha / sigma): +inf at t = 0, and -inf at t = 1 where alpha(1) = 0."""
        alpha, sigma = self._alpha_sigma(as_double(t))
        return of_type(t, alpha.log() - sigma.log())

    def t_of_lam(self, lam: Time) -> Time:
        """Inverse of `lam`; a value outside its range gives the nearest time."""
        return of_type(lam, self._t_of_lam(as_double(lam)))

    def lam_rate(self, t: Time) -> Time:
        """d lambda / dt, negative."""
        (alpha, sigma), (alpha_rate, sigma_rate) = self._alpha_sigma(as_double(t)), self._rates(as_double(t))
        return of_type(t, alpha_rate / alpha - sigma_rate / sigma)

    def network_time(self, t: Time) -> Time:
        """The network's time input for t, in [0, 1]: t itself, where the schedule never changes."""
        return t

    @property
    def lam_range(self) -> tuple[float, float]:
        """Range of "lambda" and "karras" sampling times; what lies beyond +-5 changes a latent by less than 1 % of its std."""
        return max(self.lam(1.0), -5.0), 5.0

    def add_noise(self, x: Tensor, e: Tensor, t: float | Tensor) -> Tensor:
        """z_t = alpha x + sigma e."""
        alpha, sigma = self._alpha_sigma(as_double(t))
        return _per_sample(alpha, x) * x + _per_sample(sigma, x) * e

    def target(self, kind: str, x: Tensor, e: Tensor, t: float | Tensor) -> Tensor:
        """What the network has to predict at z_t.

        "noise": e (Ho et al. 2020). "v": alpha e - sigma x (Salimans & Ho 2022, appendix D). "data": x. "velocity":
        dz/dt = alpha' x + sigma' e, which is e - x for the flow process (Lipman et al. 2023).
        """
        choose("target", kind, TARGETS)
        if kind in ("noise", "data"):
            return e if kind == "noise" else x
        alpha, sigma = self._alpha_sigma(as_double(t))
        of_x, of_e = (-sigma, alpha) if kind == "v" else self._rates(as_double(t))
        return _per_sample(of_x, x) * x + _per_sample(of_e, x) * e

    def to_data(self, kind: str, output: Tensor, z: Tensor, t: float | Tensor) -> Tensor:
        """The expected clean latent, from the network's output for z at time t.

        Solves z = alpha x + sigma e and the target's definition for x. With "noise" that divides by alpha; where
        alpha < 0.001 the output cannot know x and 0, the mean of normalised latents, is returned. Always finite.
        """
        of_z, of_output = self._data_coefficients(kind, as_double(t))
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
        time = as_double(t)
        if kind == "none":
            return of_type(t, torch.ones_like(time))
        alpha, sigma = self._alpha_sigma(time)
        snr = (alpha / sigma) ** 2  # infinite at t = 0, which the minimum makes finite
        if target == "noise":  # 0 / 0 at alpha = 0 when written with b
            return of_type(t, (gamma / snr).clamp(max=1.0))
        return of_type(t, snr.clamp(max=gamma) * self._data_coefficients(target, time)[1] ** 2)

    def times(self, steps: int, spacing: str = "uniform") -> list[float]:
        """Sampling times: steps + 1 of them, decreasing, from exactly 1 (but for "leading") to exactly 0.

        "uniform": even in t (for the DDPM processes the spacing known as "trailing"). "quadratic": even in sqrt(t). "share":
        even in sigma / (alpha + sigma), which the flow process is by itself. "lambda": even in lambda. "karras": even in
        (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5). The latter two set times[:-1] over `lam_range`, then move the
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
            f"spacing leading counts the steps of a DDPM's chain, and the {self.kind} process has none; use uniform, or a "
            "vp-linear or vp-scaled-linear process"
        )

    def to_dict(self) -> dict:
        """Plain JSON; `make_process(**process.to_dict())` is the same process."""
        return {"kind": self.kind, **asdict(self)}


def times_from_quantiles(kind: str, u: Tensor, location: float = 0.0, scale: float = 1.0) -> Tensor:
    """Training times from quantiles u in (0, 1), which hold all randomness; shape and type of u.

    "uniform": t = u. "logit-normal": logit(t) ~ N(location, scale^2) (Esser et al. 2024, eq. 19); a positive location
    means more noise.
    """
    choose("time sampling", kind, TIME_SAMPLING)
    return u if kind == "uniform" else of_type(u, torch.sigmoid(location + scale * torch.special.ndtri(as_double(u))))


def quantile_of_time(kind: str, t: float, location: float = 0.0, scale: float = 1.0) -> float:
    """The share of the training times that are below t, in [0, 1]: the inverse of `times_from_quantiles`."""
    choose("time sampling", kind, TIME_SAMPLING)
    if kind == "uniform" or t >= 1:
        return float(t)
    return torch.special.ndtr((as_double(t).logit() - location) / scale).item()


def time_of_ratio(process: Process, ratio: float) -> float:
    """The time at which sigma / alpha is `ratio` (> 0)."""
    return process.t_of_lam(-math.log(ratio))


def as_double(t: float | Tensor) -> Tensor:
    """t as a float64 tensor."""
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64)
    if not t.is_floating_point():
        raise InputError(f"times must be floats in [0, 1], got {t.dtype}; for integer steps see `t_of_step`")
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)  # Apple's GPUs have no float64


def of_type(t: Time, value: Tensor) -> Time:
    """`value` with the type of t; a float where t is one."""
    return cast(Time, value.to(t.dtype) if isinstance(t, Tensor) else value.item())


def _per_sample(coefficient: Tensor, z: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1, 1) like z; a scalar stays as it is and takes z's type and device by itself."""
    return coefficient if coefficient.ndim == 0 else coefficient.to(z).reshape(-1, *[1] * (z.ndim - 1))
