"""A model folder for others: weights in half precision, a segmenter beside them if there is one, and a model card."""

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import ldm3d
from ldm3d import hub
from ldm3d.covariates import Covariate
from ldm3d.errors import InputError, choose
from ldm3d.files import write_atomic
from ldm3d.models.segmentation import SegmentationUNet
from ldm3d.pipeline import Pipeline
from ldm3d.shipped import SEGMENTER, model_folder, segmenter_folder

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
CARD = "README.md"
NOT_DESCRIBED = """## Data, training, figures

Not described. Write a text about whose data the model was trained on, how, and how well it does, and export it again with
`--about FILE.md`."""


def export(
    model: Path | str,
    out: Path | str,
    precision: str = "float16",
    about: Path | str | None = None,
    segmenter: Path | str | None = None,
    licence: str = "apache-2.0",
    called: str | None = None,
) -> int:
    """Write a copy of a model that can be given away; returns its size in bytes.

    Args:
        model: pipeline folder, or the name of a shipped model.
        out: folder to write, whose name becomes the model's; must be empty or absent.
        precision: of the weights in the files, see `PRECISIONS`.
        about: Markdown text of the card: data and whose they are, training, figures, limits.
        segmenter: folder of one that measures the model's volumes; None for the one beside the model's networks, if any.
        licence: of the weights, an identifier of Hugging Face's list.
        called: what the card calls the model; None for the name of `out`.

    Raises:
        InputError: no such model, segmenter or text, `out` is not empty, or weights beyond the range of the precision.
    """
    model, out = model_folder(model), Path(out)
    kind = PRECISIONS[choose("precision", precision, PRECISIONS)]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; choose another folder")
    if about is not None and not Path(about).is_file():
        raise InputError(f"no file {about}; give a Markdown text about data, training, figures and limits")
    text = Path(about).read_text(encoding="utf-8").strip() if about is not None else NOT_DESCRIBED
    pipeline = Pipeline.from_pretrained(model, "cpu", torch.float32)
    beside = segmenter_folder(segmenter or model)
    measured = None
    if segmenter is not None or beside.is_dir():
        measured = SegmentationUNet.from_pretrained(beside, "cpu", torch.float32)

    pipeline.save_pretrained(out, kind)
    if measured is not None:
        measured.save_pretrained(out / SEGMENTER, kind)
    exported = Pipeline.from_pretrained(out, "cpu", torch.float32)
    structures = list(measured.groups) if measured is not None else []
    write_atomic(out / CARD, card(called or out.resolve().name, exported, precision, text, structures, licence))
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def push(
    model: Path | str,
    name: str,
    precision: str = "float16",
    about: Path | str | None = None,
    licence: str = "apache-2.0",
    private: bool = False,
) -> str:
    """Push a model to a hub, see `ldm3d.hub`; returns the address of the commit.

    Args:
        model: pipeline folder, or the name of a shipped model. One with a card (README.md), which `export` wrote, is pushed as
            it is, unless `about` is given; of others a copy is exported first.
        name: "user/name".
        precision, about, licence: see `export`.
        private: whether a new model is for its owner alone.

    Raises:
        InputError: as `export`, or the hub does not take it.
    """
    folder = model_folder(model)
    with tempfile.TemporaryDirectory() as temporary:
        if about is not None or not (folder / CARD).is_file():
            copy = Path(temporary) / name.rpartition("/")[2]
            export(folder, copy, precision, about, licence=licence, called=name)
            folder = copy
        return hub.push(folder, name, private)


def card(name: str, pipeline: Pipeline, precision: str, about: str, structures: Sequence[str], licence: str) -> str:
    """The model card as Hugging Face reads it: front matter, then Markdown.

    Args:
        name: of the model.
        pipeline: as it was written.
        precision: of its files.
        about: Markdown text on data, training, figures and limits.
        structures: what the segmenter beside it measures; empty for none.
        licence: of the weights.
    """
    asked = [each for i, each in enumerate(pipeline.schema) if each.required or i < 2]
    options = "".join(f" --{each.name.replace('_', '-')} {shlex.quote(str(_example(each)))}" for each in asked)
    arguments = ", ".join(f"{each.name}={_example(each)!r}" for each in asked)
    measure = f"\nA segmenter lies beside the networks and measures {', '.join(structures)}: `--measure segmenter:{name}`.\n"
    without = " without skull" if pipeline.skull_stripped else ""
    grid, sampling = pipeline.output_grid, pipeline.sampling
    millions = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (pipeline.autoencoder, pipeline.unet)]
    rows = [f"| {each.name} | {_cell(each.answers)} | {'yes' if each.required else 'no'} |" for each in pipeline.schema]
    covariates = "\n".join(["| covariate | values | must be given |", "|---|---|---|", *rows]) if rows else "Nothing."
    return f"""---
license: {licence}
library_name: ldm3d
tags:
- medical
- mri
- brain
- 3d
- latent-diffusion
- synthetic-data
---

# {name}

A latent diffusion model of 3D brain MRI, made with ldm3d {ldm3d.__version__}: {pipeline.suffix} volumes{without}.

**For research only.** It is no medical device. What it generates is no patient's image and no basis of a diagnosis.

```bash
ldm3d generate {name}{options} --out synthetic
```

```python
import ldm3d

pipe = ldm3d.Pipeline.from_pretrained("{name}")
pipe({arguments}).save("synthetic")
```

`{name}` is this folder, or the model's name where it comes with ldm3d or lies at a hub. Everything that it generates is
marked as synthetic: in the header of each file, in its name and in its sidecar.
{measure if structures else ""}
## What it can be asked for

{covariates}

Covariates that are not given are left open. "Training saw" gives the lowest and highest value among the training subjects.

## Networks and volumes

- volumes: {" x ".join(map(str, grid.shape))} voxels of {" x ".join(f"{s:g}" for s in grid.spacing_mm)} mm
- autoencoder: {millions[0]:.2f} M parameters; U-Net: {millions[1]:.2f} M
- diffusion: {pipeline.process.kind}, the U-Net predicts {pipeline.target}
- sampling by default: {sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}
- weights: {precision}; biases, norms and statistics float32; hash {pipeline.model_hash}; safetensors and JSON, no code

{about}

## Licence

Weights: {licence}. The rights in the training data stay with those who made them.
"""


def _example(covariate: Covariate) -> str | int | float:
    """A value that can be requested: a category, or the mean of the training subjects, rounded."""
    if covariate.kind == "categorical":
        return covariate.categories[0]
    return round(covariate.mean) if abs(covariate.mean) >= 10 else float(f"{covariate.mean:.2g}")


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|")
