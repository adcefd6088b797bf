"""From labels to brains by MONAI's SPADE diffusion U-Net, on the same latents and label maps.

    python benchmarks/spade.py CONFIG --segmenter SEGMENTER [--set key=value] [--minutes 12] [--num 40] [--steps 12]

CONFIG is given a condition of kind labels (configs/conditions/masks-to-brain.yaml), and was trained. MONAI's network (Park et
al. 2019, in a U-Net) sees the same channels of the label map at every normalisation, and learns the noise of its DDPM
scheduler (1,000 steps, scaled linear betas) with Adam for MINUTES of CPU time. It samples by DDIM in 50 steps. Both are
decoded by the same autoencoder. Of held-out scans, as `perception.py` prints them: Fréchet distances to the true volumes, and
Dice of the labels that the segmenter finds with those that were given.
"""

import time

import numpy as np
import pandas as pd
import torch
from held_out import HeldOut, options
from monai.networks.nets import SPADEDiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from numpy.typing import NDArray
from perception import distances, overlaps
from torch import Tensor, nn
from tqdm import tqdm

from ldm3d.conditions import ImageChannels
from ldm3d.config.conditions import LabelsCondition
from ldm3d.data.latents import condition_file
from ldm3d.precision import dtype
from ldm3d.rulers.segmenter import Segmenter
from ldm3d.shipped import segmenter_folder

BATCH, RATE = 16, 2e-4
BETAS = {"num_train_timesteps": 1000, "schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--segmenter", required=True)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--num", type=int, default=40)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    held = HeldOut.of(asked.config, asked.set)
    (labels,) = (each for each in held.config.given_conditions if isinstance(each, LabelsCondition))
    network, some = trained(held, labels, asked.minutes), held.some(asked.num)
    makers = {
        "truth": held.truth,
        "reconstruction": held.reconstructed,
        "ldm3d": lambda i: held.drawn(i, 1, asked.steps)[0],
        "SPADE": lambda i: drawn(held, network, labels, i),
    }
    volumes = {kind: np.stack([make(i) for i in tqdm(some, desc=kind)]) for kind, make in makers.items()}
    for kind in ("ldm3d", "SPADE"):
        errors = np.square(volumes[kind] - volumes["truth"]).mean(axis=(1, 2, 3, 4))
        print(f"PSNR over the grid, {kind}: {-10 * np.log10(errors).mean():.1f} dB")
    distances(volumes, asked.segmenter)
    overlaps(held, labels, some, volumes, Segmenter.from_pretrained(segmenter_folder(asked.segmenter)))


def trained(held: HeldOut, labels: LabelsCondition, minutes: float) -> nn.Module:
    """MONAI's network, of about as many parameters as ldm3d's."""
    folder, autoencoder = held.config.latents_folder, held.pipeline.autoencoder
    moments, maps = np.load(folder / "moments.npy"), np.load(folder / condition_file(labels.name))
    rows = np.flatnonzero(_training(held))
    torch.manual_seed(0)
    network = SPADEDiffusionModelUNet(
        spatial_dims=3,
        in_channels=autoencoder.latent_channels,
        out_channels=autoencoder.latent_channels,
        label_nc=maps.shape[1],
        num_res_blocks=1,
        channels=(32, 64),
        attention_levels=(False, True),
        norm_num_groups=8,
        num_head_channels=32,
        spade_intermediate_channels=16,
    )
    ours, theirs = (sum(p.numel() for p in each.parameters()) / 1e6 for each in (held.pipeline.unet, network))
    scheduler, optimizer = DDPMScheduler(**BETAS), torch.optim.Adam(network.parameters(), RATE)
    rng, start, seconds, step = np.random.default_rng(0), time.process_time(), 60 * minutes, 0
    with tqdm(total=round(seconds), desc="SPADE", unit="s CPU") as bar:
        while (passed := time.process_time() - start) < seconds:
            optimizer.param_groups[0]["lr"] = RATE * (1 - passed / seconds)
            chosen = rng.choice(rows, BATCH, replace=False)
            with torch.no_grad():
                x = autoencoder.normalise(autoencoder.sample(torch.from_numpy(moments[chosen]))) / scale_of(held)
            noise, times = torch.randn_like(x), torch.randint(0, 1000, (BATCH,))
            noisy = scheduler.add_noise(x, noise, times)
            with torch.autocast("cpu", dtype("auto", "cpu")):
                loss = nn.functional.mse_loss(network(noisy, times, torch.from_numpy(maps[chosen])).float(), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            bar.update(round(time.process_time() - start) - bar.n)
    size = f"{theirs:.1f} M parameters (ldm3d's {ours:.1f} M)"
    print(f"MONAI's SPADE U-Net, {size}: {step} steps of {BATCH} in {minutes:g} CPU minutes")
    return network.eval()


def _training(held: HeldOut) -> NDArray:
    """Which rows of the latent cache are of training scans."""
    keys = pd.read_csv(held.config.latents_folder / "scans.tsv", sep="\t", dtype=str)["key"]
    return keys.isin(set(held.trained["key"])).to_numpy()


@torch.no_grad()
def drawn(held: HeldOut, network: nn.Module, labels: LabelsCondition, i: int) -> NDArray:
    """One sample of a scan, (C, X, Y, Z)."""
    pipeline = held.pipeline
    channels: Tensor = ImageChannels([labels], pipeline.autoencoder).encoded(labels, held.given(i).volumes[labels.name][None])
    scheduler, random = DDIMScheduler(**BETAS, clip_sample=False), torch.Generator().manual_seed(i)
    scheduler.set_timesteps(50)
    shape = (1, pipeline.autoencoder.latent_channels, *channels.shape[2:])
    z = torch.randn(shape, generator=random)
    for t in scheduler.timesteps:
        z, _ = scheduler.step(network(z, t[None], channels), t, z)
    return pipeline.cropped(pipeline.decode(z * scale_of(held))[0].float().cpu().numpy())


def scale_of(held: HeldOut) -> Tensor:
    """Standard deviations of the channels of normalised latents, (c, 1, 1, 1): DDPM expects about one."""
    return torch.tensor(held.pipeline.scales or [1.0])[:, None, None, None]


if __name__ == "__main__":
    main()
