"""How near generated brains come to held-out people: distances, what they follow, and how much they vary.

    python benchmarks/drawn.py MODEL --data TABLE [--root DIR] [--work DIR] [--only source=rendered] [--num 96]
        [--segmenter MODEL] [--sampler NAME] [--steps N] [--guidance W] [--spread 1.0]

TABLE or BIDS folder is as `ldm3d evaluate` takes it, with scans of the training and others. For the covariates of as many
held-out people one brain each is generated. Printed are

- Fréchet distances to reconstructions of the people themselves, by the segmenter's features and by random ones,
- r and slope of each continuous covariate, asked and measured by a ruler that is learned from the segmenter's features of up
  to 200 training scans,
- the deviation of generated latents about the mean that the model's Gaussian has under the covariates, as a share of that of
  the people's own latents, mean over channels. With --spread generated latents are first spread about that mean by a factor.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ldm3d.data.preparing import load_prepared
from ldm3d.experiment import scans_by_use
from ldm3d.metrics.distances import frechet_distance
from ldm3d.metrics.features import extract, load_extractor, standardise
from ldm3d.models.unet import cut_to
from ldm3d.pipeline import Pipeline
from ldm3d.processes import ALONE
from ldm3d.rulers.regression import fit_ridge
from ldm3d.shipped import model_folder, segmenter_folder

RULED, BATCH = 200, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--work", type=Path, default=Path("drawn"), help="where scans are prepared")
    parser.add_argument("--only", metavar="NAME=VALUE", help="people with this value in the table")
    parser.add_argument("--num", type=int, default=96)
    parser.add_argument("--segmenter", help="a folder, or a model that has one; by default the model's")
    parser.add_argument("--sampler")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--spread", type=float, default=1.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = model_folder(asked.model)
    pipeline = Pipeline.from_pretrained(model)
    config, trained, held_out = scans_by_use(model, asked.data, asked.work, asked.root, ALONE, None, [])
    if asked.only:
        name, value = asked.only.split("=", 1)
        trained, held_out = (scans[scans[name].astype(str) == value] for scans in (trained, held_out))
    people, others = held_out.iloc[: asked.num], trained.iloc[:: max(len(trained) // RULED, 1)][:RULED]
    sampling = pipeline.sampling.replace(sampler=asked.sampler, steps=asked.steps, guidance=asked.guidance)
    rows = pipeline.parse(people[pipeline.schema.names].to_dict("records"))
    shape = pipeline.autoencoder.latent_shape(pipeline.grid.shape)[1:]

    def volumes(latents: Tensor) -> list[np.ndarray]:
        return [pipeline.cropped(pipeline.decode(z[None])[0].float().cpu().numpy()) for z in latents]

    truths = [torch.from_numpy(load_prepared(config, key))[None] for key in people["key"]]
    own = torch.cat([pipeline.channels.latents(volume) for volume in tqdm(truths, desc="people")])
    own = pipeline.autoencoder.normalise(own)
    batches = tqdm(range(0, len(rows), BATCH), desc="generate")
    drawn = [pipeline.latents(rows[i : i + BATCH], sampling, range(i, min(i + BATCH, len(rows)))) for i in batches]
    generated = cut_to(torch.cat(drawn).float(), shape)
    if pipeline.start is not None:
        nothing = torch.zeros(len(rows), *pipeline.start.shape)
        mean = cut_to(pipeline.start.denoiser(pipeline.schema.encode(rows), pipeline.process)(nothing, 1.0).float(), shape)
        generated = mean + asked.spread * (generated - mean)
        ratio = ((generated - mean).square().mean((0, 2, 3, 4)) / (own - mean).square().mean((0, 2, 3, 4))).sqrt().mean()
        print(f"deviation of generated latents, as a share of people's: {float(ratio):.3f}")

    segmenter = f"segmenter:{segmenter_folder(asked.segmenter or model)}"
    made, reconstructed = volumes(generated), volumes(own)
    for name in (segmenter, "random"):
        extractor = load_extractor(name)
        distance = frechet_distance(*standardise(extract(reconstructed, extractor), extract(made, extractor)))
        print(f"Fréchet distance to reconstructions, {name.partition(':')[0]} features: {distance:.1f}")
    extractor = load_extractor(segmenter)
    of_training = extract([pipeline.cropped(load_prepared(config, key)) for key in others["key"]], extractor).double().numpy()
    features = extract(made, extractor).double().numpy()
    for covariate in pipeline.schema:
        values = pd.to_numeric(others[covariate.name], errors="coerce").to_numpy()
        wanted = pd.to_numeric(people[covariate.name], errors="coerce").to_numpy()
        if covariate.kind == "continuous" and np.isfinite(values).all() and np.isfinite(wanted).all():
            found = fit_ridge(of_training, values)(features)
            r, slope = np.corrcoef(wanted, found)[0, 1], np.polyfit(wanted, found, 1)[0]
            print(f"{covariate.name}, asked and measured: r {r:.3f}, slope {slope:.3f}")


if __name__ == "__main__":
    main()
