"""Part 4: configs/brain-1mm.yaml as far as the time goes: steps and volumes a second, memory, pictures."""

from functools import partial
from pathlib import Path

from gpu_parts.brains import FEW, TINY, draw
from gpu_parts.part import Part
from gpu_parts.speed import LARGE
from gpu_parts.training import encode_all, fit, make_data, pictures, write_config
from ldm3d.config.read import load_config

SUBJECTS = 48  # phantoms
QUIET = {"log_every": 10, "validate_every": 10**6, "preview_every": 10**6, "checkpoint_every": 10**6}
LOUDER = {"data": {"splits": {"validation": 0.1, "test": 0.2}}} | {
    stage: {"training": {**QUIET, "warmup_steps": 50}} for stage in ("autoencoder", "diffusion")
}
SMALLER = {
    "data": {**TINY["data"], "grid": {"shape": [16, 24, 16], "spacing_mm": 10}},
    "autoencoder": {"network": {"channels": [4, 8, 8]}, "linear_path_steps": 2, "training": FEW},
    "diffusion": {"network": {"channels": [8, 16, 16], "head_channels": 8}, "training": FEW},
    "generation": TINY["generation"],
}


def work(part: Part, work: Path, data: Path | None) -> None:
    """Each item needs what the one before has made; generation needs no good model."""
    path = write_config(LARGE, work / "brain-1mm", data, SMALLER if part.dry else LOUDER)
    config = load_config(path)
    for name, call in (
        ("data", lambda: make_data(config, *((14, 1) if part.dry else (SUBJECTS,)))),
        ("autoencoder", fit(part, "autoencoder", path, 150 if part.dry else 100)),
        ("encode", partial(encode_all, path)),
        ("diffusion", fit(part, "diffusion", path, 150 if part.dry else 70)),
    ):
        if part.do(name, call) is None:
            return
    for group in (1, 2) if part.dry else (8, 32, 1, 16):
        part.do(f"volumes in groups of {group}", partial(draw, config, group), needs=0 if part.dry else 15)
    part.do("pictures", partial(pictures, part, config, 2 if part.dry else 6), needs=0 if part.dry else 15)
