"""Restoring known volumes from thick slices and around holes, against what is tried first.

    python benchmarks/restore.py MODEL TABLE --mean TABLE [--num 6] [--samples 8] [--levels 8] [--corrections 2]
        [--without network remainder spread baselines adam] [--ablations [NAME ...]] [--trained MODEL ...] [--name NAME]
        [--picture FILE]

TABLE has a path column and covariates of people that the model has not seen, --mean one of people who make the mean brain.
Each scan is placed on the model's Grid as for `pipe.restore`; there it is the truth. From it are made

    slices   two voxels thick (box profile), with noise of 0.5% of the intensity range
    missing  every other slice is lost
    hole     everything within 27 mm of a place in the brain, which differs by person, is lost

and restored by cubic and linear interpolation (slices, missing), by the mean brain (hole), by optimising the latent alone
(Adam on the decoder's input, as InverseSR's second stage; Wang et al. 2023), and by `posterior_volumes`. PSNR is of the voxels
above 5% of the range (of these in the hole, or in missing slices), for the mean of the draws and for one of them. "held" is
the share of true voxels in the 90% interval. Seconds are of one core, CPU time, for a draw.

--trained: models of the same grid that were trained for this one task (super-resolution.yaml for slices, inpaint.yaml for
hole, of configs/conditions); each draws as many samples, given the same measurement and covariates.

--without: the network (the Gaussian at every level), the remainder, or the Gaussian's spread (white instead); "baselines" and
"adam" leave out what takes the most time. --ablations: after the whole method each of ABLATIONS, or those that are named, on
the same measurements. "noise N" is without the remainder, too; the likelihood has this deviation instead, tuned by hand.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from protocol import RESULTS
from scipy import ndimage
from torch import Tensor

from ldm3d import figures
from ldm3d.applications.decoding import LatentDecoder
from ldm3d.applications.placed import PlacedScan, place
from ldm3d.applications.prior import Prior, latent_shape, prior_of, white_spread
from ldm3d.applications.restore import CORRECTIONS, interval_of, posterior_volumes
from ldm3d.data.slicing import Measurement
from ldm3d.diffusion.operators import Chain, Linear, Measured, between, mask, slices
from ldm3d.environment import processor
from ldm3d.generation.given import Images
from ldm3d.generation.given_scans import Given
from ldm3d.pipeline import Pipeline
from ldm3d.precision import NAMES, dtype

NOISE = 0.005
RADIUS_MM = 27.0
ADAM_STEPS, ADAM_RATE = 50, 0.1
BRAIN = 0.05
WHOLE = "whole"
ABLATIONS: dict[str, dict[str, Any]] = {
    **{f"without {part}": {"without": [part]} for part in ("network", "remainder", "spread")},
    "gradient steps": {"iterations": 1},  # one of conjugate gradients: no Gauss-Newton step is solved
    "one correction": {"corrections": 1},  # by the linear path alone, where it is the Jacobian
    **{f"levels {count}": {"levels": count} for count in (1, 3, 12)},
    **{f"noise {noise:g}": {"without": ["remainder"], "noise": noise} for noise in (0.02, 0.05)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", choices=NAMES, default="auto", help="of the networks, as the commands have it")
    parser.add_argument("table", type=Path)
    parser.add_argument("--mean", type=Path, required=True)
    parser.add_argument("--num", type=int, default=6)
    parser.add_argument("--mean-num", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--corrections", type=int, default=CORRECTIONS)
    parser.add_argument("--without", nargs="*", default=[], choices=["network", "remainder", "spread", "baselines", "adam"])
    parser.add_argument("--ablations", nargs="*", metavar="NAME", help=", ".join(ABLATIONS))
    parser.add_argument("--trained", nargs="*", type=Path, default=[], metavar="MODEL")
    parser.add_argument("--tasks", nargs="*", default=["slices", "hole"])
    parser.add_argument("--name", default="restore-cpu", help="of the file of results")
    parser.add_argument("--picture", type=Path)
    parser.set_defaults(iterations=30, noise=NOISE)
    arguments = parser.parse_args()
    asked = [] if arguments.ablations is None else arguments.ablations or list(ABLATIONS)
    variants = {WHOLE: arguments}
    for name in asked:
        changed = {**vars(arguments), **ABLATIONS[name]}
        changed["without"] = [*arguments.without, *ABLATIONS[name].get("without", []), "baselines"]
        variants[name] = argparse.Namespace(**changed)
    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained(arguments.model, "cpu", dtype(arguments.precision, "cpu"))
    people = _people(arguments.table, arguments.num)
    average = None
    if "hole" in arguments.tasks:
        average = torch.stack([place(pipe, row["path"]).volume for row in _people(arguments.mean, arguments.mean_num)]).mean(0)
    trained = [Pipeline.from_pretrained(folder, "cpu", dtype(arguments.precision, "cpu")) for folder in arguments.trained]
    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, Tensor]] = []
    for number, person in enumerate(people):
        placed = place(pipe, person["path"])
        for task in arguments.tasks:
            linear, where = _task(task, placed, number)
            for variant, of_variant in variants.items():
                found, pictures = _restored(pipe, placed, person, task, linear, where, average, of_variant)
                if variant == WHOLE:
                    found |= _trained(trained, placed, person, task, linear, where, arguments.samples)
                rows.append({"person": person["participant_id"], "task": task, "variant": variant, **found})
                shown += pictures if number == 0 and variant == WHOLE else []
                print(json.dumps(rows[-1]), flush=True)
        _write(pipe, rows, arguments)  # after each, for a run that is stopped
        if arguments.picture and number == 0:
            volumes, titles = [volume[0].numpy() for _, volume in shown], [title for title, _ in shown]
            figures.save(figures.mosaic(volumes, titles, pipe.grid.spacing_mm, columns=5), arguments.picture)


def _write(pipe: Pipeline, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    means = {
        f"{task}, {variant}": of.dropna(axis=1).mean(numeric_only=True).round(3).to_dict()
        for (task, variant), of in pd.DataFrame(rows).groupby(["task", "variant"], sort=False)
    }
    settings = {key: getattr(arguments, key) for key in ("samples", "levels", "corrections", "without")}
    results = {
        "model": pipe.model_hash,
        "precision": str(pipe.dtype),
        "processor": processor(),
        **settings,
        "means": means,
        "people": rows,
    }
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(results, indent=2) + "\n")


def _people(table: Path, number: int) -> list[dict[str, Any]]:
    frame = pd.read_csv(table)
    return frame.iloc[np.linspace(0, len(frame) - 1, min(number, len(frame))).astype(int)].to_dict("records")


def _task(name: str, placed: PlacedScan, number: int) -> tuple[Linear, Tensor]:
    """The operator, and the voxels that are judged."""
    volume, spacing = placed.volume[0, 0], np.array(placed.pipe.grid.spacing_mm)
    brain = volume > BRAIN
    if name == "slices":
        return slices(2, volume.shape[2], 2.0, profile="box"), brain
    if name == "missing":
        known = (torch.arange(volume.shape[2]) % 2 == 0).expand(volume.shape)
        return mask(known), brain & ~known
    inside = np.argwhere(ndimage.binary_erosion(brain.numpy(), iterations=3))
    centre = inside[np.random.default_rng(number).integers(len(inside))]
    distance = np.linalg.norm((np.moveaxis(np.indices(volume.shape), 0, -1) - centre) * spacing, axis=-1)
    hole = torch.from_numpy(distance < RADIUS_MM)
    return mask(~hole), hole & brain


def _restored(
    pipe: Pipeline,
    placed: PlacedScan,
    person: dict[str, Any],
    task: str,
    linear: Linear,
    where: Tensor,
    average: Tensor | None,
    arguments: argparse.Namespace,
) -> tuple[dict[str, float], list[tuple[str, Tensor]]]:
    truth, y = placed.volume, _measured(linear, placed)
    (row,) = pipe.parse([{name: person[name] for name in ("age", "sex", "source") if name in pipe.schema.names}])
    start, cpu = time.perf_counter(), time.process_time()
    drawn = posterior_volumes(
        *(pipe, linear, y, row, arguments.noise, range(arguments.samples), arguments.levels),
        corrections=arguments.corrections,
        iterations=arguments.iterations,
        prior=_prior(pipe, row, arguments.without),
        keep_remainder="remainder" not in arguments.without,
    )
    draws, expected, _ = (torch.stack(each) for each in zip(*drawn))
    seconds = (time.process_time() - cpu) / arguments.samples
    mean = expected.mean(0, keepdim=True).clamp(0, 1)
    found = {"mean": _psnr(mean, truth, where), "one": _psnr(expected[:1].clamp(0, 1), truth, where)}
    shown = [("the truth", truth), (f"{task}: mean of draws", mean), (f"{task}: a draw", draws[:1].clamp(0, 1))]
    for count in (2, 4, 8):  # of draws, what the mean of fewer gives
        if count < arguments.samples:
            found[f"mean of {count}"] = _psnr(expected[:count].mean(0, keepdim=True).clamp(0, 1), truth, where)
    if arguments.samples > 1:
        low, high = interval_of(mean, draws, 0.9)
        found["held"] = float(((low <= truth) & (truth <= high))[0, 0][where].float().mean())
        found["deviation"] = float(draws.var(0)[0][where].mean().sqrt())
        shown.append((f"{task}: deviation x 5", 5 * draws.std(0, keepdim=True)))
    found |= {"seconds": seconds, "wall_seconds": (time.perf_counter() - start) / arguments.samples}
    if "baselines" not in arguments.without:
        plain = average if task == "hole" else _interpolated(y, truth.shape, task, 3)
        assert plain is not None
        found["plain"] = _psnr(plain, truth, where)
        if task != "hole":
            found["linear"] = _psnr(_interpolated(y, truth.shape, task, 1), truth, where)
        if "adam" not in arguments.without:
            optimised, found["optimised_seconds"] = _optimised(pipe, placed, linear, y, task)
            found["optimised"] = _psnr(optimised, truth, where)
        shown.insert(1, ("mean brain" if task == "hole" else "cubic interpolation", plain))
    return {key: round(value, 3) for key, value in found.items()}, shown


def _measured(linear: Linear, placed: PlacedScan) -> Tensor:
    return Measured(linear, NOISE).draw(placed.volume, torch.Generator().manual_seed(1))


def _trained(
    models: list[Pipeline],
    placed: PlacedScan,
    person: dict[str, Any],
    task: str,
    linear: Linear,
    where: Tensor,
    samples: int,
) -> dict[str, float]:
    """PSNR of the mean of samples, and of one, of the model that was trained for the task; {} where there is none."""
    found: dict[str, float] = {}
    for model in models:
        (condition,) = model.conditions
        y = _measured(linear, placed)[0]
        if task == "slices" and getattr(condition, "coarsens", False):
            count = placed.volume.shape[-1]
            back = Chain(linear, between(2, 0.5 + 2.0 * torch.arange(count // 2, dtype=torch.float64), count))
            volume = back.operators[-1](y)
            given = Given({condition.name: volume}, {}, {}, coarse={condition.name: Measurement(back, volume, NOISE)})
        elif task == "hole" and getattr(condition, "hides", False):
            known = linear(torch.ones_like(placed.volume))[0]
            given = Given({condition.name: y * known}, {condition.name: known}, {})
        else:
            continue
        of_one = model.given(Images(model.conditions, lambda _, given=given: given, {"benchmark": "restore"}, None))
        rows = model.parse([{name: person[name] for name in ("age", "sex", "source") if name in model.schema.names}] * samples)
        cpu = time.process_time()
        drawn = torch.from_numpy(np.stack([*of_one.volumes(rows, model.sampling)]))
        found["trained_seconds"] = round((time.process_time() - cpu) / samples, 3)
        found |= {"trained": round(_psnr(drawn.mean(0, keepdim=True), placed.volume, where), 3)}
        found |= {"trained one": round(_psnr(drawn[:1], placed.volume, where), 3)}
    return found


def _interpolated(y: Tensor, shape: torch.Size, task: str, order: int) -> Tensor:
    """Splines of an order across slices: whose middles lie between voxels if they are thick, else on every other one."""
    known, offset = (y[0, 0, ..., ::2], 0.0) if task == "missing" else (y[0, 0], 0.5)
    places = np.stack(np.meshgrid(*(np.arange(n) for n in shape[2:]), indexing="ij")).astype(float)
    places[2] = (places[2] - offset) / 2
    return torch.from_numpy(ndimage.map_coordinates(known.numpy(), places, order=order, mode="nearest"))[None, None].clamp(
        0, 1
    )


def _optimised(pipe: Pipeline, placed: PlacedScan, linear: Linear, y: Tensor, task: str) -> tuple[Tensor, float]:
    """The latent that explains the measurement best, by Adam from the mean latent; no prior but where it starts."""
    start, decoder = time.process_time(), LatentDecoder(pipe)
    scales = torch.tensor(pipe.scales or [1.0] * placed.z.shape[1])[:, None, None, None]  # else some channels hardly move
    u = torch.zeros_like(placed.z, requires_grad=True)
    optimiser = torch.optim.Adam([u], ADAM_RATE)
    for _ in range(ADAM_STEPS):
        optimiser.zero_grad()
        (linear(decoder(scales * u)) - y).square().sum().backward()
        optimiser.step()
    with torch.no_grad():
        return decoder(scales * u).clamp(0, 1), time.process_time() - start


def _psnr(volume: Tensor, truth: Tensor, where: Tensor) -> float:
    return float(-10 * (volume - truth)[0, 0][where].square().mean().log10())


def _prior(pipe: Pipeline, row: dict[str, Any], without: list[str]) -> Prior:
    """What the method knows of latents, without parts of it."""
    prior = prior_of(pipe, row)
    if "network" in without:
        assert pipe.start is not None
        prior = prior._replace(denoise=pipe.start.denoiser(pipe.schema.encode([row]), pipe.process))
    if "spread" in without:
        prior = prior._replace(spread=white_spread(pipe, latent_shape(pipe)))
    return prior


if __name__ == "__main__":
    main()
