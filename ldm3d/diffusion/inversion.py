"""Inversion: from a clean latent to the noise from which it would be sampled."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.ode import Progress, heun_step, ode_scale
from ldm3d.diffusion.process import Process
from ldm3d.diffusion.samplers import follow, recommended_spacing
from ldm3d.errors import choose


def invert(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    steps: int,
    *,
    name: str = "heun",
    until: float = 1.0,
    spacing: str | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Follow the probability-flow ODE from data towards noise (Song et al. 2021, sec. 4.3).

    The same sampler with the same times leads back to x, up to an error that falls with `steps` by the sampler's order.

    Args:
        denoise: expected clean latent of z at time t, under the conditions that x was generated or measured with; unguided.
        x: clean latents (N, C, X, Y, Z).
        process: of the diffusion.
        steps: from data to pure noise.
        name: of a sampler that draws no noise.
        until: stop at the sampling time nearest to this one; 1 is pure noise.
        spacing: of the times, see `Process.times`; None for the sampler's own.
        progress: called after each step with the number of steps done.

    Returns:
        The noisy latent at that time, like x.
    """
    times = process.times(steps, spacing or recommended_spacing(name, process))
    first = min(range(steps), key=lambda k: abs(times[k] - until))
    return follow(name, denoise, x, times[first:][::-1], process, progress=progress)


LEAST_WEIGHT = 0.02
ONE_STEP = {"euler": False, "heun": True}  # samplers that `invert_steps` inverts: whether Heun corrects Euler's step


def invert_steps(
    denoise: Denoiser,
    x: Tensor,
    process: Process,
    times: Sequence[float],
    *,
    name: str = "heun",
    tolerance: float = 1e-5,
    corrections: int = 30,
    progress: Progress | None = None,
) -> Tensor:
    """The noise from which a sampler's own steps lead to x: not the ODE's, so that few steps lead back exactly.

    A step z_t -> z_s = step(z_t) is inverted by fixed-point iteration (Pan et al. 2023, AIDI; Garibi et al. 2024, ReNoise),
    in the variable y = z / (alpha + sigma) of `ldm3d.diffusion.ode`, where steps are nearly the identity:

        y_t <- y_t + w (y_s - step(y_t)),   from y_t, the step of the same sampler towards noise,

    each sample by itself. w is 1, and halves for a sample whose error grows; it is left as it is once w is tiny, because the
    network then answers in too coarse numbers (bfloat16).

    Args:
        denoise, process, progress: see `invert`.
        x: latents at times[-1], (N, C, X, Y, Z).
        times: those of the sampler, decreasing, to 0 or any other.
        name: of the sampler, a key of ONE_STEP.
        tolerance: of a step's error, relative to the standard deviation of x; root mean square.
        corrections: of a step, at most; each costs a step.

    Returns:
        The latent at times[0], like x.
    """
    correct = ONE_STEP[choose("sampler to invert", name, ONE_STEP)]
    axes, z = tuple(range(1, x.ndim)), x
    allowed = tolerance * x.std(axes, keepdim=True).clamp_min(1e-6)

    def error_of(z: Tensor, aim: Tensor, t: float, s: float) -> tuple[Tensor, Tensor]:
        """What is missing at s, on the scale of y; and its size for each sample."""
        missing = (aim - heun_step(denoise, z, t, s, process, correct)) / ode_scale(process, s)
        return missing, missing.square().mean(axes, keepdim=True).sqrt()

    for k, (s, t) in enumerate(pairwise(times[::-1])):
        aim, z = z, heun_step(denoise, z, s, t, process, correct)
        missing, size = error_of(z, aim, t, s)
        weight = (size > allowed).to(z)
        for _ in range(corrections):
            if not weight.any():
                break
            tried = z + weight * ode_scale(process, t) * missing
            found, smaller = error_of(tried, aim, t, s)
            better = smaller < size
            z, missing, size = tried.where(better, z), found.where(better, missing), smaller.where(better, size)
            weight = weight.where(better, weight / 2)
            weight = weight * ((size > allowed) & (weight > LEAST_WEIGHT))
        if progress:
            progress(k + 1)
    return z
