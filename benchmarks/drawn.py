"""How near generated brains come to held-out people: distances, what they follow, and how much they vary.

    python benchmarks/drawn.py MODEL --data TABLE [--root DIR] [--work DIR] [--only source=rendered] [--num 96]
        [--segmenter MODEL] [--sampler NAME] [--steps N] [--guidance W] [--spread 1.12] [--level RATIO] [--classifier]

TABLE or BIDS folder is as `ldm3d evaluate` takes it, with scans of the training and others. For the covariates of as many
held-out people one brain each is generated. Printed are

- Fréchet distances to reconstructions of the people themselves, by the segmenter's features and by random ones,
- r and slope of each continuous covariate, asked and measured by a ruler that is learned from the segmenter's features of up
  to 200 training scans,
- the deviation of generated latents about the mean that the model's Gaussian has under the covariates, as a share of that of
  the people's own latents, mean over channels,
- with --classifier the AUC of a classifier that tells generated brains from reconstructions.

With --level generation starts from the people's own latents, noised to this sigma / alpha: what differs then was lost below
it.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ldm3d.covariates import Value
from ldm3d.data.preparing import load_prepared
from ldm3d.diffusion.process import time_of_ratio
from ldm3d.diffusion.samplers import follow
from ldm3d.experiment import scans_by_use
from ldm3d.metrics.discriminability import classifier_auc
from ldm3d.metrics.distances import frechet_distance
from ldm3d.metrics.features import extract, load_extractor, standardise
from ldm3d.models.unet import cut_to, pad_to
from ldm3d.pipeline import Pipeline
from ldm3d.processes import ALONE
from ldm3d.randomness import generator
from ldm3d.rulers.regression import fit_ridge
from ldm3d.shipped import model_folder, segmenter_folder

RULED, BATCH = 200, 8
LOWEST, STEPS_A_DECADE = 0.03, 6  # sigma / alpha before the last step, and steps, where generation starts from people


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
    parser.add_argument("--spread", type=float, help="see `ldm3d.description.Sampling`")
    parser.add_argument("--level", type=float, help="sigma / alpha to which people's own latents are noised")
    parser.add_argument("--classifier", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = model_folder(asked.model)
    pipeline = Pipeline.from_pretrained(model)
    config, trained, held_out = scans_by_use(model, asked.data, asked.work, asked.root, ALONE, None, [])
    if asked.only:
        name, value = asked.only.split("=", 1)
        trained, held_out = (scans[scans[name].astype(str) == value] for scans in (trained, held_out))
    people, others = held_out.iloc[: asked.num], trained.iloc[:: max(len(trained) // RULED, 1)][:RULED]
    options = {"sampler": asked.sampler, "steps": asked.steps, "guidance": asked.guidance, "spread": asked.spread}
    sampling = pipeline.sampling.replace(**options)
    rows = pipeline.parse(people[pipeline.schema.names].to_dict("records"))
    shape = pipeline.autoencoder.latent_shape(pipeline.grid.shape)[1:]

    def volumes(latents: Tensor) -> list[np.ndarray]:
        return [pipeline.cropped(pipeline.decode(z[None])[0].float().cpu().numpy()) for z in latents]

    truths = [torch.from_numpy(load_prepared(config, key))[None] for key in people["key"]]
    own = torch.cat([pipeline.channels.latents(volume) for volume in tqdm(truths, desc="people")])
    own = pipeline.autoencoder.normalise(own)
    drawn = []
    for i in tqdm(range(0, len(rows), BATCH), desc="generate"):
        some, numbers = slice(i, i + BATCH), range(i, min(i + BATCH, len(rows)))
        if asked.level is None:
            drawn.append(pipeline.latents(rows[some], sampling, numbers))
        else:
            drawn.append(sampled_down(pipeline, own[some], rows[some], numbers, asked.level))
    generated = cut_to(torch.cat(drawn).float(), shape)
    if pipeline.start is not None:
        mean = cut_to(pipeline.start.expected(pipeline.schema.encode(rows)), shape)
        ratio = ((generated - mean).square().mean((0, 2, 3, 4)) / (own - mean).square().mean((0, 2, 3, 4))).sqrt().mean()
        print(f"deviation of generated latents, as a share of people's: {float(ratio):.3f}")

    segmenter = f"segmenter:{segmenter_folder(asked.segmenter or model)}"
    made, reconstructed = volumes(generated), volumes(own)
    for name in (segmenter, "random"):
        extractor = load_extractor(name)
        distance = frechet_distance(*standardise(extract(reconstructed, extractor), extract(made, extractor)))
        print(f"Fréchet distance to reconstructions, {name.partition(':')[0]} features: {distance:.1f}")
    if asked.classifier:
        auc = classifier_auc(*(torch.from_numpy(np.stack(volumes)) for volumes in (reconstructed, made)))
        print(f"AUC of a classifier between reconstructions and generated brains: {auc:.3f}")
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


def sampled_down(pipeline: Pipeline, x: Tensor, rows: list[dict[str, Value]], numbers: range, level: float) -> Tensor:
    """Latents x (N, c, x, y, z), noised to sigma / alpha = level and sampled from there, on the U-Net's padded grid."""
    x = pad_to(x, pipeline.unet.padded_shape(x.shape[2:]))
    noise = torch.stack([torch.randn(x.shape[1:], generator=generator("level", number)) for number in numbers])
    steps = max(4, round(STEPS_A_DECADE * np.log10(level / LOWEST)))
    times = [time_of_ratio(pipeline.process, ratio) for ratio in np.geomspace(level, LOWEST, steps)]
    z = pipeline.process.add_noise(x, noise, times[0])
    with torch.inference_mode():
        return follow("unipc", pipeline.denoiser(rows), z, [*times, 0.0], pipeline.process)


if __name__ == "__main__":
    main()
