"""Inversion: from a clean latent to the noise from which it would be sampled."""

from torch import Tensor

from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.ode import Progress
from ldm3d.diffusion.process import Process
from ldm3d.diffusion.samplers import follow, recommended_spacing


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
