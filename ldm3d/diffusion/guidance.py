"""Guidance: functions that make one denoiser out of others, so that they compose.

Legend: x_c, x_u the clean latent expected with and without the condition, (N, C, X, Y, Z); w the guidance scale.
"""

from typing import Any

import torch
from torch import Tensor

from ldm3d.diffusion.denoiser import ConditionalDenoiser, Denoiser
from ldm3d.errors import InputError

EVERYWHERE = (0.0, 1.0)


def classifier_free(
    denoise: ConditionalDenoiser,
    conditions: Any,
    null: Any,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = EVERYWHERE,
) -> Denoiser:
    """A denoiser (z, t) -> x = x_u + w (x_c - x_u) (Ho & Salimans 2022, eq. 6, with w here for their w + 1).

    It mixes clean latents. x is affine in every target (`Process.to_data`) and the weights w and 1 - w sum to 1, so to
    mix noise, v or velocity predictions comes to the same.

    Args:
        denoise: (z, t, conditions) -> x; asked once a step, with z and both conditions stacked to a batch of 2N.
        conditions: of each sample.
        null: the same left open; `conditions + null` stacks them.
        scale: w. 1 is the conditional denoiser, 0 the unconditional one; these two cost a batch of N only.
        rescale: share phi in [0, 1] of the mixture whose standard deviation is brought back to that of x_c, per sample
            over all its elements (Lin et al. 2024, eq. 15-16). Unlike the mixing this depends on the target: they
            rescale the network's output (v), here it is x.
        interval: guide where interval[0] <= t <= interval[1] only; x_c elsewhere (Kynkäänniemi et al. 2024). Values
            below 1 for the upper end keep the variety that guiding near pure noise costs.

    Raises:
        InputError: rescale or interval outside [0, 1].
    """
    low, high = _checked(interval)
    if not 0 <= rescale <= 1:
        raise InputError(f"guidance rescale {rescale} must be in [0, 1]; 0 is off")
    both = conditions + null

    def guided(z: Tensor, t: float) -> Tensor:
        if scale == 1 or not low <= t <= high:
            return denoise(z, t, conditions)
        if scale == 0:
            return denoise(z, t, null)
        x_c, x_u = denoise(torch.cat([z, z]), t, both).chunk(2)  # 2N -> 2 x (N, C, X, Y, Z)
        x = x_u + scale * (x_c - x_u)
        return rescaled(x, x_c, rescale) if rescale else x

    return guided


def apart(
    denoise: ConditionalDenoiser,
    conditions: Any,
    images_alone: Any,
    null: Any,
    scale: float,
    image_scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = EVERYWHERE,
) -> Denoiser:
    """Guidance that weighs covariates and images apart: x = x_u + s (x_i - x_u) + w (x_ci - x_i) (Brooks et al. 2023, eq. 3).

    Args:
        denoise: (z, t, conditions) -> x; asked once a step, with a batch of 3N, or of 2N where `image_scale` is 1.
        conditions: of each sample: covariates and images, for x_ci.
        images_alone: the same with covariates left open, for x_i.
        null: with both left open, for x_u.
        scale: w, of the covariates.
        image_scale: s, of the images. 1: `classifier_free` over covariates, with the images given throughout.
        rescale, interval: see `classifier_free`.

    Raises:
        InputError: rescale or interval outside [0, 1].
    """
    if image_scale == 1:
        return classifier_free(denoise, conditions, images_alone, scale, rescale, interval)
    low, high = _checked(interval)
    if not 0 <= rescale <= 1:
        raise InputError(f"guidance rescale {rescale} must be in [0, 1]; 0 is off")
    all_three = conditions + images_alone + null

    def guided(z: Tensor, t: float) -> Tensor:
        if not low <= t <= high:
            return denoise(z, t, conditions)
        x_ci, x_i, x_u = denoise(torch.cat([z, z, z]), t, all_three).chunk(3)
        x = x_u + image_scale * (x_i - x_u) + scale * (x_ci - x_i)
        return rescaled(x, x_ci, rescale) if rescale else x

    return guided


def autoguided(good: Denoiser, bad: Denoiser, scale: float, interval: tuple[float, float] = EVERYWHERE) -> Denoiser:
    """Guidance away from a worse model of the same data: x = x_bad + w (x_good - x_bad) (Karras et al. 2024, eq. 2).

    Args:
        good: the model.
        bad: a smaller one, or one that was trained for less time; under the same conditions.
        scale: w; 1 is `good` alone.
        interval: guide at these times only, see `classifier_free`.

    Raises:
        InputError: interval outside [0, 1].
    """
    low, high = _checked(interval)

    def guided(z: Tensor, t: float) -> Tensor:
        x = good(z, t)
        if scale == 1 or not low <= t <= high:
            return x
        worse = bad(z, t)
        return worse + scale * (x - worse)

    return guided


def rescaled(x: Tensor, reference: Tensor, share: float) -> Tensor:
    """x, a share of it brought to the standard deviation of the reference, per sample (Lin et al. 2024, eq. 15-16)."""
    axes = tuple(range(1, x.ndim))
    factor = reference.std(axes, keepdim=True) / x.std(axes, keepdim=True).clamp_min(1e-8)
    return share * (x * factor) + (1 - share) * x


def _checked(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise InputError(f"guidance interval {interval} must be two times 0 <= low <= high <= 1; (0, 1) is everywhere")
    return low, high
