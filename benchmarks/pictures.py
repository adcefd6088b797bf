"""Generated brains in three planes: docs/images/NAME.png, such as the README's first picture.

    python benchmarks/pictures.py MODEL [--num 12] [--seed 0]

Each row is drawn from the same noise. Along it the first continuous covariate rises from the lowest to the highest value that
training saw; the first categorical one alternates from row to row, and all others are left open.
"""

import argparse
from pathlib import Path

import numpy as np

from ldm3d import figures
from ldm3d.covariates import CovariateSchema, describe
from ldm3d.pipeline import Pipeline
from ldm3d.shipped import model_folder

IMAGES = Path(__file__).parents[1] / "docs/images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a pipeline's folder, or the name of a shipped model")
    parser.add_argument("--num", type=int, default=12, help="volumes")
    parser.add_argument("--columns", type=int, default=4, help="volumes in a row")
    parser.add_argument("--seed", type=int, default=None, help="of the noise; by default the model's")
    parser.add_argument("--out", type=Path, default=None, help="picture; by default docs/images/NAME.png")
    arguments = parser.parse_args()
    folder = model_folder(arguments.model)
    pipeline = Pipeline.from_pretrained(folder)
    rows = pipeline.parse(requests(pipeline.schema, arguments.num, arguments.columns))
    numbers, sampling = [i // arguments.columns for i in range(len(rows))], pipeline.sampling.replace(seed=arguments.seed)
    volumes = [volume.copy() for volume in pipeline.volumes(rows, sampling, numbers=numbers)]
    out = arguments.out or IMAGES / f"{folder.resolve().name}.png"
    mosaic = figures.mosaic(
        volumes, [describe(row) for row in rows], pipeline.output_grid.spacing_mm, arguments.columns, "synthetic"
    )
    figures.save(mosaic, out)
    print(f"written to {out}")


def requests(schema: CovariateSchema, count: int, columns: int) -> list[dict[str, float | str]]:
    """Requests that show the range of a model, see the top of this file."""
    rows: list[dict[str, float | str]] = [{} for _ in range(count)]
    continuous = next((c for c in schema if c.kind == "continuous" and c.seen), None)
    categorical = next((c for c in schema if c.kind == "categorical"), None)
    for i, row in enumerate(rows):
        if continuous and continuous.seen:
            row[continuous.name] = float(f"{np.linspace(*continuous.seen, columns)[i % columns]:.3g}")
        if categorical:
            row[categorical.name] = categorical.categories[i // columns % len(categorical.categories)]
    return rows


if __name__ == "__main__":
    main()
