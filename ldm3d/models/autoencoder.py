"""The autoencoder: volumes to a small latent grid and back.

Two findings shape it. Work at full resolution is expensive, so a space-to-depth stem and a depth-to-space head keep every
convolution at half resolution or below. And a linear code of small blocks is already a usable autoencoder, so it is fitted
before the first step (`fit_linear_path`), and the networks learn its residual.

Volumes are (N, C, X, Y, Z) in [0, 1]; latents (N, c, X/f, Y/f, Z/f); moments hold the posterior's mean and log-variance,
(N, 2c, X/f, Y/f, Z/f) (Kingma & Welling 2014, here as in Rombach et al. 2022).

Volumes of several contrasts (T1w and T2w of one head) are coded contrast by contrast with the same weights. Their latents lie
side by side, so that a contrast which a subject lacks is missing in its own channels alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm3d.errors import InputError
from ldm3d.models.blocks import (
    ChannelNorm,
    ResBlock,
    TransformerBlock,
    convolve_to_voxels,
    depth_to_space,
    space_to_depth,
    zero,
)
from ldm3d.models.pretrained import Pretrained

# With unit variance the decoder would first learn the mean image; exp(-6) is a twentieth of a latent's deviation.
START_LOG_VARIANCE = -6.0
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class LatentSpace(Pretrained):
    """The interface of every autoencoder; a subclass adds `encode` and `decode`.

    Args:
        in_channels: C, modalities in a volume.
        latent_channels: c.
        downsampling: f.
        contrasts: that are coded each by itself, with C / contrasts channels and c / contrasts latent ones.

    Buffers `latent_mean` and `latent_std`, (c,), are the latents' statistics over the training split.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, in_channels: int, latent_channels: int, downsampling: int, contrasts: int = 1):
        super().__init__()
        self.in_channels, self.latent_channels, self.downsampling = in_channels, latent_channels, downsampling
        self.contrasts = contrasts
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def encode(self, x: Tensor) -> Tensor:
        """x (N, C, X, Y, Z) in [0, 1] -> moments (N, 2c, X/f, Y/f, Z/f)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Latent (N, c, X/f, Y/f, Z/f) -> volume (N, C, X, Y, Z), not clipped; float32 also from half precision."""
        raise NotImplementedError

    def decoder_modules(self) -> list[nn.Module]:
        """The modules of `decode`."""
        raise NotImplementedError

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One training pass: (reconstruction, moments) of x, with the posterior sampled by `noise` (shape of a latent)."""
        moments = self.encode(x)
        return self.decode(self.sample(moments, noise)), moments

    def check_sides(self, x: Tensor) -> None:
        """Raise InputError unless f divides every side of volumes (N, C, X, Y, Z)."""
        if any(n % self.downsampling for n in x.shape[2:]):
            raise InputError(
                f"volume of shape {tuple(x.shape[2:])} must be divisible by the downsampling {self.downsampling}; "
                "crop or pad it (the data.grid of the config does)"
            )

    @staticmethod
    def sample(moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """A latent (N, c, ...) from its posterior: mean + std * noise, or the mean if noise is None."""
        mean, log_variance = moments.chunk(2, dim=1)
        return mean if noise is None else mean + torch.exp(log_variance / 2) * noise

    def apart(self, x: Tensor) -> Tensor:
        """Volumes or latents (N, C, ...) with each contrast as one of its own: (N contrasts, C / contrasts, ...)."""
        return x.reshape(-1, x.shape[1] // self.contrasts, *x.shape[2:])

    def beside(self, x: Tensor) -> Tensor:
        """The inverse of `apart`."""
        return x.reshape(-1, x.shape[1] * self.contrasts, *x.shape[2:])

    def lacking(self, moments: Tensor) -> Tensor:
        """Which latent channels are of contrasts that are missing, (N, c): NaN in moments (N, 2c, x, y, z).

        The first contrast is the scan itself, which is always there: NaN in it is a fault, as in models of one contrast.
        """
        i, j, k = (n // 2 for n in moments.shape[2:])  # in the middle: a U-Net's latents may be padded with zeros
        lacking = moments[:, : self.latent_channels, i, j, k].isnan()
        lacking[:, : self.latent_channels // self.contrasts] = False
        return lacking

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(c, X/f, Y/f, Z/f) of a volume of `shape` (X, Y, Z)."""
        return self.latent_channels, *(n // self.downsampling for n in shape)

    def normalise(self, z: Tensor) -> Tensor:
        """Latents to zero mean and unit variance over the training split."""
        return (z - self.latent_mean[:, None, None, None]) / self.latent_std[:, None, None, None]

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return z * self.latent_std[:, None, None, None] + self.latent_mean[:, None, None, None]

    # MONAI's LatentDiffusionInferer calls an autoencoder by these names; its latents are normalised.
    def encode_stage_2_inputs(self, x: Tensor) -> Tensor:
        return self.normalise(self.sample(self.encode(x)))

    def decode_stage_2_outputs(self, z: Tensor) -> Tensor:
        return self.decode(self.denormalise(z))


class Autoencoder(LatentSpace):
    """KL-regularised autoencoder that owns the scale of its latents.

    Args:
        latent_channels: c, of each contrast.
        downsampling: f, a power of two.
        channels: width at 1/2, 1/4, ... 1/f of the resolution; log2(f) numbers (one for f = 1).
        blocks: residual blocks a level, in the encoder and in the decoder.
        attention: self-attention at the coarsest level. Tiles of a volume then decode otherwise than the volume.
        linear_path: whether there is a linear code beside the networks.
        in_channels: modalities in a volume.
        contrasts: in a volume, which this network codes one by one: C is contrasts * in_channels, and volumes have
            contrasts * latent_channels latent ones.
    """

    later_arguments = ("contrasts",)
    in_bytes = r"\.conv[12]\.weight$"  # of residual blocks; what carries the voxels themselves is left finer

    def __init__(
        self,
        latent_channels: int,
        downsampling: int,
        channels: Sequence[int],
        blocks: int = 2,
        attention: bool = False,
        linear_path: bool = True,
        in_channels: int = 1,
        contrasts: int = 1,
    ):
        super().__init__(contrasts * in_channels, contrasts * latent_channels, downsampling, contrasts)
        levels = max(1, downsampling.bit_length() - 1)
        if downsampling < 1 or downsampling & (downsampling - 1) or len(channels) != levels:
            raise InputError(
                f"downsampling {downsampling} with channels {list(channels)}: downsampling must be a power of two, 2^k, "
                "with k numbers of channels (one at each of 1/2, 1/4, ... of the resolution)"
            )
        self.stem = min(2, downsampling)
        voxels = in_channels * self.stem**3

        def level(width: int, coarsest: bool) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(width) for _ in range(blocks)]
            if coarsest and attention:
                layers.append(TransformerBlock(width, head_channels=min(width, 32)))
            return layers

        encoder: list[nn.Module] = [nn.Conv3d(voxels, channels[0], 3, padding=1)]
        decoder: list[nn.Module] = [nn.Conv3d(latent_channels, channels[-1], 3, padding=1)]
        for i, width in enumerate(channels):
            if i > 0:
                encoder.append(nn.Conv3d(channels[i - 1], width, 2, stride=2))
            encoder += level(width, coarsest=i == levels - 1)
        for i, width in reversed(list(enumerate(channels))):
            decoder += level(width, coarsest=i == levels - 1)
            if i > 0:
                decoder.append(nn.ConvTranspose3d(width, channels[i - 1], 2, stride=2))
        self.encoder = nn.Sequential(*encoder, ChannelNorm(channels[-1]))
        self.decoder = nn.Sequential(*decoder, ChannelNorm(channels[0]))
        self.to_moments = nn.Conv3d(channels[-1], 2 * latent_channels, 3, padding=1)
        self.to_voxels = nn.Conv3d(channels[0], voxels, 3, padding=1)
        self.analysis: nn.Conv3d | None = None
        self.synthesis: nn.Conv3d | None = None
        if linear_path:
            patch = in_channels * downsampling**3
            self.analysis = nn.Conv3d(patch, latent_channels, 3, padding=1)
            self.synthesis = nn.Conv3d(latent_channels, patch, 3, padding=1)
            # The networks start as a zero correction to the linear path, whose error is a twentieth of the intensity range:
            # at the rate of other layers, the first steps of these two would be larger than that error
            for layer, factor in ((self.to_moments, 0.3), (self.to_voxels, 0.1)):
                zero(layer).learning_rate_factor = factor  # type: ignore[assignment]  # PyTorch's types: modules hold tensors
        with torch.no_grad():
            self.to_moments.get_parameter("bias")[latent_channels:] = START_LOG_VARIANCE
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # it does take one

    def encode(self, x: Tensor) -> Tensor:
        """x (N, C, X, Y, Z) in [0, 1] -> moments (N, 2c, X/f, Y/f, Z/f).

        Raises:
            InputError: a side that f does not divide.
        """
        self.check_sides(x)
        x = self.apart(x)
        h = self.encoder(space_to_depth(x, self.stem))  # (N, channels[-1], X/f, Y/f, Z/f)
        mean, log_variance = self.to_moments(h).chunk(2, dim=1)
        if self.analysis is not None:
            mean = mean + self.analysis(space_to_depth(x, self.downsampling))
        return torch.cat([self.beside(mean), self.beside(log_variance.clamp(*LOG_VARIANCE_RANGE))], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """Latent (N, c, X/f, Y/f, Z/f) -> volume (N, C, X, Y, Z), not clipped; float32 also from half precision."""
        z = self.apart(z)
        h = self.decoder(z)  # (N, channels[0], X/s, Y/s, Z/s), s = self.stem
        if self.synthesis is None:
            return self.beside(depth_to_space(convolve_to_voxels(h, self.to_voxels), self.stem))
        # Half precision rounds the network's small correction, but neither the linear path's image nor the sum
        volume = depth_to_space(convolve_to_voxels(z, self.synthesis), self.downsampling)
        return self.beside(volume + depth_to_space(self.to_voxels(h), self.stem))

    def decoder_modules(self) -> list[nn.Module]:
        return [module for module in (self.decoder, self.to_voxels, self.synthesis) if module is not None]

    def through_linear_path(self, x: Tensor) -> Tensor:
        """Volumes (N, C, X, Y, Z) encoded and decoded by the linear path alone."""
        analysis, synthesis = self._linear_path()
        return self.beside(
            depth_to_space(synthesis(analysis(space_to_depth(self.apart(x), self.downsampling))), self.downsampling)
        )

    def _linear_path(self) -> tuple[nn.Conv3d, nn.Conv3d]:
        if self.analysis is None or self.synthesis is None:
            raise InputError("this autoencoder has no linear path; make it with linear_path=True")
        return self.analysis, self.synthesis

    @torch.no_grad()
    def fit_linear_path(self, volumes: Tensor, ridge: float = 1e-3) -> None:
        """Set the linear path from data: principal components in, ridge regression back.

        `analysis` projects each block of f^3 voxels on its c leading principal components, scaled to unit variance; its
        weights for the 26 blocks around start at zero. `synthesis` predicts a block from the latents of the block and its
        neighbours by least squares, without the edges between blocks that inverse principal components would leave.

        Args:
            volumes: some training volumes, (N, C, X, Y, Z).
            ridge: added to the diagonal of the regression's normal equations, relative to its mean.
        """
        analysis, synthesis = self._linear_path()
        f, c, patch = self.downsampling, analysis.out_channels, analysis.in_channels
        blocks = space_to_depth(self.apart(volumes).float(), f)  # (N, C f^3, X/f, Y/f, Z/f)
        rows = blocks.transpose(0, 1).flatten(1).double()  # (C f^3, all blocks)
        mean = rows.mean(dim=1, keepdim=True)
        covariance = (rows - mean) @ (rows - mean).T / rows.shape[1]
        variance, components = torch.linalg.eigh(covariance)  # ascending
        variance, components = variance.flip(0)[:c], components.flip(1)[:, :c]
        if len(variance) < c:  # more latent channels than voxels in a block (f = 1): the rest is 0
            components = torch.cat([components, components.new_zeros(patch, c - len(variance))], dim=1)
            variance = torch.cat([variance, variance.new_ones(c - len(variance))])
        # The sign is arbitrary: make it reproducible
        components = components * torch.where(components.sum(dim=0) < 0, -1.0, 1.0)
        kernel = (components / variance.clamp_min(1e-12).sqrt()).T  # (c, C f^3)
        zero(analysis)
        analysis.weight[:, :, 1, 1, 1] = kernel.to(analysis.weight)
        analysis.get_parameter("bias").copy_(-(kernel @ mean)[:, 0])

        # Normal equations, summed volume by volume
        gram, moment = rows.new_zeros(27 * c + 1, 27 * c + 1), rows.new_zeros(27 * c + 1, patch)
        for block in blocks:
            z = analysis(block[None])  # (1, c, x, y, z)
            near = nn.functional.pad(z, (1, 1, 1, 1, 1, 1))
            near = near.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)[0]  # (c, x, y, z, 3, 3, 3)
            near = near.permute(0, 4, 5, 6, 1, 2, 3).reshape(27 * c, -1).double()
            near = torch.cat([near, near.new_ones(1, near.shape[1])])
            gram = gram + near @ near.T
            moment = moment + near @ block.flatten(1).T.double()
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        solution = torch.linalg.solve(gram, moment)  # (27 c + 1, C f^3)
        synthesis.weight.copy_(solution[:-1].T.reshape(patch, c, 3, 3, 3))
        synthesis.get_parameter("bias").copy_(solution[-1])
