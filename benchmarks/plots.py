"""Draw the plots of docs/performance.md from benchmarks/results.

    python benchmarks/plots.py [--device cpu] [--out docs/images]

What has not been measured yet is left out, with a message.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from protocol import RESULTS

from ldm3d.figures import ACCENT, INK, MUTED, save

IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLOURS = [ACCENT, INK, MUTED, "#2a7f62", "#c99a2e", "#6b4c9a", "#b0567c"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="the end of the results' names")
    parser.add_argument("--out", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        path = RESULTS / f"{name}-{arguments.device}.json"
        rows = json.loads(path.read_text())["rows"] if path.is_file() else []
        figure = draw(rows) if rows else None
        if figure is None:
            print(f"{name}: left out, {path.name} {'has not what it shows' if rows else 'is missing'}")
            continue
        suffix = "" if arguments.device == "cpu" else f"-{arguments.device}"
        image = arguments.out / f"benchmark-{name}{suffix}.png"
        save(figure, image)
        print(image)


def sampling(rows: list[dict]) -> Figure:
    """Fidelity, distance and ODE error against denoiser calls, one curve a sampler; the knee is ringed."""
    judged = [row for row in rows if "sweep" not in row]
    shown = [row for row in judged if row["calls"] <= 60]
    names = list(dict.fromkeys(row["sampler"] for row in shown))
    panels = [
        ("r", "r, asked and measured ventricular volume"),
        ("distance", "energy distance to DDPM-1000"),
        ("error", "relative error of the latent"),
    ]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, 3), panels):
        for colour, name in zip(COLOURS, names):
            curve(axis, [row for row in shown if row["sampler"] == name and key in row], "calls", key, name, colour)
        for row in shown:
            if row.get("knee") and key in row:
                axis.plot(row["calls"], row[key], "o", markersize=11, markerfacecolor="none", color=INK, label="knee")
        axis.set_xscale("log", base=2)
        if key == "distance":
            axis.axhline(judged[0]["distance_null"], color=MUTED, linewidth=1, linestyle="--", label="null, 95 %")
            axis.set_yscale("symlog", linthresh=0.1)  # by chance it may be below 0
            axis.set_ylim(bottom=min(0.0, *(row[key] for row in shown if key in row)))
        if key == "error":
            axis.set_yscale("log")
        finish(axis, "denoiser calls a volume", label)
    return figure


def autoencoder_quality(rows: list[dict]) -> Figure:
    """PSNR of held-out volumes against training time."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axis = figure.subplots()
    trained = [row for row in rows if row["seconds"] > 0]
    for colour, side in zip(COLOURS, dict.fromkeys(row["side"] for row in trained)):
        curve(axis, [row for row in trained if row["side"] == side], "seconds", "psnr_db", side, colour)
    axis.set_xscale("log")
    finish(axis, "training time (s)", "PSNR of held-out volumes (dB)")
    return figure


def diffusion_quality(rows: list[dict]) -> Figure | None:
    """Fidelity and distance of what is generated against training time."""
    rows = [row for row in rows if row["stage"] == "diffusion"]
    if not rows:
        return None
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = [("ventricular_volume_ml_r", "r, asked and measured ventricles"), ("distance", "distance to real volumes")]
    for axis, (key, label) in zip(figure.subplots(1, 2), panels):
        for colour, side in zip(COLOURS, sorted({row["side"] for row in rows})):
            curve(axis, [row for row in rows if row["side"] == side], "seconds", key, side, colour)
        if key == "distance":
            axis.set_yscale("log")
            axis.axhline(rows[0]["null_distance"], color=MUTED, linewidth=1, linestyle="--", label="real training volumes")
        finish(axis, "training time (s)", label)
    return figure


def attention(rows: list[dict]) -> Figure | None:
    """Seconds and memory of self-attention, forward and backward, against tokens; one curve a backend, narrowest head."""
    rows = [row for row in rows if row.get("kind") == "self" and row["pass"] == "both" and "median" in row]
    if not rows:
        return None
    heads = min(row["head_channels"] for row in rows)
    rows = [{**row, "ms": 1000 * row["median"], "mb": 1000 * row["peak_gb"]} for row in rows if row["head_channels"] == heads]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, 2), [("ms", "ms"), ("mb", "peak memory (MB)")]):
        for colour, backend in zip(COLOURS, dict.fromkeys(row["backend"] for row in rows)):
            curve(axis, [row for row in rows if row["backend"] == backend], "tokens", key, backend, colour)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        finish(axis, f"tokens (heads of {heads} channels)", label)
    return figure


