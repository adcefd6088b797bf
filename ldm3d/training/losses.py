"""Losses of the autoencoder; those that are MONAI's are in monai_losses.py."""

from collections.abc import Callable

from torch import Tensor

from ldm3d.config import AutoencoderConfig


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(q || N(0, 1)) (Kingma & Welling 2014, appendix B), in nats: summed over a latent, averaged over the batch."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / len(moments)


class AutoencoderLoss:
    """What stage 1 minimises: l1, l2, KL a voxel (Rombach et al. 2022), perceptual and, from its start on, adversarial.

    Args:
        settings: the weights.
        perceptual: (reconstruction, volume) -> loss, None if there is none.
        adversary: (None, reconstruction) -> the loss of not being taken for real; None if there is none.
    """

    def __init__(self, settings: AutoencoderConfig, perceptual: Callable | None, adversary: Callable | None):
        self.settings, self.perceptual, self.adversary = settings, perceptual, adversary

    def is_adversarial(self, step: int) -> bool:
        """Whether the adversary takes part in step number `step` (from 0)."""
        return self.adversary is not None and step >= self.settings.adversarial.start

    def __call__(self, volume: Tensor, reconstruction: Tensor, moments: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its parts by name) of volumes (N, C, X, Y, Z); moments (N, 2c, x, y, z)."""
        settings, reconstruction = self.settings, reconstruction.float()
        error = reconstruction - volume
        l1, kl = error.abs().mean(), kl_divergence(moments) / volume[0].numel()
        loss = settings.l1 * l1 + settings.l2 * error.square().mean() + settings.kl * kl
        parts = {"l1": l1, "kl_per_voxel": kl}
        if self.perceptual:
            loss = loss + settings.perceptual.weight * self.perceptual(reconstruction, volume).mean()
        if self.is_adversarial(step):
            parts["adversarial"] = self.adversary(None, reconstruction).float()
            loss = loss + settings.adversarial.weight * parts["adversarial"]
        return loss, {"loss": loss, **parts}
