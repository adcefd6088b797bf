"""Are an autoencoder's latents structure or noise? Each channel's spectrum, in seconds and without training stage 2.

    python benchmarks/latent_spectrum.py AUTOENCODER --data DIR
    python benchmarks/latent_spectrum.py                          # the linear path alone, on phantoms

high     share of the power above half of Nyquist; white noise: 0.875
lag 1    correlation of neighbouring positions
moves    root mean square change of the voxels by one deviation of the channel, in per cent of the intensity range

The first row is for comparison: the mean of each block of voxels, which no code can better in smoothness.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from data import load
from protocol import device, write
from torch import Tensor

from ldm3d.metrics.reconstruction import psnr
from ldm3d.metrics.spectrum import high_frequency_share, neighbour_correlation
from ldm3d.models.autoencoder import Autoencoder, LatentSpace
from ldm3d.training.scales import voxel_changes

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("autoencoder", type=Path, nargs="?", help="a folder that stage 1 wrote; if not given, the linear path")
    parser.add_argument("--data", type=Path, help="BIDS folder on the grid of configs/brains-3mm.yaml; phantoms if not given")
    parser.add_argument("--channels", type=int, default=8, help="of the linear path")
    parser.add_argument("--factor", type=int, default=4, help="of the linear path")
    arguments = parser.parse_args()
    data, where = load(arguments.data), device()
    test = data.test.float().to(where)
    if arguments.autoencoder:
        network, name = LatentSpace.from_pretrained(arguments.autoencoder, where).eval(), arguments.autoencoder.name
    else:
        widths = [8] * (arguments.factor.bit_length() - 1)
        network = Autoencoder(arguments.channels, arguments.factor, widths, blocks=0).to(where)
        network.fit_linear_path(data.train[:64].float().to(where))
        name = f"linear-path-f{arguments.factor}c{arguments.channels}"
    rows = [{"channel": "block mean", **described(F.avg_pool3d(test, network.downsampling))}]
    z, quality = latents(network, test)
    found = described(z)
    network.latent_mean.copy_(z.mean(dim=(0, 2, 3, 4)))
    network.latent_std.copy_(z.std(dim=(0, 2, 3, 4)))
    moved = voxel_changes(network, test[:BATCH], change=1.0).tolist()
    for c in range(z.shape[1]):
        rows.append({"channel": str(c), **{key: values[c : c + 1] for key, values in found.items()}, "moves": moved[c]})
    print(f"{name} on {data.name}: {quality:.2f} dB held out\n{'channel':>10} {'high':>6} {'lag 1':>6} {'moves':>6}")
    for row in rows:
        row |= {key: row[key][0] for key in ("high", "lag_1")}
        print(f"{row['channel']:>10} {row['high']:6.2f} {row['lag_1']:6.2f} {100 * row.get('moves', float('nan')):6.2f}")
    print(write(f"latent-spectrum-{name}-{data.name}", [{"autoencoder": name, "data": data.name, "psnr_db": quality}, *rows]))


def described(z: Tensor) -> dict[str, list[float]]:
    return {"high": high_frequency_share(z).tolist(), "lag_1": neighbour_correlation(z).tolist()}


@torch.no_grad()
def latents(network: LatentSpace, volumes: Tensor) -> tuple[Tensor, float]:
    """Means of the posterior of each volume, and the PSNR of what is decoded from them, in dB."""
    z = torch.cat([network.sample(network.encode(batch)) for batch in volumes.split(BATCH)])
    again = torch.cat([network.decode(part) for part in z.split(BATCH)]).clamp(0, 1)
    return z, psnr(again, volumes).mean().item()


if __name__ == "__main__":
    main()
