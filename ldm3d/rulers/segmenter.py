"""A small segmentation network, trained on scans with label maps: measures volumes that the built-in measure cannot."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm3d.models.segmentation import SegmentationUNet
from ldm3d.shipped import segmenter_folder

# number -> volume (1, X, Y, Z) in [0, 1], and shares of its voxels (1 + groups, X, Y, Z), see `ldm3d.data.labels`
Load = Callable[[int], tuple[NDArray, NDArray]]


class Segmenter:
    """Volumes of structures: of the same form as `ldm3d.rulers.volumetry.measure_volumes`.

    Args:
        network: trained.
    """

    def __init__(self, network: SegmentationUNet):
        self.network = network.eval()

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str | torch.device = "cpu") -> "Segmenter":
        """From a folder that `SegmentationUNet.save_pretrained` wrote, or a model's, shipped ones included; in float32."""
        return cls(SegmentationUNet.from_pretrained(segmenter_folder(folder), device, torch.float32))

    @property
    def names(self) -> list[str]:
        """Of the classes: class k + 1 is the k-th."""
        return list(self.network.groups)

    @torch.inference_mode()
    def classes(self, volume: NDArray) -> NDArray:
        """Volume (1, X, Y, Z) or (X, Y, Z) in [0, 1] -> the most probable class of each voxel, (X, Y, Z) uint8."""
        return self._logits(volume).argmax(dim=0).to(torch.uint8).cpu().numpy()

    def _logits(self, volume: NDArray) -> Tensor:
        """(1 + groups, X, Y, Z)."""
        device = next(self.network.parameters()).device
        x = torch.from_numpy(np.ascontiguousarray(volume, np.float32)).to(device).view(1, 1, *volume.shape[-3:])
        return self.network(x)[0]

    @torch.inference_mode()
    def __call__(self, volume: NDArray, spacing_mm: Sequence[float]) -> dict[str, float]:
        """Volume (X, Y, Z) in [0, 1] -> {quantity: ml}: the sum of each class's probability, and totals of them.

        The network learns the shares of tissues in a voxel, so a voxel that is half ventricle counts as half.
        """
        filled = self._logits(volume).softmax(dim=0).flatten(1).double().sum(dim=1).tolist()
        voxel_ml = float(np.prod(spacing_mm)) / 1000
        found = {name: share * voxel_ml for name, share in zip(self.names, filled[1:])}
        return found | {name: sum(found[part] for part in parts) for name, parts in self.network.totals.items()}


def dice(network: SegmentationUNet, load: Load, numbers: Sequence[int]) -> dict[str, list[float]]:
    """Overlap of each group with the label map (Dice 1945), by the class with most of a voxel; NaN where both are empty."""
    found: dict[str, list[float]] = {name: [] for name in network.groups}
    device = next(network.parameters()).device
    with torch.inference_mode():
        for i in numbers:
            volume, shares = load(i)
            predicted = network(torch.from_numpy(volume).float().to(device)[None])[0].argmax(dim=0).cpu().numpy()
            classes = shares.argmax(axis=0)
            for k, name in enumerate(network.groups):
                a, b = predicted == k + 1, classes == k + 1
                total = a.sum() + b.sum()
                found[name].append(2 * float((a & b).sum()) / total if total else float("nan"))
    return found
