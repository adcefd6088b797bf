"""Films: slices of volumes, one after another, as an animated GIF."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ldm3d.geometry import SCALE_MM, planes_of, slices

WIDE, FRAME_MS = 540, 120  # pixels of a film, and how long a frame is shown


def save_film(volumes: NDArray, titles: Sequence[str], spacing_mm: Sequence[float], path: Path) -> None:
    """Three slices of each volume (F, C, X, Y, Z), one after another and back, as an animated GIF."""
    pictures = []
    planes, wide_mm = planes_of(volumes.shape, spacing_mm)
    scale = WIDE * SCALE_MM / wide_mm
    for volume, title in zip(volumes, titles):
        grey = np.clip(np.nan_to_num(slices(volume, spacing_mm)), 0, 1)
        picture = Image.fromarray((255 * grey).astype(np.uint8))
        picture = picture.resize((WIDE, round(WIDE * picture.height / picture.width)), Image.Resampling.BICUBIC)
        pen, middle, bottom = ImageDraw.Draw(picture), picture.height / 2, picture.height - 8
        pen.text((6, 4), title, fill=255)
        for start, end, low, high in planes:
            pen.text((start * WIDE + 3, middle), low, fill=255, anchor="lm")
            pen.text((end * WIDE - 3, middle), high, fill=255, anchor="rm")
        pen.line([6, bottom, 6 + scale, bottom], fill=255)
        pen.text((10 + scale, bottom), f"{SCALE_MM} mm", fill=255, anchor="lm")
        pictures.append(picture)
    there_and_back = [*pictures, *pictures[-2:0:-1]]
    there_and_back[0].save(path, save_all=True, append_images=there_and_back[1:], duration=FRAME_MS, loop=0)
