"""Likelihood of held-out volumes under the model: nats per latent dimension, and with the autoencoder bits per voxel.

The density of a latent is in the units of the latent space: an autoencoder that maps all volumes to similar latents would have
the best one. Bits per voxel are the code length of the volume itself: of its latent, and of the errors of the decoder.

Legend: x' the normalised latent, scored with the noise that `ldm3d.diffusion.likelihood` puts on it; q its distribution given
the volume, N(mean, std^2 + (sigma_0 / alpha_0)^2): the encoder's posterior with that noise.

    -log2 p(volume) <= E_q (-log2 p(volume | x')) + E_q log2 q(x') + E_q (-log2 p(x'))   (Kingma & Welling 2014, eq. 3)
                       image                      - entropy of q     latent, the bound
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm3d.covariates import Value
from ldm3d.diffusion.denoiser import Denoiser
from ldm3d.diffusion.likelihood import low_discrepancy, ode_nll, variational_bound, window
from ldm3d.errors import InputError, choose
from ldm3d.models.unet import cut_to, pad_to
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator

METHODS = ("bound", "ode", "both")
SCALE_BITS = 32  # code length of the scale of a volume's errors, a float32
# Columns of `score` with the bound -> title, unit
COLUMNS = {
    "bound": ("latent", "nats per latent dimension"),
    "bits_per_voxel": ("volume", "bits per voxel"),
    "image_bits": ("volume given its latent", "bits per voxel"),
    "latent_bits": ("latent, shared among voxels", "bits per voxel"),
}


def score(
    pipeline: Pipeline,
    subjects: Sequence[Mapping[str, Any]],
    load: Callable[[int], NDArray],
    method: str = "both",
    times: int = 128,
    ode_steps: int = 50,
    levels: int = 256,
    seed: int = 0,
) -> pd.DataFrame:
    """Likelihood of volumes given their covariates, without guidance: a guided denoiser has no density.

    Args:
        pipeline: the model.
        subjects: covariates of each volume; missing values are left open.
        load: number of a subject -> volume (C, X, Y, Z) in [0, 1] on the pipeline's grid.
        method: "bound", "ode" or "both", see `ldm3d.diffusion.likelihood`. Bits per voxel come from the bound.
        times: denoiser calls of the bound, for each subject.
        ode_steps: of the ODE; each takes two denoiser calls and two backward passes.
        levels: grey levels of the voxels; bits per voxel depend on them.
        seed: of all noise; that of a subject follows from its index.

    Returns:
        A row for each subject: `bound` and its parts `prior`, `reconstruction`, `diffusion`, and `ode`, in nats per latent
        dimension; `bits_per_voxel` and its parts `image_bits`, `entropy_bits` (subtracted) and `latent_bits`.

    Raises:
        InputError: no subject, an unknown method, or fewer than two levels.
    """
    choose("method of likelihood", method, METHODS)
    if not subjects or levels < 2:
        raise InputError(f"{len(subjects)} volumes to score in {levels} grey levels: give one or more, in 2 levels or more")
    rows, table = pipeline.parse(subjects), []
    for i, row in enumerate(tqdm(rows, desc="likelihood", unit="volume")):
        volume = torch.from_numpy(load(i))[None].to(pipeline.device)  # (1, C, X, Y, Z)
        table.append(score_volume(pipeline, volume, row, method, times, ode_steps, levels, (seed, i)))
    return pd.DataFrame(table)


def score_volume(
    pipeline: Pipeline,
    volume: Tensor,
    row: Mapping[str, Value],
    method: str,
    times: int,
    ode_steps: int,
    levels: int,
    position: tuple[int, int],
) -> dict[str, float]:
    """One row of `score`; `position` is (seed, index of the subject), volume (1, C, X, Y, Z)."""
    moments = pipeline.autoencoder.encode(volume.to(pipeline.dtype)).float()
    mean, log_variance = moments.chunk(2, dim=1)
    latent_std = pipeline.autoencoder.latent_std[:, None, None, None].float()
    mean, std = pipeline.autoencoder.normalise(mean).float(), torch.exp(log_variance / 2) / latent_std  # (1, c, x, y, z)

    def noise(i: int | str) -> Tensor:
        return torch.randn(mean.shape, generator=generator("likelihood", *position, i)).to(mean)

    x, dimensions = mean + std * noise("posterior"), mean.numel()
    denoise = denoiser(pipeline, row, x.shape, position)
    result: dict[str, float] = {}
    if method != "bound":
        result["ode"] = ode_nll(denoise, x, pipeline.process, noise, steps=ode_steps).item() / dimensions
    if method == "ode":
        return result
    offset = torch.rand((), generator=generator("likelihood", *position, "offset")).item()
    bound = variational_bound(denoise, x, pipeline.process, noise, low_discrepancy(times, offset))
    parts = {"prior": bound.prior, "reconstruction": bound.reconstruction, "diffusion": bound.diffusion}
    result |= {"bound": bound.nats_per_dimension.item()} | {name: part.item() / dimensions for name, part in parts.items()}

    variance = std.double() ** 2 + math.exp(-2 * window(pipeline.process)[0])  # of q
    entropy = (1 + (2 * math.pi * variance).log()).sum().item() / 2
    decoded = pipeline.decode(mean + variance.sqrt().to(mean) * noise("decoded"))
    image = laplace_nats(volume, decoded, levels)
    per_voxel = math.log(2) * volume.numel()
    result["bits_per_voxel"] = (image - entropy + bound.total.item()) / per_voxel
    result["image_bits"], result["entropy_bits"] = image / per_voxel, entropy / per_voxel
    result["latent_bits"] = bound.total.item() / per_voxel
    return result


def denoiser(pipeline: Pipeline, row: Mapping[str, Value], shape: Sequence[int], position: tuple[int, int]) -> Denoiser:
    """The model's denoiser for one request, differentiable, on latents without padding (1, c, x, y, z).

    A network that needs padding is trained on latents padded with zeros. Here z is padded with noised zeros, always with the
    same noise, so that the answer is a function of z, and the density is that of x alone.
    """
    model = pipeline.denoiser([row])
    padded = pipeline.unet.padded_shape(shape[2:])
    outside = pad_to(torch.ones(tuple(shape)), padded) == 0
    frame = torch.where(outside, torch.randn(outside.shape, generator=generator("likelihood", *position, "frame")), 0.0)
    frame = frame.to(pipeline.device)

    def denoise(z: Tensor, t: float) -> Tensor:
        framed = pad_to(z, padded) + pipeline.process.sigma(t) * frame
        return cut_to(model(framed, t), shape[2:])

    return denoise


def laplace_nats(volume: Tensor, decoded: Tensor, levels: int) -> float:
    """Code length in nats of a volume in grey levels, given the decoded one, under Laplace errors (as of an L1 loss).

    The probability of a level is that of the interval around it; the two end levels include the tails. The scale of the
    errors is the volume's mean absolute error; its own code length, SCALE_BITS, is included.

    Args:
        volume, decoded: same shape, in [0, 1].
    """
    top = levels - 1
    level, decoded = (volume.double() * top).round(), decoded.double() * top
    scale = (level - decoded).abs().mean().clamp_min(0.05).float().double()  # levels; below it all errors are rounding
    return SCALE_BITS * math.log(2) - laplace_log_probability(level, decoded, scale, top).sum().item()


def laplace_log_probability(level: Tensor, decoded: Tensor, scale: Tensor, top: int) -> Tensor:
    """log probability of each level 0..top under Laplace errors around `decoded`, both in levels."""
    error = level - decoded
    # log(F(error + 1/2) - F(error - 1/2)), F the distribution function, without differences of nearly equal numbers
    far = _log_sinh(0.5 / scale) - error.abs() / scale
    near = torch.log(-(torch.expm1((error.abs() - 0.5).clamp(max=0) / scale) + torch.expm1((-error.abs() - 0.5) / scale)) / 2)
    inside = torch.where(error.abs() > 0.5, far, near)
    inside = torch.where(level == 0, _log_laplace_cdf((error + 0.5) / scale), inside)
    return torch.where(level == top, _log_laplace_cdf((0.5 - error) / scale), inside)


def _log_sinh(a: Tensor) -> Tensor:
    return a + torch.log1p(-torch.exp(-2 * a)) - math.log(2)


def _log_laplace_cdf(a: Tensor) -> Tensor:
    return torch.where(a < 0, a - math.log(2), torch.log1p(-torch.exp(-a.clamp_min(0)) / 2))
