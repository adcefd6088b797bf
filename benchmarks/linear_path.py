"""The autoencoder's linear path before any training: PSNR of held-out phantoms, with and without neighbouring blocks."""

import argparse

import numpy as np
import torch
from protocol import write

from ldm3d.data.phantoms import make_phantom
from ldm3d.evaluation.metrics import psnr
from ldm3d.models.autoencoder import Autoencoder

SHAPE, TRAIN, TEST = (40, 48, 40), 48, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, nargs="+", default=[2, 4, 8])
    arguments = parser.parse_args()
    images = np.stack([make_phantom(SHAPE, seed=1, index=i)[0] for i in range(TRAIN + TEST)])
    images = (images / np.percentile(images, 99.8, axis=(1, 2, 3), keepdims=True)).clip(0, 1)
    volumes = torch.from_numpy(images.astype(np.float32))[:, None]
    train, test = volumes[:TRAIN], volumes[TRAIN:]
    rows = []
    print(f"{'factor':>6} {'channels':>8} {'blocks alone (PCA)':>19} {'with neighbours':>16}   PSNR in dB")
    for factor, widths in ((4, [8, 8]), (8, [8, 8, 8])):
        for channels in arguments.channels:
            network = Autoencoder(channels, factor, widths, blocks=0)
            network.fit_linear_path(train)
            with torch.no_grad():
                joined = psnr(network.decode(network.sample(network.encode(test))), test).mean().item()
                alone = psnr(pca(network, test, train), test).mean().item()
            print(f"{factor:6} {channels:8} {alone:19.2f} {joined:16.2f}")
            rows.append({"factor": factor, "channels": channels, "pca_psnr_db": alone, "neighbours_psnr_db": joined})
    print(write("linear-path", rows))


def pca(network: Autoencoder, test: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """Inverse principal components: each block from its own latents, by least squares on the training volumes."""
    factor = network.downsampling

    def rows(volumes):
        x = volumes.unfold(2, factor, factor).unfold(3, factor, factor).unfold(4, factor, factor)
        return x.reshape(-1, factor**3), x.shape

    def latents(volumes):
        z = network.analysis(volumes).flatten(2).transpose(1, 2).reshape(-1, network.latent_channels)
        return torch.cat([z, torch.ones(len(z), 1)], dim=1)

    solution = torch.linalg.lstsq(latents(train), rows(train)[0]).solution
    _, shape = rows(test)
    x = (latents(test) @ solution).reshape(shape)  # (N, 1, x, y, z, f, f, f)
    return x.permute(0, 1, 2, 5, 3, 6, 4, 7).reshape(test.shape)


if __name__ == "__main__":
    main()
