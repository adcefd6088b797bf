"""How true an edit is: the change that it shows against the change that happened.

    python benchmarks/edit.py MODEL DATA [--known sex] [--changed age] [--num 40] [--methods ode noise linear] [--open]
        [--follows NAME=A,B ... --training TABLE] [--round-trip 20] [--name NAME]

DATA is a BIDS folder with two or more sessions a subject, or a table with participant_id, session_id, path and the covariates:
phantom twins (`ldm3d phantoms --twins age=15`), or visits years apart. The first session is edited to the last one's
covariate and compared with the last one, which lies on the Grid as the first one does.

Reported for each method beside "no change", the group's mean change (per unit of the covariate, of all other pairs), and the
model's linear direction ("linear"):

- ventricles, brain: mean absolute error of the change in ml, also relative to that of "no change"; slope and r of the shown
  change on the true one; ml a unit of the covariate. True is what the same ruler measures on both sessions, and, as `table`,
  what DATA's columns say.
- voxels: squared error of the change in the brain, relative to "no change".
- sharpness: power of the gradient of the decoded edit relative to the scan's reconstruction.
- cycle: there and back, distance to the start relative to the distance there.
- round trip: of the first pair's scan, with --round-trip so many steps of the sampler: inverted and sampled again, root mean
  square and largest error, relative to the latent's standard deviation, and calls of the denoiser by the inversion.
- own: share of edits (without residual) that are nearer to their own scan's volume than to any other's.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import protocol
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ldm3d.applications.edit import SAMPLER, Edit, edit
from ldm3d.applications.placed import PlacedScan, place
from ldm3d.config.data import CovariateConfig, DataConfig
from ldm3d.covariates import CovariateSchema
from ldm3d.data.bids import read_scans
from ldm3d.data.nifti import read_volume
from ldm3d.data.placing import to_grid
from ldm3d.description import Preparation
from ldm3d.diffusion.inversion import invert_steps
from ldm3d.diffusion.samplers import follow, recommended_spacing
from ldm3d.models.unet import pad_to
from ldm3d.pipeline import Pipeline
from ldm3d.precision import NAMES, dtype
from ldm3d.rulers.volumetry import apply_measure, load_measure

BASELINES = ("no change", "group")
METHODS = {
    "ode": {"method": "ode"},
    "ode 0.7": {"method": "ode", "strength": 0.7},
    "noise": {"method": "noise", "samples": 4},
    "noise 0.7": {"method": "noise", "samples": 4, "strength": 0.7},
    "noise averaged": {"method": "noise", "samples": 4, "average": True},
    "linear": {"method": "linear"},
}


@dataclass
class Pair:
    """Both sessions of a subject on one Grid, and what is known of them."""

    subject: str
    placed: PlacedScan
    later: NDArray  # (X, Y, Z)
    rows: tuple[Mapping, Mapping]
    volumes: tuple[Mapping[str, float], Mapping[str, float]]

    @property
    def first(self) -> NDArray:
        return self.placed.volume[0, 0].cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--precision", choices=NAMES, default="float32", help="of the networks")
    parser.add_argument("data", type=Path)
    parser.add_argument("--root", type=Path, help="folder of all scans, if it is not DATA's")
    parser.add_argument("--known", nargs="*", default=["sex"], help="covariates that are given and held")
    parser.add_argument("--fixed", nargs="*", default=[], metavar="NAME=VALUE", help="further ones, the same for all")
    parser.add_argument("--changed", default="age")
    parser.add_argument("--num", type=int, default=40, help="pairs at most")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cycles", type=int, default=8, help="pairs that are also edited back")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--measure", default="ldm3d.rulers.volumetry:measure_volumes")
    parser.add_argument("--open", action="store_true", help="leave open what would follow from what changes")
    parser.add_argument(
        "--follows", nargs="*", metavar="NAME=A,B", help="what follows from what, in place of the model's rules"
    )
    parser.add_argument("--training", type=Path, help="table of the training's people, to whom --follows is fitted")
    parser.add_argument("--round-trip", type=int, metavar="STEPS", help="of one scan, first")
    parser.add_argument("--name", help="of the data: writes results/edit-NAME-DEVICE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained(arguments.model, "cpu", dtype(arguments.precision, "cpu"))
    if arguments.follows is not None:
        pipe.schema = with_rules(pipe.schema, dict(text.split("=", 1) for text in arguments.follows), arguments.training)
    measure = load_measure(arguments.measure)
    fixed = dict(pair.split("=", 1) for pair in arguments.fixed)
    names = [*arguments.known, arguments.changed]
    pairs = read_pairs(pipe, arguments.data, arguments.root, names, arguments.num, measure)
    by = np.array([pair.rows[1][arguments.changed] - pair.rows[0][arguments.changed] for pair in pairs])
    asked = {
        "model": pipe.model_hash,
        "precision": str(pipe.dtype),
        "pairs": len(pairs),
        "changed": arguments.changed,
        "steps": arguments.steps,
    }
    asked["open"] = arguments.open
    if arguments.round_trip:
        own = {name: pairs[0].rows[0][name] for name in names} | fixed
        print("round trip", json.dumps(round_trip(pairs[0].placed, own, arguments.round_trip)), flush=True)
    shown = baselines(pairs, by, measure, pipe.grid.spacing_mm)
    methods = {name: summary(pairs, by, *shown[name]) for name in BASELINES}
    for name in arguments.methods:
        start = time.perf_counter()
        options = {**METHODS[name], "steps": arguments.steps, "measure": None if arguments.open else measure}
        methods[name] = of_method(pairs, by, arguments, fixed, options, measure)
        methods[name]["seconds_a_scan"] = round((time.perf_counter() - start) / len(pairs), 2)
        print(name, json.dumps(methods[name]), flush=True)
    print(table(methods))
    if arguments.name:
        protocol.write(f"edit-{arguments.name}", [{"method": name, **asked, **found} for name, found in methods.items()])


def with_rules(schema: CovariateSchema, rules: Mapping[str, str], training: Path) -> CovariateSchema:
    """The schema, in which other covariates follow: {"ventricular_volume_ml": "age,sex"}."""
    frame = pd.read_csv(training)
    frame = frame[frame["split"] == "train"] if "split" in frame else frame
    people = [{name: row[name] for name in schema.names} for row in frame.to_dict("records")]
    names = {name: tuple(causes.split(",")) for name, causes in rules.items()}
    fitted = CovariateSchema(tuple(replace(c, follows=names.get(c.name, ()), following=None) for c in schema)).fit(people)
    return CovariateSchema(tuple(replace(c, follows=f.follows, following=f.following) for c, f in zip(schema, fitted)))


def read_pairs(pipe: Pipeline, data: Path, root: Path | None, names: Sequence[str], most: int, measure) -> list[Pair]:
    """First and last session of each subject; the last is placed as the first."""
    volumes = [name for name in pipe.schema.names if name.endswith("_volume_ml")]
    wanted = [name for name in pipe.schema.names if name in {*names, *volumes}]
    covariates = [pipe.schema[name] for name in wanted]
    configs = [
        CovariateConfig(name=c.name, kind=c.kind, categories=list(c.categories), **({"range": c.range} if c.range else {}))
        for c in covariates
    ]
    grid = {"shape": list(pipe.grid.shape), "spacing_mm": list(pipe.grid.spacing_mm)}
    source = {"bids": data} if data.is_dir() else {"table": data}
    scans = read_scans(DataConfig(**source, root=root, grid=grid, suffix=pipe.suffix), configs)
    percentiles = (pipe.preparation or Preparation()).percentiles
    pairs = []
    subjects = [rows for _, rows in scans.groupby("subject") if len(rows) > 1][:most]
    for rows in tqdm(subjects, desc="scans", disable=None):
        first, last = rows.iloc[0].to_dict(), rows.iloc[-1].to_dict()
        placed = place(pipe, first["path"])
        matrix = np.array(placed.info.get("registration", {}).get("matrix", np.eye(4)))
        volume, affine = read_volume(last["path"])
        on_grid, _ = to_grid(volume, matrix @ affine, pipe.grid, percentiles)
        found = tuple(dict(measure(v, pipe.grid.spacing_mm)) for v in (placed.volume[0, 0].numpy(), on_grid[0]))
        pairs.append(Pair(str(first["subject"]), placed, on_grid[0], (first, last), found))
    return pairs


Shown = tuple[list[NDArray], list[dict[str, float]]]  # of each pair: the later volume as it is shown, measured changes


def baselines(pairs: Sequence[Pair], by: NDArray, measure, spacing_mm: Sequence[float]) -> dict[str, Shown]:
    """No change; and the mean change a unit of the covariate of all other pairs, times the units of this one."""
    names = list(pairs[0].volumes[0])
    change = {n: np.array([pair.volumes[1][n] - pair.volumes[0][n] for pair in pairs]) for n in names}
    voxels = sum((pair.later - pair.first) * units for pair, units in zip(pairs, by))
    squares = (by**2).sum()
    group_volumes, group_measured = [], []
    for i, (pair, units) in enumerate(zip(pairs, by)):
        others = squares - units**2
        own = (pair.later - pair.first) * units
        group_volumes.append((pair.first + (voxels - own) / others * units).clip(0, 1))
        slope = {n: ((change[n] * by).sum() - change[n][i] * units) / others for n in names}
        group_measured.append({n: slope[n] * units for n in names})
    nothing = [pair.first for pair in pairs], [dict.fromkeys(names, 0.0) for _ in pairs]
    return {"no change": nothing, "group": (group_volumes, group_measured)}


def of_method(pairs: Sequence[Pair], by: NDArray, arguments, fixed: Mapping, options: Mapping, measure) -> dict:
    """Figures of edits by one method."""
    volumes, measured, cycles, sharp, decoded = [], [], [], [], []
    for pair in tqdm(pairs, desc="edits", disable=None):
        own = {name: pair.rows[0][name] for name in [*arguments.known, arguments.changed]} | fixed
        to = {arguments.changed: float(pair.rows[1][arguments.changed])}
        done = edit(pair.placed.pipe, pair.placed, own, to, **options)
        shown = done.volume()
        volumes.append(shown[0, 0].cpu().numpy())
        found = apply_measure(measure, volumes[-1][None], pair.placed.pipe.grid.spacing_mm)
        measured.append({name: found[name] - pair.volumes[0][name] for name in found})
        if len(cycles) < arguments.cycles:
            cycles.append(cycle(done, own, arguments.changed, options))
        plain = pair.placed.reconstruction
        decoded.append((plain + done.change()[0])[0, 0].numpy())
        sharp.append(roughness(decoded[-1]) / roughness(plain[0, 0].numpy()))
    originals = np.array([pair.first.ravel() for pair in pairs])
    nearest = [np.square(originals - shown.ravel()).sum(axis=1).argmin() for shown in decoded]
    return summary(pairs, by, volumes, measured) | {
        "cycle": round(float(np.median(cycles)), 4) if cycles else None,
        "sharpness": round(float(np.mean(sharp)), 4),
        "own": round(float(np.mean(np.array(nearest) == np.arange(len(pairs)))), 3),
    }


def cycle(done: Edit, own: Mapping, changed: str, options: Mapping) -> float:
    """Distance of there and back from the start, relative to the distance there."""
    there = done.latents[0].mean(dim=0, keepdim=True)
    placed = replace(done.placed, z=there)
    target = {name: value for name, value in done.targets[0].items() if value is not None}
    back = edit(placed.pipe, placed, target, {changed: own[changed]}, **options)
    start = done.placed.z
    return float((back.latents[0].mean(dim=0, keepdim=True) - start).norm() / (there - start).norm())


def round_trip(placed: PlacedScan, own: Mapping, steps: int) -> dict[str, float]:
    """A scan's latent inverted, and sampled again from there, under its own covariates: no edit."""
    pipe, process, calls = placed.pipe, placed.pipe.process, 0
    plain = pipe.denoiser(pipe.parse([dict(own)]))

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return plain(z, t)

    x = pad_to(placed.z, pipe.unet.padded_shape(placed.z.shape[2:]))
    times = process.times(steps, recommended_spacing(SAMPLER, process))
    with torch.no_grad():
        z = invert_steps(denoise, x, process, times, name=SAMPLER)
        asked = calls
        error = (follow(SAMPLER, denoise, z, times, process) - x) / x.std()
    return {"rms": float(error.square().mean().sqrt()), "largest": float(error.abs().max()), "calls": asked, "steps": steps}


