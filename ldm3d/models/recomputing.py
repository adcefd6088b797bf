"""Gradients through a decoder in little memory: what its blocks compute inside is forgotten, and computed again when needed.

Chen et al. 2016 (Training deep nets with sublinear memory cost): a forward pass more, for the memory of one block at a time.
"""

import functools
from collections.abc import Iterator

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm3d.models.autoencoder import LatentSpace


def decode_recomputed(autoencoder: LatentSpace, z: Tensor) -> Tensor:
    """What `autoencoder.decode(z)` gives, with gradients, keeping the input of each block only; the same numbers.

    Args:
        autoencoder: any.
        z: latents as `decode` takes them, (N, c, X/f, Y/f, Z/f), that require gradients.
    """
    blocks = list(_blocks(autoencoder))
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        return autoencoder.decode(z)
    finally:
        for block in blocks:
            del block.forward


def _blocks(autoencoder: LatentSpace) -> Iterator[nn.Module]:
    """The decoder's modules, and where one is a chain of blocks these."""
    for module in autoencoder.decoder_modules():
        chain = module if isinstance(module, nn.Sequential) else getattr(module, "blocks", None)
        yield from chain if isinstance(chain, nn.Sequential | nn.ModuleList) else [module]