def memory(rows: list[dict]) -> Figure | None:
    """Peak memory of a decode against the size of the volume."""
    measured = [
        {**row, "voxels": float(np.prod(row["shape"])) / 1e6, "name": f"{row['side']}, {row['mode']}"}
        for row in rows
        if "peak_gb" in row
    ]
    if not measured:
        return None
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axis = figure.subplots()
    for colour, name in zip(COLOURS, dict.fromkeys(row["name"] for row in measured)):
        curve(axis, [row for row in measured if row["name"] == name], "voxels", "peak_gb", name, colour)
    axis.set(xscale="log", yscale="log")
    finish(axis, "voxels (millions)", "peak memory of a decode (GB)")
    return figure


def full_size(rows: list[dict]) -> Figure | None:
    """MONAI's seconds over ldm3d's, part by part."""
    seconds = {(row["part"], row["side"]): row["median"] for row in rows if "median" in row}
    parts = [part for part, side in seconds if side == "ldm3d" and (part, "monai") in seconds]
    if not parts:
        return None
    figure = Figure(figsize=(5, 0.6 + 0.34 * len(parts)), layout="constrained")
    axis = figure.subplots()
    ratios = [seconds[part, "monai"] / seconds[part, "ldm3d"] for part in parts]
    bars = axis.barh(parts, ratios, color=ACCENT, height=0.6)
    axis.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], fontsize=7, padding=2, color=INK)
    axis.invert_yaxis()
    axis.axvline(1, color=MUTED, linewidth=1)
    axis.set_xscale("log")
    finish(axis, "MONAI's published configuration: times as many seconds as ldm3d", "")
    return figure


def scaling(rows: list[dict]) -> Figure:
    """Measured steps beside the model's; and what the model says of many GPUs."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    check, projection = figure.subplots(1, 2)
    checks = [row for row in rows if row["kind"] == "check"]
    for colour, processes in zip(COLOURS, sorted({row["processes"] for row in checks})):
        shown = [row for row in checks if row["processes"] == processes]
        batches = [row["batch"] for row in shown]
        check.plot(batches, [row["measured"] for row in shown], "o", color=colour, label=f"{processes} process(es), measured")
        check.plot(batches, [row["predicted"] for row in shown], "-", color=colour, label="the model")
    finish(check, "batch of each process", "seconds a step")
    for colour, name in zip(COLOURS, dict.fromkeys(row["batch"] for row in rows if row["kind"] == "projection")):
        shown = [row for row in rows if row["kind"] == "projection" and row["batch"] == name]
        curve(
            projection,
            shown,
            "gpus",
            "samples_per_second",
            f"global batch {name}" if name.isdigit() else f"batch {name}",
            colour,
        )
    projection.set_xscale("log", base=2)
    projection.set_yscale("log")
    finish(projection, "H100 GPUs (assumed figures)", "samples a second")
    return figure


def curve(axis: Axes, rows: list[dict], x: str, y: str, label: str, colour: str) -> None:
    rows = sorted(rows, key=lambda row: row[x])
    if rows:
        points = [row[x] for row in rows], [row[y] for row in rows]
        axis.plot(*points, color=colour, linewidth=1.3, marker="o", markersize=3, label=label)


def finish(axis: Axes, x_label: str, y_label: str) -> None:
    axis.set_xlabel(x_label, fontsize=8, color=INK)
    axis.set_ylabel(y_label, fontsize=8, color=INK)
    axis.tick_params(labelsize=7, colors=MUTED, which="both")
    if axis.get_xscale() == "log":  # plain numbers, without those between the powers where they would meet
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)


PLOTS: dict[str, Callable[[list[dict]], Figure | None]] = {
    "sampling": sampling,
    "autoencoder-quality-phantoms": autoencoder_quality,
    "autoencoder-quality-brains": autoencoder_quality,
    "diffusion-quality-phantoms": diffusion_quality,
    "diffusion-quality-brains": diffusion_quality,
    "attention": attention,
    "memory": memory,
    "full-size": full_size,
    "scaling": scaling,
}


if __name__ == "__main__":
    main()
