"""Checkpoints of other programs: tensors from pickles and safetensors, and nothing else; MONAI's names of weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm3d.errors import InputError, some

# Names of the same weight in MONAI core and in monai-generative 0.2.3. There the self-attention outside of transformers has a
# projection `proj_attn` that is never called; core's, `attn.out_proj`, is.
RENAMED = (
    (".attn.to_", ".to_"),
    (".out_proj.", ".to_out.0."),
    (".postconv.", ".conv."),
)
LIVE, DEAD = ".attn.out_proj.", ".proj_attn."


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict of tensors: plain, as {"state_dict": ...}, with "module." before every key; pickle or safetensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file: {error}") from None
    except Exception as error:  # an untrusted file may raise anything; all but tensors and containers is refused
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} is no checkpoint of plain tensors: {reason[0]}") from None
    if isinstance(weights, Mapping) and isinstance(weights.get("state_dict"), Mapping):
        weights = weights["state_dict"]
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} holds no state dict: expected names with a tensor each, plain or below `state_dict`")
    wrapped = all(name.startswith("module.") for name in weights)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in weights.items()}


def convert(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """The state dict of a network of either library, from that of the same network of either library.

    Every key of `weights` is used, except for the projection that is known to be dead; every key of `wanted` is set. Where
    one library projects what comes out of an attention and the other does not, the projection is the identity.

    Args:
        weights: what there is; left as it is.
        wanted: names, shapes and types of what the network needs.
        source: for messages.

    Raises:
        InputError: a key of `weights` that is left over, or one of `wanted` that cannot be set; all are listed.
    """
    projects = any(LIVE in name for name in weights)
    found, used, missing = {}, set(), []
    for name, like in wanted.items():
        other = next((other for other in _aliases(name) if other in weights), None)
        if other is not None:
            found[name] = weights[other].to(like.dtype)
            used.add(other)
        elif DEAD in name or (LIVE in name and not projects):
            found[name] = torch.eye(len(like), dtype=like.dtype) if like.ndim == 2 else torch.zeros_like(like)
        else:
            missing.append(f"{name} is missing")
    left = [name for name in weights if name not in used and not _is_dead(name, weights)]
    if missing or left:
        listed = sorted(missing) + [f"{name} is left over" for name in sorted(left)]
        hint = ""
        if any(LIVE in name for name in left):
            hint = "; monai-generative 0.2.3 has no such projection, so use --library monai"
        raise InputError(f"{source} is of another network: {some(listed, 6)}{hint}")
    return found


def _aliases(name: str) -> Iterator[str]:
    """Names that a weight may have in either library, its own first."""
    yield name
    for pair in RENAMED:
        for here, there in (pair, pair[::-1]):
            if here in name:
                yield name.replace(here, there, 1)


def _is_dead(name: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether this is the projection that monai-generative's attention owns and never calls."""
    block, separator, _ = name.rpartition(DEAD)
    return bool(separator) and f"{block}.to_q.weight" in weights
