"""What generated volumes follow from, by name: the model's settings, its weights, and what computed them."""

import hashlib
import json
from typing import Any

import torch

from ldm3d.config.conditions import without_sources
from ldm3d.devices import described
from ldm3d.generation.series import Origin


def computing_of(pipeline: Any, decode: str) -> dict[str, Any]:
    """See `Pipeline.computing`; `decode` is how latents are decoded."""
    device = pipeline.device
    return {
        "device": described(device),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "threads": (pipeline.threads or torch.get_num_threads()) if device.type == "cpu" else None,
        "group": pipeline.group_size,
        "decode": decode,
        "compiled": pipeline.compiled,
        "torch": torch.__version__,
    }


def origin_of(pipeline: Any) -> Origin:
    """See `Pipeline.origin`."""
    schema, process, grid = (part.to_dict() for part in (pipeline.schema, pipeline.process, pipeline.grid))
    parts = [schema, process, pipeline.target, pipeline.crop, grid]
    parts += [pipeline.suffix] if pipeline.suffix != "T1w" else []  # as in series that were begun before there was another
    parts += [pipeline.suffixes] if len(pipeline.suffixes) > 1 else []
    parts += [pipeline.scales] if pipeline.scales else []
    parts += [without_sources(each) for each in pipeline.conditions]
    settings = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    names = pipeline.mark, pipeline.model_hash, settings
    facts = pipeline.suffixes, pipeline.skull_stripped
    decoding = pipeline.computing, pipeline.decode_mode == "auto"
    return Origin(pipeline.output_grid, pipeline.schema, *facts, *names, *decoding, pipeline.images)
