"""Samplers: quality and seconds a volume against the number of denoiser calls, and the cheapest setting that loses nothing.

    python benchmarks/sampling.py [MODEL] [--volumes 96] [--quick]

Every sampler draws the same requests from the same noise, guided as the model's defaults say, in turns batch by batch.
Requests ask for the ventricular volume alone, evenly over the middle of what training saw (5 to 95 % of a normal of its mean
and deviation), and leave the rest open. VolumeScores are

- error: relative root mean square distance of the final latent to the converged one of the same noise (Heun, 100 steps).
  Not for DDPM, whose answer depends on the noise of its steps as well;
- r, slope: between asked volumes and those that `measure_volumes` finds;
- distance: energy distance (Szekely and Rizzo 2013) of the volumes to those of DDPM, 1,000 steps, for the same requests from
  other noise, by the features that `ldm3d evaluate` compares distributions by. The null is the 95 % point of the same figure
  under random exchange of the two samples.

The knee is the setting with the fewest denoiser calls that is within the noise of the best in r and in distance at once:
requests are resampled 500 times (the same ones for all settings), and in more than 2.5 % of them it is no worse than the best.
`error` does not count: an ODE solved to more digits than the eye or the measure can tell is no better.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from protocol import denoiser_calls, summarise, timed, write
from torch import Tensor

from ldm3d.description import Sampling
from ldm3d.errors import InputError
from ldm3d.metrics.features import extract, load_extractor, standardise
from ldm3d.pipeline import Pipeline
from ldm3d.precision import dtype
from ldm3d.processes import own_device
from ldm3d.rulers.volumetry import apply_measure, measure_volumes
from ldm3d.statistics.agreement import agreement

ASKED = "ventricular_volume_ml"
CALLS, QUICK_CALLS = (2, 3, 5, 7, 11, 15, 19, 29, 39, 49), (3, 7, 15, 29)  # odd: Heun asks twice a step, but for the last
BASELINE = ("ddim", 50)
BATCH, RESAMPLINGS, EXCHANGES = 16, 500, 200
GUIDANCE = (1.0, 1.5, 2.0, 3.0)


@dataclass
class Setting:
    """A way to sample, and what came out."""

    name: str
    sampling: Sampling
    calls: int
    latents: list[Tensor] = field(default_factory=list)  # (n, c, x, y, z) of each batch
    features: list[Tensor] = field(default_factory=list)  # (1, D) of each volume
    measured: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # a volume, of each batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("demo/run/model"), help="a trained pipeline's folder")
    parser.add_argument("--volumes", type=int, help="of each setting; 96, or 32 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer settings and volumes")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    arguments = parser.parse_args()
    where = own_device()
    pipeline = Pipeline.from_pretrained(arguments.model, where, dtype(arguments.precision, where))
    pipeline.threads = None  # all
    count = arguments.volumes or (32 if arguments.quick else 96)
    print(f"{arguments.model}: {count} volumes a setting, guidance {pipeline.sampling.guidance:g}, {arguments.precision}")

    rows = compare(pipeline, count, QUICK_CALLS if arguments.quick else CALLS)
    for row in rows:
        row |= {"volumes": count, "model": arguments.model.name}
    print(write("sampling", rows))


def compare(pipeline: Pipeline, count: int, all_calls: tuple[int, ...], converged: int = 100, chain: int = 1000) -> list[dict]:
    """A row of figures for each sampler and number of steps, and for each scale of guidance at the knee.

    Args:
        count: volumes of each.
        all_calls: of the denoiser, at most.
        converged, chain: steps of the references, Heun's and DDPM's.
    """
    settings, requests = make_settings(pipeline, all_calls, converged, chain), draw_requests(pipeline, count)
    asked = np.array([row[ASKED] for row in requests])
    run(pipeline, settings, requests)
    rows = judge(settings, asked)
    best = knee(rows)
    best["knee"] = True
    table(rows)
    print(f"null of the distance (95 %): {rows[0]['distance_null']:.3f}")
    by_name = {(row["sampler"], row["steps"]): row for row in rows}
    for name in (BASELINE, ("ddpm", chain)):
        ratio = by_name[name]["seconds"] / best["seconds"]
        print(f"{name[0]} with {name[1]} steps takes {ratio:.1f} times as long as the knee")
    print(f"recommended: generation: {{sampler: {best['sampler']}, steps: {best['steps']}}} ({best['calls']} denoiser calls)")

    print("guidance at the knee:")
    chosen = pipeline.sampling.replace(sampler=best["sampler"], steps=best["steps"])
    guided = [Setting("guidance", chosen.replace(guidance=scale), best["calls"]) for scale in GUIDANCE]
    run(pipeline, guided, requests)
    return rows + judge_guidance(guided, asked)


def make_settings(pipeline: Pipeline, all_calls: tuple[int, ...], converged: int, chain: int) -> list[Setting]:
    """The converged reference and DDPM's first, then every sampler with up to each number of denoiser calls."""
    pairs = [("heun", converged), ("ddpm", chain), BASELINE]
    for sampler in ("ddpm", "ddim", "euler", "heun", "dpmpp-2m", "unipc"):
        steps = {(calls + 1) // 2 if sampler == "heun" else calls for calls in all_calls}
        pairs += [(sampler, n) for n in sorted(steps)]
    settings = []
    for sampler, steps in pairs:
        # Other noise for the sample that the rest is compared with as a distribution
        seed = pipeline.sampling.seed + (sampler == "ddpm" and steps == chain)
        sampling = pipeline.sampling.replace(sampler=sampler, steps=steps, seed=seed)
        settings.append(Setting(sampler, sampling, denoiser_calls(sampler, steps, pipeline.process)))
    return settings


def draw_requests(pipeline: Pipeline, count: int) -> list[dict]:
    known = pipeline.schema[ASKED]
    if not known.seen:
        raise InputError(f"the model's {ASKED} has no seen range: it was not fitted to a training split; train it first")
    low, high = max(known.seen[0], known.mean - 1.64 * known.std), min(known.seen[1], known.mean + 1.64 * known.std)
    values = np.random.default_rng(0).permutation(np.linspace(low, high, count))
    return pipeline.parse([{ASKED: float(value)} for value in values])


def run(pipeline: Pipeline, settings: list[Setting], requests: list[dict]) -> None:
    """Fill in latents, measured volumes and seconds: batch by batch, all settings in turn."""
    extractor, warm_up = load_extractor("random"), pipeline.sampling.replace(steps=2)
    pipeline.decode(pipeline.latents(requests[:BATCH], warm_up, range(min(BATCH, len(requests))))[:1])
    for start in range(0, len(requests), BATCH):
        batch = requests[start : start + BATCH]
        for setting in settings:
            z: list[Tensor] = []
            volumes: list[NDArray] = []

            def generate(setting=setting, z=z, volumes=volumes, batch=batch, start=start) -> None:
                z.append(pipeline.latents(batch, setting.sampling, range(start, start + len(batch))))
                volumes.extend(pipeline.decode(latent[None])[0].cpu().numpy() for latent in z[0])

            setting.seconds.append(timed(generate) / len(batch))
            setting.latents.append(z[0].cpu())
            setting.features += [extract([volume], extractor, pipeline.device) for volume in volumes]
            setting.measured += [apply_measure(measure_volumes, volume, pipeline.grid.spacing_mm)[ASKED] for volume in volumes]
        print(f"{start + len(batch)} of {len(requests)} volumes of {len(settings)} settings", flush=True)


def judge(settings: list[Setting], asked: NDArray) -> list[dict]:
    """A row of figures for every setting; "r_resampled" and "distance_resampled" are left in for `knee`."""
    converged = torch.cat(settings[0].latents)
    reference = torch.cat(settings[1].features)
    generator = np.random.default_rng(0)
    weights = generator.multinomial(len(asked), np.full(len(asked), 1 / len(asked)), size=RESAMPLINGS).astype(float)
    rows = []
    for setting in settings:
        latents, measured = torch.cat(setting.latents), np.array(setting.measured)
        row = describe(setting, asked)
        row["r_resampled"] = [weighted_r(asked, measured, w) for w in weights]
        if setting.name != "ddpm" and setting is not settings[0]:
            row["error"] = float((latents - converged).norm() / converged.norm())
        if setting is not settings[1]:
            both = torch.cat(standardise(reference, torch.cat(setting.features))[::-1])
            between = torch.cdist(both, both).numpy()  # (2N, 2N)
            first = np.arange(len(both)) < len(asked)
            row["distance"] = energy_distance(between, first, np.ones(len(both)))
            row["distance_resampled"] = [energy_distance(between, first, np.tile(w, 2)) for w in weights]
            if setting is settings[0]:
                exchanged = [generator.permutation(first) for _ in range(EXCHANGES)]
                null = float(np.quantile([energy_distance(between, e, np.ones(len(both))) for e in exchanged], 0.95))
        row["distance_null"] = null
        rows.append(row)
    return rows


def describe(setting: Setting, asked: NDArray) -> dict:
    """Sampler, steps, seconds and fidelity; r is 0 where nothing could be measured or all volumes are alike."""
    row = {"sampler": setting.sampling.sampler, "steps": setting.sampling.steps, "calls": setting.calls}
    row |= {"guidance": setting.sampling.guidance, "seconds": summarise(setting.seconds)["median"]}
    row["seconds_spread"] = summarise(setting.seconds)
    try:
        found = agreement(asked, setting.measured)
        row |= {"r": found.r, "r_low": found.r_low, "r_high": found.r_high, "slope": found.slope, "bias_ml": found.bias}
        row["mean_error_ml"] = found.mae
    except InputError:
        row |= {"r": 0.0, "slope": 0.0}
    return row


def energy_distance(between: NDArray, first: NDArray, weights: NDArray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over different pairs (Szekely and Rizzo 2013, eq. 6); 0 for one distribution.

    Args:
        between: distances of all points, (M, M).
        first: which points are X; the others are Y, (M,).
        weights: how often each point counts, (M,).
    """
    x, y = weights * first, weights * ~first

    def within(w: NDArray) -> float:
        # A point drawn twice is no pair with itself: its distance of 0 would make resamplings look closer than samples
        return w @ between @ w / (w.sum() ** 2 - (w**2).sum())

    return float(2 * (x @ between @ y) / (x.sum() * y.sum()) - within(x) - within(y))


def weighted_r(asked: NDArray, measured: NDArray, weights: NDArray) -> float:
    """Pearson's r with weights, over finite values; 0 where one side does not vary."""
    known = np.isfinite(measured)
    a, m, w = asked[known], measured[known], weights[known]
    if w.sum() < 3:
        return 0.0
    a, m = a - np.average(a, weights=w), m - np.average(m, weights=w)
    product = np.sqrt((w * a * a).sum() * (w * m * m).sum())
    return float((w * a * m).sum() / product) if product > 0 else 0.0


def knee(rows: list[dict]) -> dict:
    """The fewest calls that are no worse than the best, as far as the requests can tell; of several the nearest to DDPM-1000.

    The reference in distance takes no part: it would be compared with itself. Adds "within_noise" to every other row and
    takes the resamplings out.
    """
    judged = [row for row in rows if "distance" in row]
    best_r = max(judged, key=lambda row: row["r"])["r_resampled"]
    best_distance = min(judged, key=lambda row: row["distance"])["distance_resampled"]
    for row in judged:
        by_r = np.mean(np.array(row["r_resampled"]) >= best_r)
        by_distance = np.mean(np.array(row["distance_resampled"]) <= best_distance)
        row["within_noise"] = bool(min(by_r, by_distance) > 0.025)
    for row in rows:
        row.pop("r_resampled")
        row.pop("distance_resampled", None)
    good = [row for row in judged if row["within_noise"]]
    if not good:  # the best in r and the best in distance differ, and nothing is within the noise of both
        good = [max(judged, key=lambda row: row["r"])]
    return min(good, key=lambda row: (row["calls"], row["distance"]))


def table(rows: list[dict]) -> None:
    print(f"{'sampler':>9} {'steps':>5} {'calls':>5} {'s/volume':>9} {'error':>7} {'r':>6} {'slope':>6} {'distance':>8}")
    for row in rows:
        error = f"{row['error']:7.3f}" if "error" in row else f"{'-':>7}"
        distance = f"{row['distance']:8.3f}" if "distance" in row else f"{'-':>8}"
        text = f"{row['sampler']:>9} {row['steps']:5} {row['calls']:5} {row['seconds']:9.3f} {error} {row['r']:6.3f}"
        note = " <- knee" if row.get("knee") else " within the noise of the best" if row.get("within_noise") else ""
        print(f"{text} {row['slope']:6.3f} {distance}{note}")


def judge_guidance(settings: list[Setting], asked: NDArray) -> list[dict]:
    """Fidelity of each guidance scale, and how much variety it leaves: mean distance of two latents, 1 without guidance."""
    varieties = [torch.pdist(torch.cat(setting.latents).flatten(1)).mean().item() for setting in settings]
    rows = []
    print(f"{'guidance':>9} {'s/volume':>9} {'r':>6} {'slope':>6} {'variety':>8}")
    for setting, variety in zip(settings, varieties):
        row = {**describe(setting, asked), "variety": variety / varieties[0], "sweep": "guidance"}
        print(f"{row['guidance']:9.1f} {row['seconds']:9.3f} {row['r']:6.3f} {row['slope']:6.3f} {row['variety']:8.3f}")
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
