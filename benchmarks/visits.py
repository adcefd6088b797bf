"""How true is the change that a model of visits shows, forwards and backwards in time?

    python benchmarks/visits.py CONFIG [--set key=value] [--num 60] [--steps 12] [--samples 8] [--picture FILE.png]

Each held-out scan of the config's test split that has another visit is made from that one, with the age and the sex that the
table gives; all else is left open. Compared is the *change* from the visit that was given: of the ventricles and of the brain
by the built-in ruler, and of the voxels of the grid. Beside it "no change", and a linear extrapolation in the latent space:
the change of each number by the years between and by their product with the age, fitted to all pairs of the training split.
"""

from pathlib import Path

import numpy as np
import torch
from held_out import HeldOut, options
from numpy.typing import NDArray
from tqdm import tqdm

from ldm3d import figures
from ldm3d.config.conditions import ImageCondition
from ldm3d.data.conditions import visits_of
from ldm3d.data.preparing import load_prepared
from ldm3d.rulers.volumetry import measure_volumes

QUANTITIES = ("ventricular_volume_ml", "brain_volume_ml")
MEAN, KEPT = "mean of the samples", "the same, with what the autoencoder cannot hold of the visit given"
RIDGE = 1e-3


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--num", type=int, default=60)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    held = HeldOut.of(asked.config, asked.set)
    visit = next(each for each in held.config.given_conditions if isinstance(each, ImageCondition) and each.visit)
    linear, shown = Linear.fit(held, visit), []
    years, found = [], {name: [] for name in ("truth", "no change", "linear", "a sample", MEAN, KEPT)}
    for i in tqdm(held.some(asked.num), desc="scans"):
        given = held.given(i)
        first = held.pipeline.cropped(given.volumes[visit.name].numpy())
        age, own = float(held.images.told(i)[visit.name]["age"]), float(held.rows[i]["age"])
        drawn = held.drawn(i, asked.samples, asked.steps, ("age", "sex", "source"))
        volumes = {"truth": held.truth(i), "no change": first, "linear": held.pipeline.cropped(linear(first, age, own))}
        lost = first - held.pipeline.cropped(held.pipeline.reconstruct(torch.from_numpy(first)[None])[0].cpu().numpy())
        several = {MEAN: drawn, KEPT: (drawn + lost).clip(0, 1)}
        volumes |= {"a sample": drawn[0], **{name: each.mean(axis=0) for name, each in several.items()}}
        before = measured(first, held)
        for name, volume in volumes.items():
            change = np.mean([measured(one, held) for one in several.get(name, [volume])], axis=0) - before
            found[name].append([*change, np.square(volume - volumes["truth"]).sum()])
        years.append(own - age)
        shown.append([first, drawn[0], volumes[MEAN], volumes["truth"]])
    report(np.array(years), {name: np.array(rows) for name, rows in found.items()})
    if asked.picture:
        most = np.argsort(-np.abs(years))[:3]
        pictures = [volume for k in most for volume in shown[k]]
        titles = [t for k in most for t in ("given", f"a sample, {years[k]:+.1f} years", "mean", "truth")]
        figures.save(figures.mosaic(pictures, titles, held.pipeline.grid.spacing_mm, columns=4), asked.picture)


def measured(volume: NDArray, held: HeldOut) -> NDArray:
    found = measure_volumes(volume[0], held.pipeline.grid.spacing_mm)
    return np.array([found[name] for name in QUANTITIES])


def report(years: NDArray, found: dict[str, NDArray]) -> None:
    """Errors of the change, relative to no change; slope and r on the true change; forwards and backwards."""
    truth = found.pop("truth")
    for direction, chosen in (("all", years != 0), ("forwards", years > 0), ("backwards", years < 0)):
        if not chosen.any():
            continue
        for name, rows in found.items():
            line = []
            for k, quantity in enumerate(QUANTITIES):
                true, change = truth[chosen, k], rows[chosen, k]
                relative = np.abs(change - true).mean() / np.abs(true).mean()
                slope = np.polyfit(true, change, 1)[0]
                r = np.corrcoef(true, change)[0, 1] if change.std() > 0 else np.nan
                line.append(f"{quantity.removesuffix('_volume_ml')} {relative:.2f} (slope {slope:.2f}, r {r:.2f})")
            voxels = rows[chosen, 2].sum() / found["no change"][chosen, 2].sum()
            print(
                f"{direction} ({chosen.sum()}), {name}: error of the change {', '.join(line)}; voxels {voxels:.2f}", flush=True
            )


class Linear:
    """Latent change as a linear function of the years between two visits and of the age, from the training's pairs."""

    def __init__(self, held: HeldOut, weights: NDArray):
        self.held, self.weights = held, weights

    @classmethod
    def fit(cls, held: HeldOut, visit: ImageCondition) -> "Linear":
        scans = held.trained
        latents = [_latent(held, load_prepared(held.config, key)) for key in tqdm(scans["key"], desc="training scans")]
        ages = scans["age"].astype(float).to_numpy()
        pairs = [(row, other) for row, others in enumerate(visits_of(visit, scans)) for other in others]
        x = np.array([_terms(ages[other], ages[row]) for row, other in pairs])
        y = np.array([(latents[row] - latents[other]).numpy().ravel() for row, other in pairs])
        return cls(held, np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y))

    def __call__(self, first: NDArray, age: float, to: float) -> NDArray:
        decode, z = self.held.pipeline.decode, _latent(self.held, first)
        change = torch.from_numpy(np.array(_terms(age, to)) @ self.weights).float().view_as(z)
        # What the autoencoder cannot hold is kept
        difference = decode(z + change) - decode(z)
        return (first + difference[0].numpy()).clip(0, 1)


def _latent(held: HeldOut, volume: NDArray) -> torch.Tensor:
    autoencoder = held.pipeline.autoencoder
    kind = next(autoencoder.parameters()).dtype
    return autoencoder.sample(autoencoder.encode(torch.from_numpy(volume)[None].to(kind))).float()  # the posterior's mean


def _terms(age: float, to: float) -> tuple[float, float]:
    """Per year, at the middle of the two ages."""
    years = (to - age) / 10
    return years, years * ((age + to) / 2 - 55) / 20


if __name__ == "__main__":
    main()
