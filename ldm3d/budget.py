"""What an experiment will take: memory of each training, and the disk. Counted from the config, without running anything.

Networks are run once on tensors without data (PyTorch's meta device), and the bytes in use are counted, as for a decode
(`ldm3d.memory`). The estimates are for float32; with bfloat16 activations take about half.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from ldm3d.config.sections import Config
from ldm3d.data.quality import LOOK_BYTES
from ldm3d.memory import LiveBytes, plan_decode
from ldm3d.models.pretrained import make_network
from ldm3d.training.linear_path import volumes_for
from ldm3d.training.losses import kl_divergence

FLOAT = 4  # bytes
COPIES = {"adamw": 4, "muon": 3}  # of the weights, in memory and in a checkpoint: themselves, their average, the optimiser's
CHECKPOINTS = 3  # the last two, and the best or the one that is being written
KERNELS = 120_000_000  # bytes of PyTorch's kernels, which the first steps load; measured on a CPU
INFO_BYTES, PAGE_BYTES = 2000, 6000  # of a scan, beside its volume


@dataclass(frozen=True)
class Budget:
    """Bytes.

    Attributes:
        stage_1, stage_2: memory of a process of each training at its peak, without `process`.
        process: memory of PyTorch's kernels and, on a CPU, of Python and all libraries.
        disk: bytes of each part of OUTPUT at the end.
    """

    stage_1: int
    stage_2: int
    process: int
    disk: dict[str, int]


def estimate(config: Config, scans: int, device: torch.device) -> Budget:
    """Memory and disk of an experiment.

    Args:
        config: of the experiment.
        scans: that are prepared and encoded.
        device: that trains.
    """
    shape, one, two = config.data.grid.shape, config.autoencoder, config.diffusion
    with torch.device("meta"):
        autoencoder = make_network("Autoencoder", **config.autoencoder_arguments)
        channels = autoencoder.latent_channels
        of_data = {**config.diffusion.channels(channels), "num_categories": config.schema().num_categories}
        unet = make_network("UNet", **of_data, **two.network.model_dump())
    latent = tuple(autoencoder.latent_shape(shape))
    padded = (of_data["in_channels"], *unet.padded_shape(latent[1:]))
    volume, latents, own, unet_own = (
        FLOAT * n for n in (math.prod(shape), math.prod(latent), _parameters(autoencoder), _parameters(unet))
    )

    def reconstruct() -> Tensor:
        n = one.training.batch_size // one.training.accumulation
        x = torch.empty(n, autoencoder.in_channels, *shape, device="meta")
        made, moments = autoencoder(x, torch.empty(n, *latent, device="meta"))
        return (made - x).abs().mean() + kl_divergence(moments)

    def denoise() -> Tensor:
        n = two.training.batch_size // two.training.accumulation
        z = torch.empty(n, *padded, device="meta")  # what the network sees: the Gaussian's answer, too, where it has one
        context = torch.ones(n, len(config.covariates), 2, device="meta")
        return (unet(z, torch.ones(n, device="meta"), context) - z[:, :channels]).square().mean()

    fitted = volume * volumes_for(shape) if one.network.linear_path else 0
    preview = plan_decode(autoencoder, (1, *latent), device).estimated_bytes
    return Budget(
        COPIES[one.training.optimizer] * own + max(_peak(reconstruct, device), fitted),
        COPIES[two.training.optimizer] * unet_own + own + max(_peak(denoise, device), preview),
        KERNELS + (psutil.Process().memory_info().rss if device.type == "cpu" else 0),
        {
            "prepared": scans * (volume // 2 + LOOK_BYTES + INFO_BYTES + PAGE_BYTES),
            "autoencoder-training": CHECKPOINTS * COPIES[one.training.optimizer] * own,
            "latents": 2 * scans * latents,
            "diffusion-training": CHECKPOINTS * COPIES[two.training.optimizer] * unet_own,
            "autoencoder": own,
            "model": own + unet_own,
        },
    )


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _peak(loss: Callable[[], Tensor], device: torch.device) -> int:
    """Bytes of activations and gradients at the peak of one step forward and back."""
    with LiveBytes(device) as counter:
        loss().backward()
    return counter.peak
