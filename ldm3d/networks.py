"""The networks of a pipeline at work: covariates to a denoiser, to latents, to volumes. No file, and no request in words."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from ldm3d.covariates import CovariateSchema, Value
from ldm3d.description import Sampling
from ldm3d.diffusion.denoiser import Denoiser, NetworkDenoiser, in_turn
from ldm3d.diffusion.guidance import EVERYWHERE, classifier_free
from ldm3d.diffusion.process import Process
from ldm3d.generation.given import Images
from ldm3d.generation.sampling import default_group_size, sample_latents
from ldm3d.geometry import Grid
from ldm3d.memory import PlannedDecoder
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import LatentUNet, cut_to
from ldm3d.start import GaussianStart


class Networks:
    """The methods of `ldm3d.pipeline.Pipeline` that compute; its arguments are described there."""

    autoencoder: LatentSpace
    unet: LatentUNet
    start: GaussianStart | None
    schema: CovariateSchema
    grid: Grid
    process: Process
    target: str
    scales: tuple[float, ...]
    decode_mode: str
    group: int | None
    compiled: bool
    images: Images | None
    _decoder: PlannedDecoder

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def group_size(self) -> int:
        """Rows of a batch: `group`, or what fills the device."""
        positions = math.prod(self.autoencoder.latent_shape(self.grid.shape)[1:])
        return self.group or default_group_size(positions, self.device)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the networks; what starts sampling stays in float32."""
        if self.start is not None:
            self.start.to(device=device)
        self.autoencoder.to(device=device, dtype=dtype)
        self.unet.to(device=device, dtype=dtype)
        return self

    def compile(self) -> Self:
        """Let torch.compile make the U-Net faster: worth its minute from some tens of volumes on.

        On CUDA, sampling then replays CUDA graphs, which takes the launches of single kernels off the host.
        """
        self.compiled = True
        self.unet.compile(mode="reduce-overhead" if self.device.type == "cuda" else None, dynamic=False)
        return self

    def denoiser(
        self,
        requests: Sequence[Mapping[str, Value]],
        guidance: float = 1.0,
        rescale: float = 0.0,
        interval: tuple[float, float] = EVERYWHERE,
        image_guidance: float = 1.0,
        numbers: Sequence[int] = (),
    ) -> Denoiser:
        """(z, t) -> the expected clean latent of normalised latents (N, c, x, y, z), padded as the U-Net needs them.

        Args:
            requests: from `parse`, one for each of the batch.
            guidance, image_guidance, rescale, interval: see `ldm3d.diffusion.guidance.apart`.
            numbers: of the requests in their series, whose images `given` has; without these images are left open.
        """
        asked = Conditions(self.schema.encode(requests).to(self.device))
        estimate = self.start and self.start.estimate
        denoise = NetworkDenoiser(self.unet, self.process, self.target, self.scales, estimate)
        if not len(self.schema):  # nothing is asked, so the answer with and without it would be the same
            guidance = 1.0
        if self.images is None or not numbers:
            guided = classifier_free(denoise, asked, asked.open(), guidance, rescale, interval)
        else:
            scales = guidance, image_guidance, rescale, interval
            guided = self.images.denoiser(denoise, asked, self, numbers, *scales)
        if self.start is None or self.conditions:  # a network that is given images is trained at every level of noise
            return guided
        return in_turn(self.start.denoiser(asked.covariates, self.process), guided, self.start.until, self.process)

    def latents(
        self,
        requests: Sequence[Mapping[str, Value]],
        sampling: Sampling,
        numbers: Sequence[int],
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Sample normalised latents (N, c, x, y, z), float32, for requests with these numbers; `progress` gets steps done."""
        channels, *shape = self.autoencoder.latent_shape(self.grid.shape)
        padded = channels, *self.unet.padded_shape(shape)
        guided = sampling.guidance, sampling.guidance_rescale, sampling.guidance_interval, sampling.image_guidance
        denoise = self.denoiser(requests, *guided, numbers)
        z = sample_latents(denoise, self.process, padded, sampling, numbers, self.device, progress)
        if sampling.spread != 1 and self.start is not None:
            expected = self.start.expected(self.schema.encode(requests).to(self.device))  # (N, c, *padded)
            z = expected + sampling.spread * (z - expected)
        return cut_to(z, shape)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents to volumes (N, C, X, Y, Z), float32, clipped to [0, 1]; whole or streamed, see `ldm3d.memory`."""
        return self._decoder.decode(self.autoencoder, self.autoencoder.denormalise(z.to(self.dtype)), self.decode_mode)

    def reconstruct(self, volumes: Tensor) -> Tensor:
        """Volumes (N, C, X, Y, Z) through the autoencoder and back: the best that generation could look like."""
        moments = self.autoencoder.encode(volumes.to(self.device, self.dtype))
        return self._decoder.decode(self.autoencoder, self.autoencoder.sample(moments), self.decode_mode)
