"""Features of volumes, by which distributions are compared.

An extractor is any callable, a torch module for example, that takes volumes (N, C, X, Y, Z) in [0, 1] to features (N, D);
those here take one channel.
There are four here: `RandomFeatures`, which needs no weights, `SegmenterFeatures`, of a segmentation network, and two networks
whose weights the user gives, `MedicalNet` and `RadImageNet`. Figures are comparable only for the same extractor, grid and
intensity scaling.
"""

import importlib
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from monai.networks.nets import ResNetFeatures, resnet50
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm3d.errors import InputError
from ldm3d.models.foreign import read_weights
from ldm3d.models.pretrained import Pretrained, load_weights
from ldm3d.randomness import generator

Extractor = Callable[[Tensor], Tensor]

SCALES = (1, 2, 4)  # voxels that are averaged along each axis
WIDTHS = (1, 8, 16, 32)  # channels of the random convolutions
SLICE_SIDE = 224  # pixels, of what RadImageNet's networks were trained on
MIN_DEVIATION = 0.01  # of the median deviation, for features that do not vary among real volumes


def extract(volumes: Iterable[NDArray | Tensor], extractor: Extractor, device: torch.device | str = "cpu") -> Tensor:
    """Features of every volume, one volume in memory at a time.

    Args:
        volumes: each (C, X, Y, Z) in [0, 1].
        extractor: see the top of this file; a module is moved to `device` and set to evaluation mode.
        device: where to compute.

    Returns:
        (N, D), float32 on the CPU.

    Raises:
        InputError: no volume, or an extractor whose answer for one volume is not (1, D).
    """
    if isinstance(extractor, nn.Module):
        extractor = extractor.to(device).eval()
    found: list[Tensor] = []
    with torch.inference_mode():
        for volume in volumes:
            volume = torch.as_tensor(np.ascontiguousarray(volume, np.float32), device=device)[None]  # (1, C, X, Y, Z)
            features = extractor(volume)
            if features.ndim != 2 or len(features) != 1 or (found and features.shape != found[0].shape):
                expected = tuple(found[0].shape) if found else "(1, D)"
                raise InputError(
                    f"the extractor makes {tuple(features.shape)} of a volume {tuple(volume.shape)}, not {expected}; "
                    "average its maps over positions, or flatten them by `spatial_features`"
                )
            found.append(features.float().cpu())
    if not found:
        raise InputError("there is no volume to compute features of; give at least one")
    return torch.cat(found)


class RandomFeatures(nn.Module):
    """220 features without trained weights: moments, and random convolutions.

    - 108 moments: mean and standard deviation of the intensity and of its gradient's magnitude, at 1, 2 and 4 voxels, over
      the volume and over each of its eight octants, so that left and right, front and back, top and bottom differ.
    - 112 responses: mean and standard deviation of each channel of three random 3 x 3 x 3 convolutions with ReLU, at
      1, 2 and 4 voxels. Random filters respond to texture nearly as trained ones do (Saxe et al. 2011). Every filter sums to
      zero, so that it responds to structure and not to brightness.

    They are sensitive to blur, noise, contrast, size and position, but not to the anatomy that a radiologist would name.
    Their scales differ: `standardise` them before computing distances.

    Args:
        seed: of the filters; features of different seeds are not comparable.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        for layer, (inputs, outputs) in enumerate(pairwise(WIDTHS)):
            weight = torch.randn(outputs, inputs, 3, 3, 3, generator=generator("features", seed, layer))
            weight -= weight.mean(dim=(1, 2, 3, 4), keepdim=True)
            self.register_buffer(f"weight{layer}", weight * 2**0.5 / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1))

    def forward(self, volumes: Tensor) -> Tensor:
        """(N, 1, X, Y, Z) with sides of 16 or more -> (N, 220)."""
        if volumes.ndim != 5 or volumes.shape[1] != 1 or min(volumes.shape[2:]) < 16:
            raise InputError(
                f"volumes are {tuple(volumes.shape)}; these features need (N, 1, X, Y, Z) with sides of 16 or more"
            )
        found = []
        for scale in SCALES:
            x = F.avg_pool3d(volumes, scale)
            for quantity in (x, _forward_gradient(x)):
                found += [*_mean_and_deviation(quantity, 1), *_mean_and_deviation(quantity, 2)]
        for x in self._responses(volumes):
            found += _mean_and_deviation(x, 1)
        return torch.cat(found, dim=1)

    def maps(self, volumes: Tensor) -> Tensor:
        """Responses of the last convolution, for `spatial_features`: (N, 1, X, Y, Z) -> (N, 32, X / 4, Y / 4, Z / 4)."""
        return self._responses(volumes)[-1]

    def _responses(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in range(len(WIDTHS) - 1):
            x = F.avg_pool3d(x, 2) if layer else x
            x = F.conv3d(x, getattr(self, f"weight{layer}"), padding=1).relu()
            found.append(x)
        return found


def _forward_gradient(x: Tensor) -> Tensor:
    """Magnitude of forward differences, one voxel less on each axis."""
    inner = x[..., :-1, :-1, :-1]
    a, b, c = x[..., 1:, :-1, :-1] - inner, x[..., :-1, 1:, :-1] - inner, x[..., :-1, :-1, 1:] - inner
    return (a**2 + b**2 + c**2).sqrt()


def _mean_and_deviation(x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Over each of `parts` cubed boxes: two of (N, C * parts^3)."""
    mean, square = (F.adaptive_avg_pool3d(v, parts) for v in (x, x**2))
    return mean.flatten(1), (square - mean**2).clamp_min(0).sqrt().flatten(1)


