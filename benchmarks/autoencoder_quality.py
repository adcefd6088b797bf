"""Autoencoders: PSNR of held-out volumes against training time, ldm3d's beside MONAI's AutoencoderKL.

    python benchmarks/autoencoder_quality.py [--bids FOLDER] [--set KEY=VALUE] [--minutes 3] [--long-minutes 30]

Both have the same latent shape, volumes, loss (the config's L1, L2 and KL), precision and machine, and train in turns of a few
seconds in one process, so that whatever else the machine does slows all alike; only the time inside a side's own turns counts.
MONAI's side is the 3D latent diffusion tutorial's (channels 32, 64, 64, batch 2, Adam at 1e-4), without its perceptual and
adversarial losses: its steps are cheaper than what a user would run. "monai-tuned" is the same at 1e-3 with a cosine.
ldm3d's side is the config's network, batch, optimiser and learning rate; its cosine ends with the time given.

Without --bids the data are phantoms (configs/toy.yaml); with it, a BIDS dataset on configs/brains-3mm.yaml's grid. Where its
participants.tsv has a column `anatomy` (rendered brains), the last three anatomies are held out, else the test split is.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from data import Data, load
from monai.networks.nets import AutoencoderKL
from protocol import device, write
from turns import Training, in_turns

from ldm3d.metrics.reconstruction import psnr
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.precision import bf16_is_fast
from ldm3d.training.ema import EMA
from ldm3d.training.linear_path import train_linear_path, volumes_for
from ldm3d.training.losses import kl_divergence
from ldm3d.training.optimizer import make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bids", type=Path, help="rendered or real brains; phantoms if not given")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the config")
    parser.add_argument("--minutes", type=float, default=3, help="of each side")
    parser.add_argument("--long-minutes", type=float, help="instead: MONAI for so long, ldm3d for 1/10 and 1/20 of it")
    arguments = parser.parse_args()
    data = load(arguments.bids, overrides=arguments.set)
    print(f"{data.name}: {len(data.train)} volumes to train on, {len(data.test)} held out, {tuple(data.train.shape[2:])}")

    if long := arguments.long_minutes:
        name = f"{data.name}-long"
        minutes = {"ldm3d 1/20": (Ours, long / 20), "ldm3d": (Ours, long / 10), "monai": (Monai, long)}
    else:
        name, minutes = data.name, {side.name: (side, arguments.minutes) for side in (Ours, Monai, MonaiTuned)}
    sides = {side: make(data, 60 * limit) for side, (make, limit) in minutes.items()}
    rows = []
    print(f"{'side':>12} {'seconds':>8} {'steps':>6} {'PSNR dB':>8}")
    for side, found in in_turns(sides):
        rows.append({"data": data.name, "side": side, **found})
        print(f"{side:>12} {found['seconds']:8.0f} {found['step']:6} {found['psnr_db']:8.2f}", flush=True)
        write(f"autoencoder-quality-{name}", rows)
    for ours in (row for row in last_rows(rows) if row["side"].startswith("ldm3d")):
        for theirs in (row for row in rows if row["side"].startswith("monai") and row["step"]):
            sides = f"{ours['side']} after {ours['seconds']:.0f} s against {theirs['side']} after {theirs['seconds']:.0f} s"
            print(f"{sides}: {ours['psnr_db'] - theirs['psnr_db']:+.2f} dB")


def last_rows(rows: list[dict]) -> list[dict]:
    """The last row of each side."""
    return list({row["side"]: row for row in rows}.values())


class Side(Training):
    """One autoencoder.

    Args:
        data: volumes, and the config that gives ldm3d's network and training.
        limit: seconds of training.
    """

    def __init__(self, data: Data, limit: float):
        super().__init__(limit)
        self.settings, self.train, self.test = data.config.autoencoder, data.train, data.test
        torch.manual_seed(0)
        self.network, self.where = self.build().to(device()), device()
        self.optimizer = self.make_optimizer()
        self.generator = torch.Generator().manual_seed(0)

    def step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        chosen = torch.randint(len(self.train), (self.batch,), generator=self.generator)
        volume = self.train[chosen].float().to(self.where)  # (n, 1, X, Y, Z)
        with self.autocast():
            reconstruction, moments = self.reconstruct(volume)
        kl = kl_divergence(moments) / volume[0].numel()
        error = reconstruction.float() - volume
        loss = self.settings.l1 * error.abs().mean() + self.settings.l2 * error.square().mean() + self.settings.kl * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after(step)

    def autocast(self):
        return torch.autocast(self.where.type, torch.bfloat16, enabled=bf16_is_fast(self.where))

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Mean PSNR in dB of the held-out volumes, through the posterior's mean."""
        found = []
        for volume in self.test:
            volume = volume[None].float().to(self.where)
            with self.autocast():
                again = self.through_mean(volume)
            found.append(psnr(again.float().clamp(0, 1), volume).item())
        return {"psnr_db": float(np.mean(found)), "batch": self.batch}

    def after(self, step: int) -> None:
        pass


class Ours(Side):
    name = "ldm3d"

    def build(self):
        self.batch = self.settings.training.batch_size
        return Autoencoder(**self.settings.network.model_dump(exclude={"kind"}))

    def make_optimizer(self):
        self.average = EMA(self.network, self.settings.training.ema)
        return make_optimizer(self.network, self.settings.training)

    def prepare(self):
        count = volumes_for(self.train.shape[2:])
        volumes = self.train[:: max(1, len(self.train) // count)][:count].float()
        train_linear_path(self.network, volumes, self.settings.linear_path_steps, 0, self.autocast)
        self.average.network.load_state_dict(self.network.state_dict())

    def rate(self, step):
        warm = min(1.0, (step + 1) / self.settings.training.warmup_steps)
        return self.settings.training.learning_rate * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * self.share)) / 2)

    def reconstruct(self, volume):
        latent = (len(volume), *self.network.latent_shape(volume.shape[2:]))
        return self.network(volume, torch.randn(latent, generator=self.generator).to(self.where))

    def after(self, step):
        self.average.update(self.network, step)

    def through_mean(self, volume):
        network = self.average.network
        return network.decode(network.sample(network.encode(volume)))


class Monai(Side):
    name, batch, learning_rate = "monai", 2, 1e-4

    def build(self):
        return AutoencoderKL(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=(32, 64, 64),
            latent_channels=self.settings.network.latent_channels,
            num_res_blocks=1,
            norm_num_groups=16,
            attention_levels=(False, False, True),
        )

    def make_optimizer(self):
        return torch.optim.Adam(self.network.parameters(), self.learning_rate)

    def rate(self, step):
        return self.learning_rate

    def reconstruct(self, volume):
        reconstruction, mean, sigma = self.network(volume)
        return reconstruction, torch.cat([mean, 2 * sigma.log()], dim=1)

    def through_mean(self, volume):
        return self.network.reconstruct(volume)


class MonaiTuned(Monai):
    name, learning_rate = "monai-tuned", 1e-3

    def rate(self, step):
        return self.learning_rate * min(1.0, (step + 1) / 20) * (0.01 + 0.99 * (1 + math.cos(math.pi * self.share)) / 2)


if __name__ == "__main__":
    main()
