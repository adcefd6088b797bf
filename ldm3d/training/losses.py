"""Losses of the autoencoder; those that are MONAI's are in monai_losses.py."""

from torch import Tensor


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(q || N(0, 1)) (Kingma & Welling 2014, appendix B), in nats: summed over a latent, averaged over the batch."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / len(moments)
