"""Pictures: slices of volumes, curves and scatter plots. The one user of matplotlib.

Volumes are (C, X, Y, Z) in [0, 1], RAS+; their first channel is drawn.
"""

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ldm3d.geometry import SCALE_MM, planes_of, slices

INK, ACCENT, MUTED = "#1c2733", "#c1440e", "#7a8794"
Slices = tuple[int, int, int] | None
FARTHEST = 4  # of what plots of intervals show, in units of their band


def mosaic(
    volumes: Sequence[NDArray],
    titles: Sequence[str],
    spacing_mm: Sequence[float],
    columns: int = 4,
    heading: str = "",
    where: Sequence[Slices] = (None,),
) -> Figure:
    """Three slices of every volume, at most `columns` volumes a row, each under its title; with sides and a scale in mm.

    `where` says which, see `ldm3d.geometry.slices`: of every volume, or the same of all.
    """
    columns = min(columns, len(volumes))  # no empty places beside a few
    rows = -(-len(volumes) // columns)
    places = list(where) * (1 if len(where) > 1 else len(volumes))
    images = [
        np.clip(np.nan_to_num(slices(np.asarray(volume, np.float32), spacing_mm, place)), 0, 1)
        for volume, place in zip(volumes, places, strict=True)
    ]
    height, width = images[0].shape
    titles = ["\n".join(textwrap.wrap(title, 48)) for title in titles]
    cell = 3.6  # inches across
    image_tall, above = cell * height / width, 0.12 + 0.16 * (1 + max(title.count("\n") for title in titles))
    top = 0.4 if heading else 0.05
    figure = Figure(figsize=(columns * cell, rows * (image_tall + above) + top), facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, image, title in zip(axes, images, titles):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
        axis.set_title(title, fontsize=9, color=INK, pad=3)
        _mark(axis, volumes[0].shape, spacing_mm)
    tall = figure.get_figheight()
    if heading:
        figure.suptitle(heading, fontsize=11, color=INK, y=1 - 0.1 / tall, va="top")
    figure.subplots_adjust(0.005, 0.05 / tall, 0.995, 1 - (top + above) / tall, 0.03, above / image_tall)
    return figure


def lightbox(volumes: Sequence[NDArray], titles: Sequence[str], affine: NDArray, count: int = 7) -> Figure:
    """Axial slices of every volume, a row each, as on a radiologist's lightbox: with left and right, heights and a scale.

    Args:
        volumes: all on one grid.
        titles: of the rows, one a volume.
        affine: (4, 4) voxel to RAS+ mm, along the axes; heights are its z.
        count: of slices, at the same heights in all volumes, from where the first has signal.
    """
    stack = np.clip(np.nan_to_num(np.stack([np.asarray(v, np.float32)[0] for v in volumes])), 0, 1)  # (N, X, Y, Z)
    filled = np.flatnonzero((stack[0] > 0.1).mean(axis=(0, 1)) > 0.02)
    bottom, top = (filled[0], filled[-1]) if len(filled) else (0, stack.shape[3] - 1)
    chosen = np.unique(np.round(np.linspace(bottom + 0.12 * (top - bottom), top - 0.08 * (top - bottom), count)).astype(int))
    wide, deep = (n * spacing for n, spacing in zip(stack.shape[1:3], np.abs(np.diag(affine)[:2])))  # mm
    cell, above = 9.6 / len(chosen), 0.3  # inches
    tall = cell * deep / wide + above
    figure = Figure(figsize=(9.6, tall * len(stack)), facecolor="black")
    for n, (volume, title) in enumerate(zip(stack, titles)):
        bottom_of_row = 1 - (n + 1) / len(stack)
        for k, z in enumerate(chosen):
            place = k / len(chosen), bottom_of_row, 1 / len(chosen), (tall - above) / tall / len(stack)
            axis = figure.add_axes(place)
            axis.imshow(
                volume[:, :, z].T, cmap="gray", vmin=0, vmax=1, origin="lower", extent=(0, wide, 0, deep), aspect="auto"
            )
            axis.axis("off")
            _letter(axis, 0.5, 0.01, f"z = {affine[2, 2] * z + affine[2, 3]:+.0f} mm", va="bottom")
            _letter(axis, 0.03, 0.5, "L", ha="left")
            _letter(axis, 0.97, 0.5, "R", ha="right")
            if k == 0:
                axis.plot([0.05 * wide, 0.05 * wide + SCALE_MM], [0.95 * deep] * 2, color="white", linewidth=1.5)
                _letter(axis, 0.07 + SCALE_MM / wide, 0.95, f"{SCALE_MM} mm", ha="left")
        figure.text(0.005, bottom_of_row + (tall - 0.06) / tall / len(stack), title, color="white", fontsize=9, va="top")
    return figure


def _mark(axis, shape: Sequence[int], spacing_mm: Sequence[float]) -> None:
    """Sides and a scale on the picture that `slices` makes of a volume of this shape, (C, X, Y, Z)."""
    planes, wide = planes_of(shape, spacing_mm)
    for start, end, low, high in planes:
        _letter(axis, start + 0.008, 0.97, low, ha="left", va="top")
        _letter(axis, end - 0.008, 0.97, high, ha="right", va="top")
    across = SCALE_MM / wide
    axis.plot([0.01, 0.01 + across], [0.03, 0.03], color="white", linewidth=1.2, transform=axis.transAxes)
    _letter(axis, 0.018 + across, 0.03, f"{SCALE_MM} mm", ha="left")


def _letter(axis, x: float, y: float, text: str, ha: str = "center", va: str = "center") -> None:
    axis.text(x, y, text, color="white", fontsize=7, ha=ha, va=va, transform=axis.transAxes)


def forest(rows: Sequence[tuple[str, float, float, float, float, str]], label: str) -> Figure:
    """A forest plot: a figure with its interval in each row, beside a grey band from 0 to 1.

    It is drawn up to `FARTHEST`. An interval that goes on beyond has an arrowhead there, and its figures in words.

    Args:
        rows: (name, value, low, high, what chance gives, colour); NaN for what is not known.
        label: of the axis.
    """
    figure = Figure(figsize=(8.2, 0.75 + 0.21 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(0, 1, color=MUTED, alpha=0.18, linewidth=0)
    ends = -0.5, FARTHEST
    for place, (_, value, low, high, chance, colour) in enumerate(rows):
        _whisker(axis, place, low, high, ends, colour, 1.6)
        if value <= FARTHEST:
            axis.scatter(value, place, s=18, color=colour, zorder=3)
        if chance <= FARTHEST:
            axis.scatter(chance, place, s=34, color=INK, marker="|", linewidths=1, zorder=2)
        if high > FARTHEST:
            axis.text(FARTHEST + 0.16, place, f"{value:.1f} (to {high:.1f})", fontsize=6.5, color=colour, va="center")
    axis.axvline(1, color=INK, linewidth=0.8, linestyle="--")
    axis.set(yticks=range(len(rows)), yticklabels=[name for name, *_ in rows], xlim=(-0.5, FARTHEST + 0.1))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    _plain(axis, label, "")
    axis.tick_params(axis="y", labelcolor=INK)
    return figure


def _whisker(axis, place: float, low: float, high: float, ends: tuple[float, float], colour: str, width: float) -> None:
    """A line from low to high, with an arrowhead where it is cut as it goes on beyond `ends`."""
    axis.hlines(place, *np.clip((low, high), *ends), color=colour, linewidth=width)
    for is_cut, end, marker in ((low < ends[0], ends[0], "<"), (high > ends[1], ends[1], ">")):
        if is_cut:
            axis.scatter(end, place, s=22, color=colour, marker=marker, zorder=4, clip_on=False)


def curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Every value of metrics.jsonl against the step, a panel each; a Gaussian's denoising error is a dashed line."""
    names = sorted({key for row in rows for key in row if key != "step" and not key.startswith("gaussian_")}) or ["loss"]
    figure = Figure(figsize=(4 * min(3, len(names)), 2.6 * -(-len(names) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(names) // 3), min(3, len(names)), squeeze=False).ravel()
    for axis in axes[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes, names):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axis.plot(*zip(*points), color=ACCENT, linewidth=1.2, marker="." if len(points) < 30 else None)
            values = np.array([value for _, value in points])
            if (values > 0).all() and values.max() > 30 * values.min():
                axis.set_yscale("log")
        gaussian = [row[key] for row in rows if (key := name.replace("denoising_", "gaussian_")) != name and key in row]
        if gaussian:
            axis.axhline(gaussian[-1], color=MUTED, linewidth=1, linestyle="--")
        _plain(axis, "step", name)
    return figure


def scatter(
    asked: NDArray, measured: NDArray, asked_label: str, measured_label: str, title: str, band: NDArray | None = None
) -> Figure:
    """Measured against asked, with the identity and the fitted line; `band` is its interval, (3, M): asked, low, high."""
    figure = Figure(figsize=(3.8, 3.6), layout="constrained")
    axis = figure.subplots()
    low, high = min(asked.min(), measured.min()), max(asked.max(), measured.max())
    margin = 0.04 * (high - low + 1e-9)
    ends = np.array([low - margin, high + margin])
    axis.plot(ends, ends, color=MUTED, linewidth=1, linestyle="--", label="identity")
    if len(asked) > 1 and np.ptp(asked) > 0:
        slope, offset = np.polyfit(asked, measured, 1)
        axis.plot(ends, slope * ends + offset, color=ACCENT, linewidth=1.2, label=f"fit, slope {slope:.2f}")
    if band is not None:
        axis.fill_between(*band, color=ACCENT, alpha=0.18, linewidth=0)
    axis.scatter(asked, measured, s=14, color=INK, alpha=0.65, linewidths=0)
    axis.set(xlim=ends, ylim=ends)
    axis.set_title(title, fontsize=9, color=INK)
    axis.legend(fontsize=7, frameon=False)
    _plain(axis, asked_label, measured_label)
    return figure


def lines(
    x: Sequence[float],
    series: dict[str, NDArray],
    x_label: str,
    y_label: str,
    title: str,
    limit: float | None = None,
    log: bool = False,
) -> Figure:
    """Several curves over x; every series is (len(x), repeats), drawn as its mean with its range.

    Args:
        limit: of a dashed horizontal line.
        log: logarithmic axes.
    """
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axis = figure.subplots()
    colours = [ACCENT, INK, MUTED, "#2a7f62"]
    for colour, (name, values) in zip(colours, series.items()):
        values = np.asarray(values, dtype=float).reshape(len(x), -1)
        axis.plot(x, values.mean(axis=1), color=colour, marker="o", markersize=3, label=name)
        axis.fill_between(x, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15, linewidth=0)
    if limit is not None:
        axis.axhline(limit, color=INK, linewidth=1, linestyle="--")
    if log:
        axis.set(xscale="log", yscale="log")
    axis.set_title(title, fontsize=9, color=INK)
    if len(series) > 1:
        axis.legend(fontsize=7, frameon=False)
    _plain(axis, x_label, y_label)
    return figure


def profiles(x: NDArray, series: Mapping[str, NDArray], x_label: str, y_label: str) -> Figure:
    """A thin line over x (M,) for each series (M,), at most ten."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axis = figure.subplots()
    for k, (name, values) in enumerate(series.items()):
        axis.plot(x, values, linewidth=1.3, label=name, color=INK if len(series) == 1 else f"C{k}")
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_ylim(bottom=0)
    _plain(axis, x_label, y_label)
    return figure


def histogram(values: NDArray, label: str, title: str) -> Figure:
    """Histogram of values (N,), with their mean."""
    figure = Figure(figsize=(3.8, 3.0), layout="constrained")
    axis = figure.subplots()
    axis.hist(values, bins=min(30, max(5, round(len(values) ** 0.5) * 2)), color=INK, alpha=0.75)
    axis.axvline(np.mean(values), color=ACCENT, linewidth=1.2, linestyle="--")
    axis.locator_params(axis="x", nbins=5)
    axis.set_title(title, fontsize=9, color=INK)
    _plain(axis, label, "volumes")
    return figure


def ranges(names: Sequence[str], series: dict[str, NDArray], label: str, title: str) -> Figure:
    """The range of each of F figures in several sets, beside a grey band from -1 to 1.

    It is drawn up to `FARTHEST` on either side, with an arrowhead at what goes on beyond.
    Each series is (F, 3): low, middle and high.
    """
    figure = Figure(figsize=(7.2, 0.6 + 0.3 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(-1, 1, color=MUTED, alpha=0.2, linewidth=0)
    places = np.arange(len(names))
    for k, (colour, (name, values)) in enumerate(zip((MUTED, ACCENT), series.items())):
        at = places + 0.25 * (k - (len(series) - 1) / 2)
        for place, (low, middle, high) in zip(at, values):
            _whisker(axis, place, low, high, (-FARTHEST, FARTHEST), colour, 2.5)
            if abs(middle) <= FARTHEST:
                axis.scatter(middle, place, s=16, color=colour, zorder=3)
        axis.plot([], color=colour, linewidth=2.5, label=name)
    axis.set(yticks=places, yticklabels=names, xlim=(-FARTHEST - 0.1, FARTHEST + 0.1), ylim=(len(names) - 0.5, -0.5))
    axis.set_title(title, fontsize=9, color=INK)
    axis.legend(fontsize=7, frameon=False, loc="lower right")
    _plain(axis, label, "")
    return figure


def overlay(
    volume: NDArray,
    values: NDArray,
    spacing_mm: Sequence[float],
    title: str,
    label: str,
    signed: bool = False,
    outline: NDArray | None = None,
    where: Slices = None,
) -> Figure:
    """Values in colour on the three slices of a grey volume, with their colour bar.

    Args:
        volume, values: (C, X, Y, Z).
        spacing_mm: of a voxel.
        title, label: of the picture and of the bar.
        signed: colours from blue over transparent to red, symmetric about 0, more opaque for larger values; else from the
            least value to the largest, all half transparent.
        outline: (C, X, Y, Z) bool, drawn with a thin line; None for none.
        where: which slices, see `ldm3d.geometry.slices`.
    """
    grey, shown = (slices(np.asarray(v, np.float32), spacing_mm, where) for v in (np.clip(volume, 0, 1), values))
    # The range of the slices without the last thousandth, so that one odd voxel does not set the scale
    inside = slices(np.ones(volume.shape, np.float32), spacing_mm) > 0
    low, high = np.quantile(np.abs(shown[inside]) if signed else shown[inside], [0.001, 0.999])
    high = max(high, low + 1e-6)
    rows, columns = grey.shape
    figure = Figure(figsize=(7.6, 7.6 * 0.86 * rows / columns + 0.35), layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.axis("off")
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    _mark(axis, volume.shape, spacing_mm)
    if signed:
        low, alpha = -high, np.clip(1.5 * np.abs(shown) / high, 0, 0.9)
    else:
        alpha = 0.55 * inside
    colour = "RdBu_r" if signed else "viridis"
    axis.imshow(shown, cmap=colour, vmin=low, vmax=high, alpha=alpha, interpolation="nearest")
    if outline is not None and (edge := slices(outline.astype(np.float32), spacing_mm, where)).any():
        axis.contour(edge, levels=[0.5], colors=[INK], linewidths=0.8)
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), colour), ax=axis, fraction=0.025, pad=0.01)
    bar.set_label(label, fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=MUTED)
    axis.set_title(title, fontsize=9, color=INK)
    return figure


def _plain(axis, x_label: str, y_label: str) -> None:
    axis.set_xlabel(x_label, fontsize=8, color=INK)
    axis.set_ylabel(y_label, fontsize=8, color=INK)
    axis.tick_params(labelsize=7, colors=MUTED)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write as PNG."""
    figure.savefig(path, dpi=130)


def to_data_uri(figure: Figure) -> str:
    """The figure as a data: URI, to stand inside an HTML page; with 128 colours, which takes a third of the space."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with Image.open(buffer) as picture:
        few = picture.convert("RGB").quantize(128)
    buffer = io.BytesIO()
    few.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
