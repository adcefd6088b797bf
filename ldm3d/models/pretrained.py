"""Networks as folders: config.json says how to build one, model.safetensors holds its weights. No pickle."""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ldm3d.errors import InputError

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# Where each class of network is; imported when one is asked for, so that nobody waits for a library that is not used
MODULES = {
    "Autoencoder": "ldm3d.models.autoencoder",
    "UNet": "ldm3d.models.unet",
    "MonaiAutoencoder": "ldm3d.models.monai",
    "MonaiUNet": "ldm3d.models.monai",
}


class Pretrained(nn.Module):
    """A module that can be saved to and loaded from a folder.

    A subclass leaves the arguments of its constructor in `self.arguments`, all of them JSON values.
    """

    arguments: ClassVar[dict[str, Any]]

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors, in the parameters' own dtype."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {"class": type(self).__name__, "arguments": self.arguments}
        (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None):
        """The network in evaluation mode; it may be of a subclass, as config.json says.

        Args:
            folder: written by `save_pretrained`.
            device, dtype: where and in what precision; None keeps the dtype of the file.

        Raises:
            InputError: not such a folder, another class's, or weights that do not fit the configuration.
        """
        folder = Path(folder)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"device {str(device)!r} cannot be used here ({reason}); try cpu or cuda") from None
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise InputError(f"{folder} holds no {cls.__name__}: {name} is missing")
        try:
            description = json.loads((folder / CONFIG).read_text())
            found, arguments = description["class"], description["arguments"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{folder / CONFIG} is damaged: expected JSON with `class` and `arguments`") from None
        network_class = find_class(found) if found in MODULES else cls
        if found not in (*MODULES, cls.__name__) or not issubclass(network_class, cls):
            raise InputError(f"{folder} holds weights of {found}, not of {cls.__name__}")
        try:
            network = network_class(**arguments)
        except TypeError as error:
            raise InputError(f"{folder / CONFIG} was written by another version of ldm3d: {error}") from None
        try:
            weights = load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise InputError(f"{folder / WEIGHTS} is damaged: {error}") from None
        network.to(next(iter(weights.values())).dtype)
        load_weights(network, weights, folder / WEIGHTS)
        return network.to(device=device, dtype=dtype).eval().requires_grad_(False)


def find_class(name: str) -> type[Pretrained]:
    """A class of `MODULES` by its name."""
    return getattr(importlib.import_module(MODULES[name]), name)


def make_network(part: str, *, kind: str, **arguments: Any) -> Pretrained:
    """A new network of the config.

    Args:
        part: "Autoencoder" or "UNet".
        kind: "ldm3d" for our own; "monai" or "monai-generative" for that library's.
        arguments: of its class.
    """
    if kind == "ldm3d":
        return find_class(part)(**arguments)
    return find_class(f"Monai{part}")(library=kind, **arguments)


def load_weights(network: nn.Module, weights: dict[str, torch.Tensor], source: Path | str) -> None:
    """Copy weights into a network; every name and shape must match, and what does not is listed."""
    own = network.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - weights.keys()]
    problems += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{source} is of another configuration: {'; '.join(sorted(problems)[:5])}{more}")
    network.load_state_dict(weights)


def weights_hash(*folders: Path | str) -> str:
    """16 hex digits that change with any weight or setting of the networks in `folders`."""
    digest = hashlib.sha256()
    for folder in folders:
        for name in (CONFIG, WEIGHTS):
            with open(Path(folder) / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
