"""Networks as folders: config.json says how to build one, model.safetensors holds its weights. No pickle.

A folder may come from anywhere. So what config.json describes is first compared with the names and shapes that the weights'
header gives, on a device that holds no numbers: a description of a larger network than was saved takes no memory.
"""

import contextlib
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ldm3d.errors import InputError, shown

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_JSON_BYTES = 2**25
EIGHT_BITS = torch.float8_e4m3fn  # four of the exponent, three of the mantissa
SCALE = ".scale"  # behind a weight's name: of each of its rows, where the file holds it in whole numbers
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Where each class of network is; imported on demand, because some import slow libraries
MODULES = {
    "Autoencoder": "ldm3d.models.autoencoder",
    "UNet": "ldm3d.models.unet",
    "MonaiAutoencoder": "ldm3d.models.monai",
    "MonaiUNet": "ldm3d.models.monai",
    "SegmentationUNet": "ldm3d.models.segmentation",
    "GaussianStart": "ldm3d.start",
}


class Pretrained(nn.Module):
    """A module that can be saved to and loaded from a folder.

    `arguments` holds what its constructor was called with, defaults included; all of them must be JSON values or sequences.
    """

    arguments: dict[str, Any]
    later_arguments: ClassVar[tuple[str, ...]] = ()  # not recorded where they have their defaults, as in older folders
    in_bytes: ClassVar[str | None] = None  # pattern of the names of kernels for which int8 is fine enough
    of_eight_bits: ClassVar[tuple[str, ...]] = ()  # tensors whose values were rounded to `EIGHT_BITS` when they were made

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "__init__" not in vars(cls):
            return
        construct, signature = cls.__init__, inspect.signature(cls.__init__)

        @functools.wraps(construct)
        def construct_and_record(self: Any, *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **kwargs)
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            own = list(bound.arguments.items())[1:]  # but self; a subclass's come after its parents', and stay
            usual = {name: signature.parameters[name].default for name in self.later_arguments}
            self.arguments = {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in own
                if name not in usual or value != usual[name]
            }

        cls.__init__ = construct_and_record  # type: ignore[method-assign]  # with the signature that it wraps

    def save_pretrained(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors.

        Args:
            folder: where.
            dtype: of matrices and kernels in the file. Vectors (biases, norms, statistics of latents), a small share of all,
                keep their precision; tensors `of_eight_bits` take a byte a number if that changes none. torch.int8: kernels
                `in_bytes` as whole numbers of a byte, each row with a scale, all else as torch.float16. None: all keep it.

        Raises:
            InputError: a weight is beyond the range of `dtype`.
        """
        folder = Path(folder)
        weights = self.state_dict()
        rounded = _in_bytes(weights, self.in_bytes) if dtype is torch.int8 and self.in_bytes else weights
        kind = torch.float16 if dtype is torch.int8 else dtype
        weights = {name: _rounded(name, value, kind).contiguous() for name, value in rounded.items()}
        for name in (name for name in self.of_eight_bits if dtype and name in weights):
            short = self.get_buffer(name).to(EIGHT_BITS)
            weights[name] = short if torch.equal(short.float(), self.get_buffer(name).float()) else weights[name]
        folder.mkdir(parents=True, exist_ok=True)
        description = {"class": type(self).__name__, "arguments": self.arguments}
        (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
        save_file(weights, folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Self:
        """The network in evaluation mode; it may be of a subclass, as config.json says.

        Args:
            folder: written by `save_pretrained`.
            device, dtype: where and in what precision; None keeps the dtype of the file, the widest of several.

        Raises:
            InputError: not such a folder, another class's, weights that do not fit the configuration, or NaN among them.
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
        description = read_json(folder / CONFIG)
        found, arguments = description.get("class"), description.get("arguments")
        if not isinstance(found, str) or not isinstance(arguments, dict):
            raise InputError(f"{folder / CONFIG} is damaged: expected JSON with `class` and `arguments`")
        network_class = find_class(found) if found in MODULES else cls
        if found not in (*MODULES, cls.__name__) or not issubclass(network_class, cls):
            raise InputError(f"{folder} holds weights of {shown(found)[1:-1]}, not of {cls.__name__}")
        try:
            with safe_open(folder / WEIGHTS, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                scales = {f"{name}{SCALE}" for name, each in slices.items() if each.get_dtype() == "I8"}
                shapes = {name: tuple(each.get_shape()) for name, each in slices.items() if name not in scales}
            with torch.device("meta"), _at_most(len(shapes), folder / CONFIG):
                sketch = network_class(**arguments)
            _compare({name: tuple(own.shape) for name, own in sketch.state_dict().items()}, shapes, folder / WEIGHTS)
            network, weights = network_class(**arguments), _load(folder / WEIGHTS)
        except SafetensorError as error:
            raise InputError(f"{folder / WEIGHTS} is damaged: {error}") from None
        except InputError as error:
            raise InputError(str(error) if str(error).startswith(str(folder)) else f"{folder / CONFIG}: {error}") from None
        except (MemoryError, OSError):
            raise
        except Exception as error:  # whatever arguments of wrong kinds and sizes set off in a constructor
            reason = shown(" ".join(str(error).split()))
            raise InputError(f"{folder / CONFIG} was written by another version of ldm3d, or is damaged: {reason}") from None
        _check_numbers(weights, folder / WEIGHTS)
        network.to(functools.reduce(torch.promote_types, (value.dtype for value in weights.values())))
        load_weights(network, weights, folder / WEIGHTS)
        return network.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file; those of eight bits as float32, in which they can be computed with."""
    stored = load_file(path)
    for name in [name for name, value in stored.items() if value.dtype == torch.int8]:
        scale = stored.get(f"{name}{SCALE}")
        if scale is not None and scale.shape == stored[name].shape[:1]:
            rows = stored[name].float() * stored.pop(f"{name}{SCALE}").float().reshape(-1, *[1] * (stored[name].ndim - 1))
            stored[name] = rows
    return {name: value.float() if value.dtype == EIGHT_BITS else value for name, value in stored.items()}


def _in_bytes(weights: dict[str, torch.Tensor], pattern: str) -> dict[str, torch.Tensor]:
    """The same with kernels of that pattern as int8, and the scale of each of their rows: a row's largest is 127 of it."""
    packed = {}
    for name, value in weights.items():
        if re.search(pattern, name) and value.ndim > 1:
            scale = value.float().flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            rows = value.float() / scale.reshape(-1, *[1] * (value.ndim - 1))
            packed[name], packed[f"{name}{SCALE}"] = rows.round().to(torch.int8), scale
        else:
            packed[name] = value
    return packed


def _rounded(name: str, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor as it is saved, see `Pretrained.save_pretrained`."""
    if dtype is None or value.ndim < 2 or value.dtype == torch.int8:
        return value
    rounded = value.to(dtype)
    if not torch.isfinite(rounded).all():
        raise InputError(f"{name} holds values beyond the range of {rounded.dtype}; save it as torch.bfloat16 or float32")
    return rounded


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
    own, given = ({name: tuple(value.shape) for name, value in each.items()} for each in (network.state_dict(), weights))
    _compare(own, given, source)
    network.load_state_dict(weights)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: too large, no JSON, nested too deeply, NaN or infinite numbers, or anything but an object.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}")

    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, at most {MAX_JSON_BYTES:,} are read")
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged or of another version of ldm3d: {shown(str(error))}") from None
    return values


@contextlib.contextmanager
def _at_most(tensors: int, source: Path) -> Iterator[None]:
    """Raise InputError as soon as the network that is built inside has more parameters than there are tensors."""
    left = itertools.count(tensors, -1)

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and next(left) <= 0:
            raise InputError(
                f"{source} is of another configuration: it describes more than the {tensors} tensors of {WEIGHTS}"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _compare(own: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]], source: Path | str) -> None:
    """Raise InputError unless names and shapes of a network's tensors and those of the given weights are the same."""
    problems = [f"{name} is missing" for name in own.keys() - given.keys()]
    problems += [f"{shown(name)[1:-1]} is unknown" for name in given.keys() - own.keys()]
    problems += [
        f"{name} is {given[name]} instead of {own[name]}" for name in own.keys() & given.keys() if given[name] != own[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{source} is of another configuration: {'; '.join(sorted(problems)[:5])}{more}")


def _check_numbers(weights: dict[str, torch.Tensor], source: Path) -> None:
    """Raise InputError for a tensor of another type than DTYPES, or with NaN or infinite values in it."""
    for name, value in weights.items():
        if value.dtype not in DTYPES:
            raise InputError(f"{source}: {name} is of type {value.dtype}; weights are floating-point numbers")
        # One pass and no copy: NaN and infinity show in the extremes
        if value.numel() and not torch.isfinite(torch.stack(torch.aminmax(value))).all():
            raise InputError(f"{source}: {name} holds NaN or infinite values; take an earlier checkpoint, or train it again")


def weights_hash(*folders: Path | str) -> str:
    """16 hex digits that change with any weight or setting of the networks in `folders`."""
    digest = hashlib.sha256()
    for folder in folders:
        for name in (CONFIG, WEIGHTS):
            with open(Path(folder) / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
