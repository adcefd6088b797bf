"""A pipeline's folder: networks as safetensors, everything else as JSON; what is written can be read again, or nothing is."""

import shutil
from pathlib import Path
from typing import Any

import torch

from ldm3d import precision
from ldm3d.description import DESCRIPTION, PARTS, START, check_parts, hash_of_model, read_description, write_description
from ldm3d.devices import check_convolutions
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.unet import LatentUNet
from ldm3d.shipped import model_folder
from ldm3d.start import GaussianStart


def write_folder(pipeline: Any, folder: Path, dtype: torch.dtype | None, rounded_from: str | None = None) -> str:
    """Write a pipeline; see `Pipeline.save_pretrained`. Returns the hash of the weights as they are in the files."""
    pipeline.autoencoder.save_pretrained(folder / "autoencoder", dtype)
    pipeline.unet.save_pretrained(folder / "unet", dtype)
    if pipeline.start is not None:
        pipeline.start.save_pretrained(folder / START, dtype)
    else:
        shutil.rmtree(folder / START, ignore_errors=True)  # an earlier model's
    saved = hash_of_model(folder)
    if rounded_from is None and dtype and pipeline.model_hash not in (saved, "unsaved"):
        rounded_from = pipeline.model_hash
    parts = {name: getattr(pipeline, name) for name in PARTS} | {"starts": pipeline.start is not None}
    write_description(folder / DESCRIPTION, parts, rounded_from)
    return saved


def read_folder(
    folder: Path | str, device: str | torch.device | None, dtype: torch.dtype | None, revision: str | None = None
) -> dict[str, Any]:
    """The arguments of a `Pipeline`; see `Pipeline.from_pretrained`."""
    folder = model_folder(folder, revision)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or precision.dtype("auto", device)
    parts = read_description(folder / DESCRIPTION)
    autoencoder = LatentSpace.from_pretrained(folder / "autoencoder", device, dtype)
    unet = LatentUNet.from_pretrained(folder / "unet", device, dtype)
    check_convolutions(torch.device(device), dtype)
    start = GaussianStart.from_pretrained(folder / START, device, torch.float32) if parts.pop("starts") else None
    check_parts(folder, autoencoder, unet, start, parts)
    return {"autoencoder": autoencoder, "unet": unet, "start": start, "model_hash": hash_of_model(folder), **parts}
