"""What a Gaussian knows of an experiment's latents, and what sampling draws when it starts with one.

    python benchmarks/gaussian_start.py CONFIG [--until 1.5 0.7] [--components 48] [--num 4] [--ask age=60] [--out PICTURE]

A Gaussian with the covariates in it is fitted in closed form to the training latents of an experiment that is trained
(`ldm3d.start`). Printed are the shares of the variance of validation latents that covariates, and covariates and components,
explain. Volumes are then drawn from the same noise by the network alone, with the Gaussian until sigma / alpha is each of
`--until`, and by the Gaussian alone.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm3d import figures
from ldm3d.config.read import load_config
from ldm3d.data.latents import read_latents
from ldm3d.experiment import latents_origin
from ldm3d.pipeline import Pipeline
from ldm3d.start import GaussianStart, features

NEVER = 1e-4  # sigma / alpha below which no sampler asks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--until", type=float, nargs="+", default=[1.5, 0.7], help="sigma / alpha of the network's turn")
    parser.add_argument("--components", type=int, default=48)
    parser.add_argument("--num", type=int, default=4, help="volumes of each kind")
    parser.add_argument("--ask", nargs="*", default=[], metavar="NAME=VALUE", help="covariates; others are left open")
    parser.add_argument("--out", type=Path, default=Path("gaussian-start.png"))
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    pipeline = Pipeline.from_pretrained(config.model_folder)
    moments, scans = read_latents(config.latents_folder, latents_origin(config))
    context = pipeline.schema.encode(scans[pipeline.schema.names].to_dict("records"))
    training, held_out = (np.flatnonzero(scans["split"] == split) for split in ("train", "validation"))
    latents = {split: means(moments, rows, pipeline) for split, rows in (("train", training), ("validation", held_out))}
    categories = pipeline.schema.num_categories
    start = GaussianStart.fit(latents["train"], context[training], categories, arguments.components, 1.0)
    of_covariates, of_both = explained(start, latents["train"], latents["validation"], context[held_out])
    print(f"of the variance of {len(held_out)} validation latents covariates explain {of_covariates:.2f}, ", end="")
    print(f"with {arguments.components} components {of_both:.2f}")

    rows = pipeline.parse([dict(pair.split("=", 1) for pair in arguments.ask)] * arguments.num)
    volumes, titles = [], []
    for title, until in [("network", None), *((f"Gaussian until {u:g}", u) for u in arguments.until), ("Gaussian", NEVER)]:
        pipeline.start = copy.copy(start) if until else None
        if pipeline.start is not None:
            pipeline.start.until = until
        volumes += list(pipeline.volumes(rows, pipeline.sampling))
        titles += [title] * arguments.num
    figures.save(figures.mosaic(volumes, titles, pipeline.grid.spacing_mm, columns=arguments.num), arguments.out)
    print(f"written to {arguments.out}")


def means(moments: np.ndarray, rows: np.ndarray, pipeline: Pipeline) -> Tensor:
    """The normalised means of scans' posteriors, (N, c, x, y, z)."""
    of_each = (pipeline.autoencoder.sample(torch.from_numpy(np.array(moments[row])[None])) for row in rows)
    return torch.cat([pipeline.autoencoder.normalise(mean) for mean in of_each]).cpu()


def explained(start: GaussianStart, training: Tensor, held_out: Tensor, context: Tensor) -> tuple[float, float]:
    """Shares of the variance of held-out latents about the training mean: by covariates; and by components, too."""
    values, known = features(context, start.num_categories)
    rest = torch.stack([x - start.gaussian.given(v[None], k).mean[0] for x, v, k in zip(held_out, values, known)]).flatten(1)
    basis = torch.linalg.qr(start.directions.flatten(1).T).Q
    total = (held_out - training.mean(dim=0)).square().sum()
    left = rest - (rest @ basis) @ basis.T
    return 1 - float(rest.square().sum() / total), 1 - float(left.square().sum() / total)


if __name__ == "__main__":
    main()