class MedicalNet(nn.Module):
    """512 features of a 3D ResNet-10 trained on 23 medical data sets (Chen et al. 2019), averaged over positions.

    Volumes are brought to zero mean and unit variance, as in its training.

    Args:
        weights: the published file (resnet_10_23dataset.pth), or its state dict as safetensors.

    Raises:
        InputError: no such file, or other weights.
    """

    def __init__(self, weights: Path | str):
        super().__init__()
        self.network = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1)
        load_weights(self.network, _read(weights), weights)
        self.eval().requires_grad_(False)

    def forward(self, volumes: Tensor) -> Tensor:
        """(N, 1, X, Y, Z) -> (N, 512)."""
        return self.maps(volumes).mean(dim=(2, 3, 4))

    def maps(self, volumes: Tensor) -> Tensor:
        """The last maps, for `spatial_features`: (N, 1, X, Y, Z) -> (N, 512, x, y, z)."""
        deviation, mean = torch.std_mean(volumes, dim=(1, 2, 3, 4), keepdim=True)
        return self.network((volumes - mean) / deviation.clamp_min(1e-6))[-1]


class RadImageNet(nn.Module):
    """2048 features of a 2D ResNet-50 trained on 1.35 million CT, MRI and ultrasound images (Mei et al. 2022).

    The middle slices of the three planes go through it one by one, and their features are averaged. As in its training, a
    slice has 224 pixels along its longer side, three equal channels and intensities from -1 to 1.

    Args:
        weights: state dict of a ResNet-50 with torchvision's names, or with those of the published PyTorch file, which counts
            layers (backbone.0 for conv1, backbone.4 for layer1); .pt or safetensors. A classifier `fc` in it is not used.
            Files converted from Keras hold another network (strides elsewhere, biases) and are refused.

    Raises:
        InputError: no such file, or other weights.
    """

    def __init__(self, weights: Path | str):
        super().__init__()
        self.network = resnet50(
            spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, feed_forward=False, pretrained=False
        )
        places = {"0": "conv1", "1": "bn1", **{str(layer + 3): f"layer{layer}" for layer in range(1, 5)}}
        state = {}
        for name, value in _read(weights).items():
            root, _, rest = name.removeprefix("backbone.").partition(".")
            state[f"{places.get(root, root)}.{rest}"] = value
        load_weights(self.network, {name: value for name, value in state.items() if not name.startswith("fc.")}, weights)
        self.eval().requires_grad_(False)

    def forward(self, volumes: Tensor) -> Tensor:
        """(N, 1, X, Y, Z) -> (N, 2048)."""
        found = []
        for axis in (2, 3, 4):
            middle = volumes.select(axis, volumes.shape[axis] // 2)  # (N, 1, rows, columns)
            size = [max(round(side * SLICE_SIDE / max(middle.shape[2:])), 32) for side in middle.shape[2:]]
            middle = F.interpolate(middle, size, mode="bilinear", antialias=True)
            found.append(self.network(2 * middle.repeat(1, 3, 1, 1) - 1))
        return torch.stack(found).mean(dim=0)


class SegmenterFeatures(nn.Module):
    """Features of a network that divides brains into tissues, which respond to anatomy more than to texture.

    Of volumes with several channels, the first.

    Args:
        folder: written by `ldm3d segmenter`.

    Raises:
        InputError: no segmentation network is there.
    """

    def __init__(self, folder: Path | str):
        super().__init__()
        self.network: Any = Pretrained.from_pretrained(folder).requires_grad_(False)
        if not hasattr(self.network, "features"):
            raise InputError(f"{folder} holds no segmentation network; give a folder that `ldm3d segmenter` wrote")

    def forward(self, volumes: Tensor) -> Tensor:
        """(N, C, X, Y, Z) -> (N, D)."""
        return self.network.features(volumes[:, :1])

    def maps(self, volumes: Tensor) -> Tensor:
        """Probabilities of the classes, for `spatial_features`: (N, C, X, Y, Z) -> (N, 1 + groups, X, Y, Z)."""
        return self.network(volumes[:, :1]).softmax(dim=1)


class OfFirstChannel(nn.Module):
    """Features of the first channel of volumes alone: of the first of several contrasts.

    Args:
        extractor: of volumes with one channel.
    """

    def __init__(self, extractor: Extractor):
        super().__init__()
        self.extractor = extractor
        if hasattr(extractor, "maps"):
            self.maps = lambda volumes: extractor.maps(volumes[:, :1])

    def forward(self, volumes: Tensor) -> Tensor:
        """(N, C, X, Y, Z) -> (N, D)."""
        return self.extractor(volumes[:, :1])


def _read(weights: Path | str) -> dict[str, Tensor]:
    if not Path(weights).is_file():
        raise InputError(f"weights {weights} do not exist; give a file, or use the extractor that needs none")
    return read_weights(Path(weights))


def load_extractor(name: str) -> Extractor:
    """An extractor by its name on the command line.

    Args:
        name: "random", "segmenter:FOLDER", "medicalnet:FILE", "radimagenet:FILE", or "package.module:function" of a function
            without arguments that returns an extractor.

    Raises:
        InputError: none of these, or weights that do not fit.
    """
    kind, _, rest = name.partition(":")
    if name == "random":
        return RandomFeatures()
    networks = {"segmenter": SegmenterFeatures, "medicalnet": MedicalNet, "radimagenet": RadImageNet}
    if kind in networks:
        return networks[kind](rest)
    return imported(name, "extractor", "random, segmenter:FOLDER, medicalnet:FILE, radimagenet:FILE or ")()


def imported(name: str, kind: str, alternatives: str = "") -> Any:
    """The function "package.module:function"; InputError, which names the kind and other choices, if there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{kind} {name!r} cannot be imported ({error}); give {alternatives}package.module:function, with its folder on "
            "PYTHONPATH"
        ) from None


def standardise(real: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Bring every feature to mean 0 and deviation 1 among real volumes, and others to the same scale.

    Otherwise distances would be those of the few features with the largest values. A feature that hardly varies among real
    volumes (an empty corner) is divided by 1% of the median deviation.

    Args:
        real: (N, D); always the reference, never synthetic volumes.
        others: (M, D) each.

    Returns:
        All of them in the same order.
    """
    deviation, mean = torch.std_mean(real.double(), dim=0)
    deviation = deviation.clamp_min(max(MIN_DEVIATION * float(deviation.median()), 1e-12))
    return tuple((features.double() - mean) / deviation for features in (real, *others))


def read_features(path: Path | str) -> tuple[list[str] | None, Tensor]:
    """Features that were computed by another program.

    Args:
        path: .npy with an array (N, D); or .tsv or .csv with a header, an id in the first column and numbers in the others.

    Returns:
        The ids (None for .npy), and (N, D) in float64.

    Raises:
        InputError: no such file, another format, or cells that are not numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"features {path} do not exist; give a .npy, .tsv or .csv file")
    ids = None
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix in (".tsv", ".csv"):
            # As text: an id of 007 is not a number
            table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
            ids, values = table.iloc[:, 0].tolist(), table.iloc[:, 1:].to_numpy()
        else:
            raise InputError(f"features {path} are neither .npy nor .tsv nor .csv; write them as one of these")
        values = torch.from_numpy(np.asarray(values, np.float64))
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"features {path} cannot be read ({error}); numbers alone are expected, one row a volume") from None
    if values.ndim != 2 or not values.numel():
        raise InputError(f"features {path} are {tuple(values.shape)}; give (volumes, features), one row a volume")
    return ids, values
