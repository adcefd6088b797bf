"""Parameters that are spread over processes (FSDP2), seen as whole tensors where that is needed.

Both functions return what they are given where nothing is spread. `whole` is a collective: every process has to call it.
PyTorch's module of such tensors takes seconds to import, so it is only where it is used.
"""

from torch import Tensor


def is_spread(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every process."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A full tensor spread as `reference` is."""
    if not is_spread(reference):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, reference.device_mesh, reference.placements)
