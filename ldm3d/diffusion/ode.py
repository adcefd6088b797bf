"""What samplers share: the sequence of steps, the forward step, and the variables of the probability-flow ODE.

Legend: x clean latent, z noisy latent, both (N, C, X, Y, Z); t -> s one step; z_t = alpha x + sigma e.

Deterministic samplers follow the probability-flow ODE in either direction: t > s towards the data, t < s towards noise.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.process import Process
from ldm3d.errors import InputError

Noise = Callable[[int], Tensor]
Progress = Callable[[int], None]


def walk(times: Sequence[float], progress: Progress | None, rising: bool = False) -> Iterator[tuple[int, float, float]]:
    """(k, t, s) of every step; reports each one once the caller is done with it.

    Args:
        times: two or more that fall; or, where `rising` permits it, that rise.
        progress: called after each step with the number of steps done.
        rising: whether the sampler also follows the ODE towards noise.
    """
    falls, rises = (all(sign * (t - s) > 0 for t, s in pairwise(times)) for sign in (1, -1))
    if len(times) < 2 or not (falls or (rising and rises)):
        other = " or increase" if rising else " (samplers that draw no noise go towards noise, too)"
        raise InputError(f"sampling times must decrease{other} and be two or more, got {list(times)}; see Process.times")
    for k, (t, s) in enumerate(pairwise(times)):
        yield k, t, s
        if progress:
            progress(k + 1)


def forward_step(process: Process, t: float, s: float) -> tuple[float, float]:
    """(a, v) of the forward step q(z_t | z_s) = N(a z_s, v); 1 - v / sigma_t^2 is the noise that z_s already had."""
    ratio = process.alpha(t) / process.alpha(s)
    return ratio, max(process.sigma(t) ** 2 - (ratio * process.sigma(s)) ** 2, 0.0)


def ode_scale(process: Process, t: float) -> float:
    """alpha + sigma: what z is divided by to become the y of `ldm3d.diffusion.samplers.sample_euler`."""
    return process.alpha(t) + process.sigma(t)


def ode_share(process: Process, t: float) -> float:
    """u = sigma / (alpha + sigma), the ODE's time."""
    return process.sigma(t) / ode_scale(process, t)


def ode_slope(denoise: Denoiser, y: Tensor, t: float, process: Process) -> Tensor:
    """dy/du = e - x at t. At t = 0 x is z itself, and e = -sigma grad log p(z) has the limit 0."""
    if t == 0:
        return -y
    return (y - denoise(y * ode_scale(process, t), t)) / ode_share(process, t)


def heun_step(denoise: Denoiser, z: Tensor, t: float, s: float, process: Process, correct: bool = True) -> Tensor:
    """z_s on the probability-flow ODE through z_t: Heun's step, or Euler's, as to t = 0, where the slope has no value."""
    y, step = z / ode_scale(process, t), ode_share(process, s) - ode_share(process, t)
    slope = ode_slope(denoise, y, t, process)
    if correct and s > 0:
        slope = (slope + ode_slope(denoise, y + step * slope, s, process)) / 2
    return (y + step * slope) * ode_scale(process, s)


def ddim_step(x: Tensor, z: Tensor, t: float, s: float, process: Process) -> Tensor:
    """z_s = alpha_s x + sigma_s e, where x is the denoised z_t and e the noise that is left of it (0 at t = 0)."""
    sigma = process.sigma(t)
    kept = process.alpha(s) * x
    return kept if sigma == 0 else kept + process.sigma(s) / sigma * (z - process.alpha(t) * x)
