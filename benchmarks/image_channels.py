"""How much longer does a training step of the U-Net take with images beside the latent?

    taskset -c 1 python benchmarks/image_channels.py

CPU time of this process, one thread, so that other programs matter little: the configs' U-Net at 4.5 mm, a batch of 16.
"""

import statistics
import time

import torch

from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import UNet, width_of_images

REPEATS, BATCH, SIDES, LATENT = 10, 16, (10, 12, 10), 16
IMAGES = {"none": 0, "another contrast": 16, "label map of 7 groups, detail 2": 56, "a degraded scan": 64}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = {"channels": [64, 96], "blocks": 1, "attention": [False, True], "context_dim": 64}
    x, t = torch.randn(BATCH, 2 * LATENT, *SIDES), 1000 * torch.rand(BATCH)
    steps = {}
    for name, channels in IMAGES.items():
        images = torch.rand(BATCH, channels, *SIDES) if channels else None
        conditions = Conditions(torch.rand(BATCH, 5, 2), images, None if images is None else torch.ones_like(images))
        width = width_of_images(channels)
        unet = UNet(2 * LATENT, LATENT, [0, 2, 0, 0, 2], **network, image_channels=channels, image_width=width)
        steps[name] = (unet, conditions, [])
    for _ in range(REPEATS + 1):  # in turn, so that all see the same machine; the first is not counted
        for unet, conditions, seconds in steps.values():
            begun = time.process_time()
            with torch.autocast("cpu", torch.bfloat16):
                loss = unet(x, t, conditions).float().square().mean()
            loss.backward()
            seconds.append(time.process_time() - begun)
    medians = {name: statistics.median(seconds[1:]) for name, (*_, seconds) in steps.items()}
    for name, seconds in medians.items():
        print(f"{name:34} {seconds:.3f} s, {100 * (seconds / medians['none'] - 1):+.1f}%")


if __name__ == "__main__":
    main()
