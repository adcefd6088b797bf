"""ldm3d: latent diffusion for 3D brain MRI.

>>> pipe = ldm3d.Pipeline.from_pretrained("runs/toy/model")
>>> pipe(age=72, sex="F", ventricular_volume_ml=45).save("out")
"""

__version__ = "0.1.0"
__all__ = ["Autoencoder", "Pipeline", "UNet"]


def __getattr__(name: str):
    # Looked up when asked for: `import ldm3d` and `ldm3d --help` need not wait for torch
    if name == "Pipeline":
        from ldm3d.pipeline import Pipeline

        return Pipeline
    if name == "Autoencoder":
        from ldm3d.models.autoencoder import Autoencoder

        return Autoencoder
    if name == "UNet":
        from ldm3d.models.unet import UNet

        return UNet
    raise AttributeError(f"module 'ldm3d' has no attribute {name!r}")
