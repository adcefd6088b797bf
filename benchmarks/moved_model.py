"""Does a model explain heads that lay off-axis and shifted as well as the same brains as they lie?

    python benchmarks/moved_model.py MODEL FOLDER DATASET [--num 32] [--times 32] [--source rendered] [--out FILE.json]

FOLDER is what `moved_heads.py DATASET --folder FOLDER` kept: each head prepared twice, aligned and moved, as the scans of
the model's training were. DATASET has the covariates. No network is trained. Both volumes of a head get the same noise:

    psnr_db     of the autoencoder's reconstruction, in the foreground
    denoising   error of the latent at sigma / alpha = 0.5 and 2, of the variance of a latent, all covariates given
    bound       nats per latent dimension, given the covariates (`ldm3d.evaluation.likelihood`)
    explained   bound with all covariates open, less the bound with them given: what they tell of the latent

The table that is printed has means of both, the mean difference moved - aligned with its 95% interval over the heads, and r
between both over the heads.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ldm3d import Pipeline
from ldm3d.config.read import load_config
from ldm3d.data.preparing import load_prepared, read_scan_table
from ldm3d.diffusion.process import time_of_ratio
from ldm3d.evaluation.likelihood import denoiser, score_volume
from ldm3d.metrics.reconstruction import foreground, psnr
from ldm3d.randomness import generator
from ldm3d.statistics.bootstrap import mean_interval

LEVELS = 0.5, 2.0  # sigma / alpha
GREYS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--times", type=int, default=32)
    parser.add_argument("--source", help="the covariate `source`, of a model that has it")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained(arguments.model, "cpu")
    truth = pd.read_csv(arguments.dataset / "participants.tsv", sep="\t").assign(source=arguments.source)
    truth = truth.set_index(truth["participant_id"].str.removeprefix("sub-"))[pipe.schema.names]
    found = {name: of_all(pipe, arguments, name, truth) for name in ("aligned", "moved")}
    table = pd.concat(found, axis=1, join="inner")
    print(f"{len(table)} heads\n{(rows := compared(table)).round(4).to_string()}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"heads": len(table), "rows": rows.round(5).to_dict("index")}, indent=1) + "\n")


def of_all(pipe: Pipeline, arguments: argparse.Namespace, name: str, truth: pd.DataFrame) -> pd.DataFrame:
    """A row a subject of one of both preparations."""
    config = load_config(arguments.folder / f"{name}.yaml")
    scans = read_scan_table(config).sort_values("subject").head(arguments.num)
    rows = {}
    for i, scan in enumerate(scans.itertuples()):
        volume = torch.from_numpy(load_prepared(config, scan.key))[None]
        rows[scan.subject] = of_one(pipe, volume, truth.loc[scan.subject].to_dict(), i, arguments.times)
    return pd.DataFrame(rows).T


@torch.no_grad()
def of_one(pipe: Pipeline, volume: torch.Tensor, covariates: dict, number: int, times: int) -> dict[str, float]:
    given, is_open = pipe.parse([covariates, {}])
    options = {"method": "bound", "times": times, "ode_steps": 0, "levels": GREYS, "position": (0, number)}
    scored = [score_volume(pipe, volume, row, **options)["bound"] for row in (given, is_open)]
    z = pipe.autoencoder.encode(volume.to(pipe.dtype)).float().chunk(2, dim=1)[0]
    x = pipe.autoencoder.normalise(z).float()
    back = pipe.decode(x).float()
    found = {"psnr_db": psnr(back, volume, foreground(volume)).item(), "bound": scored[0], "explained": scored[1] - scored[0]}
    denoise = denoiser(pipe, given, x.shape, (0, number))
    for level in LEVELS:
        t = time_of_ratio(pipe.process, level)
        noise = torch.randn(x.shape, generator=generator("moved", number, level))
        z = pipe.process.alpha(t) * x + pipe.process.sigma(t) * noise
        found[f"denoising at {level}"] = (denoise(z, t) - x).square().mean().item()
    return found


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """A row a figure."""
    rows = {}
    for name in table["aligned"]:
        aligned, moved = table["aligned", name].to_numpy(float), table["moved", name].to_numpy(float)
        low, high = mean_interval(moved - aligned)
        rows[name] = {
            **{"aligned": aligned.mean(), "moved": moved.mean(), "difference": (moved - aligned).mean()},
            **{"from": low, "to": high, "r": np.corrcoef(aligned, moved)[0, 1], "spread": aligned.std(ddof=1)},
        }
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    main()
