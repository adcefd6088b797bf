"""ldm3d: latent diffusion for 3D brain MRI.

>>> pipe = ldm3d.Pipeline.from_pretrained("runs/toy/model")
>>> pipe(age=72, sex="F", ventricular_volume_ml=45).save("out")
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Autoencoder", "Pipeline", "UNet"]

_WHERE = {"Autoencoder": "ldm3d.models.autoencoder", "Pipeline": "ldm3d.pipeline", "UNet": "ldm3d.models.unet"}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: `import ldm3d` and `ldm3d --help` need not wait for torch
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'ldm3d' has no attribute {name!r}")
