"""ldm3d: latent diffusion for 3D brain MRI."""
