"""Checkpoints of others: tensors out of pickles and safetensors, and nothing but tensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm3d.errors import InputError


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict of tensors: plain, as {"state_dict": ...}, with "module." before every key; pickle or safetensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file: {error}") from None
    except Exception as error:  # whatever a stranger's file provokes; anything but tensors and containers is refused
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} is no checkpoint of plain tensors: {reason[0]}") from None
    if isinstance(weights, Mapping) and isinstance(weights.get("state_dict"), Mapping):
        weights = weights["state_dict"]
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} holds no state dict: expected names with a tensor each, plain or below `state_dict`")
    wrapped = all(name.startswith("module.") for name in weights)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in weights.items()}
