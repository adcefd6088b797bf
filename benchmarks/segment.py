"""How good are label maps that a diffusion model makes of scans, beside MONAI's U-Net after as many minutes of training?

    python benchmarks/segment.py CONFIG [--set key=value] [--minutes 10] [--scans 20] [--steps 12] [--samples 8]

CONFIG makes a condition of kind labels (configs/conditions/segment.yaml), and was trained. MONAI's U-Net learns from the same
scans and label maps, with its Dice and cross-entropy loss, for MINUTES. Printed are `ldm3d.evaluation.label_maps.SCORES` of
both on held-out scans, in the foreground: Dice of the most probable label, calibration error, likelihood, energy distance.
"""

import time

import numpy as np
import torch
from held_out import HeldOut, options
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ldm3d.data.coded import CodedVolumes
from ldm3d.data.preparing import load_prepared
from ldm3d.evaluation.label_maps import SCORES, label_scores
from ldm3d.metrics.labels import with_background
from ldm3d.metrics.reconstruction import foreground
from ldm3d.precision import dtype

BATCH = 4


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    held = HeldOut.of(asked.config, asked.set)
    network = trained(held, asked.minutes)
    found: dict[str, list[NDArray]] = {"ldm3d, samples": [], "ldm3d, one sample": [], "MONAI's U-Net": []}
    for i in tqdm(held.some(asked.scans), desc="scans"):
        truth, drawn = held.truth(i), held.drawn(i, asked.samples, asked.steps)
        scan = torch.from_numpy(load_prepared(held.config, held.images.keys[i]))[None]
        where = held.pipeline.cropped(foreground(scan)[0].numpy())[0]
        with torch.no_grad():
            probable = held.pipeline.cropped(network(scan).softmax(dim=1)[0, 1:].numpy())
        for name, samples in zip(found, (drawn, drawn[:1], probable[None])):
            found[name].append(label_scores(samples, truth, where))
    for name, rows in found.items():
        print(name, ", ".join(f"{score} {value:.3f}" for score, value in zip(SCORES, np.nanmean(rows, axis=0))))


def trained(held: HeldOut, minutes: float) -> nn.Module:
    """MONAI's U-Net of scans to labels."""
    coded, keys = CodedVolumes.of(held.config, held.trained), list(held.trained["key"])
    keys = [key for key in keys if key in coded]
    classes, seconds = 1 + len(held.pipeline.labels), 60 * minutes
    torch.manual_seed(0)
    network = UNet(3, 1, classes, channels=(32, 64, 128), strides=(2, 2), num_res_units=2)
    optimizer, loss_of = torch.optim.AdamW(network.parameters(), 2e-3), DiceCELoss(softmax=True)
    rng, start, step = np.random.default_rng(0), time.perf_counter(), 0
    with tqdm(total=round(seconds), desc="MONAI's U-Net", unit="s") as bar:
        while (passed := time.perf_counter() - start) < seconds:
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - passed / seconds)
            chosen = [keys[k] for k in rng.choice(len(keys), BATCH, replace=False)]
            scans, maps = _stacked(load_prepared(held.config, key) for key in chosen), _stacked(map(coded, chosen))
            shares = torch.from_numpy(np.stack([with_background(each) for each in maps.numpy()]))
            with torch.autocast("cpu", dtype("auto", "cpu")):
                loss = loss_of(network(scans).float(), shares)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            bar.update(round(time.perf_counter() - start) - bar.n)
    print(f"MONAI's U-Net: {step} steps of {BATCH} in {minutes:g} minutes")
    return network.eval()


def _stacked(volumes) -> Tensor:
    return torch.stack([torch.from_numpy(volume) for volume in volumes])


if __name__ == "__main__":
    main()
