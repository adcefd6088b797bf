"""Parameters that are spread over processes (FSDP2), seen as whole tensors where that is needed.

Both functions return what they are given where nothing is spread. `whole` is a collective: every process has to call it.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A full tensor spread as `reference` is."""
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor
