"""Losses of volumes (N, C, X, Y, Z); those of MONAI are in monai_losses.py."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm3d.config.sections import AutoencoderConfig, DecoderConfig
from ldm3d.training.task import MAIN, Trained

ADVERSARY = "adversary"


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(q || N(0, 1)) (Kingma & Welling 2014, appendix B), in nats: summed over a latent, averaged over the batch."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / len(moments)


class VolumeLoss:
    """Reconstruction loss: l1, l2, KL per voxel (Rombach et al. 2022), perceptual and adversarial, as the settings weigh them.

    Args:
        settings: the weights.
        perceptual: (volume, volume) -> loss, None if there is none.
        adversary: discriminator of real and reconstructed volumes, from its start on; None if there is none.
        autocast: the precision that the adversary computes in.
    """

    def __init__(
        self,
        settings: AutoencoderConfig | DecoderConfig,
        perceptual: Callable | None = None,
        adversary: Trained | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.settings, self.perceptual, self.adversary, self.autocast = settings, perceptual, adversary, autocast
        self._called = False

    @classmethod
    def of(cls, settings: AutoencoderConfig | DecoderConfig, channels: int, accelerator: Accelerator) -> "VolumeLoss":
        """The loss that the config asks for, on volumes of so many channels."""
        perceptual = adversary = None
        if settings.adversarial or settings.perceptual:  # MONAI takes seconds to import
            from ldm3d.training.monai_losses import Adversary, PerceptualLoss
        if settings.adversarial:
            network = Adversary(settings.adversarial, channels).to(accelerator.device)
            rate = settings.adversarial.learning_rate
            adversary = Trained(network, torch.optim.AdamW(network.parameters(), rate, (0.5, 0.9), fused=True))
        if settings.perceptual:
            perceptual = PerceptualLoss(settings.perceptual.weights).to(accelerator.device)
        return cls(settings, perceptual, adversary, accelerator.autocast)

    @property
    def settled(self) -> int:
        """The step from which on the loss has all its terms."""
        return self.settings.adversarial.start if self.adversary else 0

    @property
    def trained(self) -> dict[str, Trained]:
        """The adversary, where there is one."""
        return {ADVERSARY: self.adversary} if self.adversary else {}

    def is_adversarial(self, step: int) -> bool:
        """Whether the adversary takes part in step number `step` (from 0)."""
        return self.adversary is not None and step >= self.settings.adversarial.start

    def __call__(
        self, volume: Tensor, made: Tensor, step: int, moments: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its parts by name) of reconstructed volumes; moments (N, 2c, x, y, z) of the posterior, if the KL counts."""
        settings, made = self.settings, made.float()
        error = made - volume
        parts = {"l1": error.abs().mean()}
        loss = settings.l1 * parts["l1"] + settings.l2 * error.square().mean()
        if moments is not None:
            parts["kl_per_voxel"] = kl_divergence(moments) / volume[0].numel()
            loss = loss + settings.kl * parts["kl_per_voxel"]
        if self.perceptual:
            loss = loss + settings.perceptual.weight * self.perceptual(made, volume).mean()
        if self.is_adversarial(step):
            parts["adversarial"] = self._call_adversary(None, made)
            loss = loss + settings.adversarial.weight * parts["adversarial"]
        return loss, {"loss": loss, **parts}

    def in_turn(
        self, volume: Tensor, made: Tensor, step: int, moments: Tensor | None = None
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The loss of the network that made the volumes, and then the adversary's; see `Task.losses`."""
        adversarial = self.is_adversarial(step)
        if adversarial:
            if not self._called:  # FSDP sets the type of gradients at the first call, but not for frozen parameters
                self._called = True
                with torch.no_grad():
                    self._call_adversary(None, made)
            self.adversary.network.requires_grad_(False)
        yield MAIN, *self(volume, made, step, moments)
        if adversarial:
            self.adversary.network.requires_grad_(True)
            loss = self._call_adversary(volume, made.detach())
            yield ADVERSARY, loss, {"discriminator": loss}

    def _call_adversary(self, real: Tensor | None, made: Tensor) -> Tensor:
        """See `ldm3d.training.monai_losses.Adversary.forward`."""
        with self.autocast():
            return self.adversary.module(real, made).float()