def roughness(volume: NDArray) -> float:
    return float(sum(np.square(np.diff(volume, axis=axis)).sum() for axis in range(3)))


def summary(pairs: Sequence[Pair], by: NDArray, volumes: Sequence[NDArray], measured: Sequence[Mapping[str, float]]) -> dict:
    """Errors of the shown change against the true one."""
    errors = [np.square(shown - pair.later).sum() for pair, shown in zip(pairs, volumes)]
    nothing = [np.square(pair.first - pair.later).sum() for pair in pairs]
    result: dict = {"voxels": round(float(np.sum(errors) / np.sum(nothing)), 4)}
    for name in pairs[0].volumes[0]:
        truths = {"": np.array([pair.volumes[1][name] - pair.volumes[0][name] for pair in pairs])}
        if name in pairs[0].rows[0]:
            truths["_table"] = np.array([pair.rows[1][name] - pair.rows[0][name] for pair in pairs])
        shown = np.array([row[name] for row in measured])
        for kind, true in truths.items():
            varies = shown.std() > 0 and true.std() > 0
            result[name.removesuffix("_volume_ml") + kind] = {
                "error_ml": round(float(np.abs(shown - true).mean()), 3),
                "relative": round(float(np.abs(shown - true).mean() / np.abs(true).mean()), 3),
                "slope": round(float(np.polyfit(true, shown, 1)[0]), 3) if varies else None,
                "r": round(float(np.corrcoef(true, shown)[0, 1]), 3) if varies else None,
                "a_unit": round(float((shown * by).sum() / (by**2).sum()), 3),
                "true_a_unit": round(float((true * by).sum() / (by**2).sum()), 3),
            }
    return result


def table(methods: Mapping[str, Mapping]) -> str:
    """The figures in Markdown."""
    names = [name for name in next(iter(methods.values())) if name not in ("voxels", "cycle", "sharpness", "own")]
    head = ["method", "voxels", *(f"{n}: relative error, slope, r, a unit (true)" for n in names), "cycle", "sharpness", "own"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, found in methods.items():
        cells = [method, found["voxels"]]
        for name in names:
            of = found[name]
            cells.append(f"{of['relative']}, {of['slope']}, {of['r']}, {of['a_unit']} ({of['true_a_unit']})")
        cells += [found.get(name, "") for name in ("cycle", "sharpness", "own")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
