"""The model card: what a model is, made of, trained on and found to do, from its files alone."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import ldm3d
from ldm3d.covariates import Covariate
from ldm3d.methods import MOST_SITES
from ldm3d.pipeline import Pipeline

FEW, MANY = 20, 100  # training subjects of a category; of a model
DATA, TRAINING, FIGURES, LIMITS = "Data", "Training", "Figures", "Limits"  # sections
SETTINGS = {
    "steps": "steps",
    "batch_size": "batch",
    "learning_rate": "learning rate",
    "optimizer": "optimiser",
    "schedule": "schedule",
    "ema": "decay of averages",
    "keep": "kept",
}
NOT_DESCRIBED = """## Data, training, figures

Not described: this model has no `training.json`, which a training writes. Write a text about whose data it was trained
on, how, and how well it does, and export it again with `--about FILE.md`."""


def card(
    name: str,
    pipeline: Pipeline,
    precision: str,
    *,
    account: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    about: str = "",
    structures: Sequence[str] = (),
    licence: str = "apache-2.0",
) -> str:
    """The model card as Hugging Face reads it: front matter, then Markdown.

    Args:
        name: of the model.
        pipeline: as it was written.
        precision: of its files.
        account: of `ldm3d.account`; None where the model has none.
        metrics: of an evaluation of this model; None without one.
        about: Markdown text of the model's makers. What it says under a heading of the card (`## Data`, `## Training`,
            `## Figures`, `## Limits`) becomes a part of that section; its other sections come before the limits.
        structures: what the segmenter beside it measures; empty for none.
        licence: of the weights.
    """
    measure = f"\nA segmenter lies beside the networks and measures {', '.join(structures)}: `--measure segmenter:{name}`.\n"
    of, without = " and ".join(pipeline.suffixes), " without skull" if pipeline.skull_stripped else ""
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

A latent diffusion model of 3D brain MRI, made with ldm3d {ldm3d.__version__}: {of} volumes{without}.

**For research only.** It is no medical device. What it generates is no patient's image and no basis of a diagnosis.

{_request(name, pipeline)}

`{name}` is this folder, or the model's name where it comes with ldm3d or lies at a hub. Everything that it generates is
marked as synthetic: in the header of each file, in its name and in its sidecar.
{measure if structures else ""}
## What it can be asked for

{_covariates(pipeline)}

Covariates that are not given are left open. "Training saw" gives the lowest and highest value among the training subjects.

## Networks and volumes

{_networks(pipeline)}
- weights: {precision}; biases, norms and statistics float32; hash {pipeline.model_hash}; safetensors and JSON, no code

{_known(pipeline, account, metrics, about)}

## Licence

Weights: {licence}. The rights in the training data stay with those who made them.
"""


def _request(name: str, pipeline: Pipeline) -> str:
    """How to ask for volumes, with covariates that have to be given or come first."""
    asked = [each for i, each in enumerate(pipeline.schema) if each.required or i < 2]
    options = "".join(f" --{each.name.replace('_', '-')} {shlex.quote(str(_example(each)))}" for each in asked)
    arguments = ", ".join(f"{each.name}={_example(each)!r}" for each in asked)
    return f"""```bash
ldm3d generate {name}{options} --out synthetic
```

```python
import ldm3d

pipe = ldm3d.Pipeline.from_pretrained("{name}")
pipe({arguments}).save("synthetic")
```"""


def _covariates(pipeline: Pipeline) -> str:
    rows = [f"| {each.name} | {_cell(each.answers)} | {'yes' if each.required else 'no'} |" for each in pipeline.schema]
    return "\n".join(["| covariate | values | must be given |", "|---|---|---|", *rows]) if rows else "Nothing."


def _networks(pipeline: Pipeline) -> str:
    grid, sampling = pipeline.output_grid, pipeline.sampling
    millions = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (pipeline.autoencoder, pipeline.unet)]
    return f"""- volumes: {" x ".join(map(str, grid.shape))} voxels of {" x ".join(f"{s:g}" for s in grid.spacing_mm)} mm
- autoencoder: {millions[0]:.2f} M parameters; U-Net: {millions[1]:.2f} M
- diffusion: {pipeline.process.kind}, the U-Net predicts {pipeline.target}
- sampling by default: {sampling}"""


def _known(pipeline: Pipeline, account: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None, about: str) -> str:
    """Data, training, figures and limits, as far as files and the makers' text say."""
    first, said = _sections(about)
    known = {DATA: "", TRAINING: "", FIGURES: _figures(metrics) if metrics else ""}
    if account:
        known |= {DATA: _data(account), TRAINING: _training(account)}
    elif not about:
        first = NOT_DESCRIBED
    found = [(title, [text, said.pop(title, "")]) for title, text in known.items()]
    limits = [said.pop(LIMITS, "")]
    if account or metrics:
        limits.append("What follows from the figures above:\n\n" + "\n".join(_limits(pipeline, account, metrics)))
    found += [*((title, [text]) for title, text in said.items()), (LIMITS, limits)]
    texts = [(title, "\n\n".join(part for part in parts if part)) for title, parts in found]
    return "\n\n".join([*[first] * bool(first), *(f"## {title}\n\n{text}" for title, text in texts if text)])


def _sections(about: str) -> tuple[str, dict[str, str]]:
    """What stands before the first heading of the second level, and each section by its title; one of two parts is joined."""
    first, *pieces = re.split(r"^## +(.*\S)[ \t]*$", about, flags=re.MULTILINE)
    found: dict[str, str] = {}
    for title, text in zip(pieces[::2], pieces[1::2]):
        found[title] = "\n\n".join(part for part in (found.get(title, ""), text.strip()) if part)
    return first.strip(), found


def _data(account: Mapping[str, Any]) -> str:
    data, table = account["data"], account["data"]["table"]
    lines = [
        *_dataset(data.get("source", {})),
        "| |" + "|".join(table["columns"][1:]) + "|",
        "|---" * len(table["columns"]) + "|",
    ]
    lines += ["| " + " | ".join(_cell(cell).replace("\n", "; ") for cell in row) + " |" for row in table["rows"]]
    sites = ", ".join(f"{site} ({count})" for site, count in list(data["sites"].items())[:MOST_SITES])
    more = len(data["sites"]) - MOST_SITES
    if sites:
        lines.append(f"\nSites of the training subjects: {sites}{f' and {more} more' if more > 0 else ''}.")
    return "\n".join(lines)


def _training(account: Mapping[str, Any]) -> str:
    """The settings of each network's training, the U-Net's earlier parts too, with versions."""
    last, earlier = account["stages"], _earlier(account)
    stages: dict[str, Mapping[str, Any]] = {"autoencoder": last["autoencoder"]}
    stages |= {f"U-Net, part {number}": stage for number, stage in enumerate(filter(None, earlier), 1)}
    stages["U-Net, last part" if earlier else "U-Net"] = last["diffusion"]
    lines = ["| |" + " | ".join(stages) + " |", "|---" * (1 + len(stages)) + "|"]
    for key, label in SETTINGS.items():
        cells = (f"{stage[key]:,}" if isinstance(stage[key], int) else str(stage[key]) for stage in stages.values())
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    texts = ["\n".join(lines)]
    if account["started_with"]["autoencoder"]:
        texts.append("The autoencoder is that of the model which this training began with, and was not trained further.")
    if None in earlier:
        texts.append(
            "The U-Net began with the weights of a trained one, of whose training these files do not tell: it had more steps "
            "than the table shows."
        )
    versions = ", ".join(f"{package} {version}" for package, version in account["versions"].items())
    texts.append(f"Versions: {versions}. `methods.md` has it as text for a paper, with citations in `references.bib`.")
    return "\n\n".join(texts)


def _earlier(account: Mapping[str, Any]) -> list[Mapping[str, Any] | None]:
    """Parts of the U-Net's training before the last; None for what no file tells. Older accounts tell of none."""
    return account.get("earlier", [None] * account["started_with"]["diffusion"])


def _dataset(source: Mapping[str, Any]) -> list[str]:
    """What the dataset says of itself, a line each; nothing where it says nothing."""
    said = {
        "Dataset": source.get("name"),
        "Authors": ", ".join(source.get("authors", ())),
        "Licence": source.get("licence"),
        "DOI": source.get("doi") and f"https://doi.org/{source['doi']}",
        "To be acknowledged as": source.get("cite"),
        "References": ", ".join(source.get("links", ())),
    }
    lines = [f"- {name}: {value}" for name, value in said.items() if value]
    return [*lines, ""] if lines else []


def _figures(metrics: Mapping[str, Any]) -> str:
    """Figures with 95% intervals, as a table."""
    quality = metrics["reconstruction"]
    rows = [
        (
            f"{label} of reconstructions",
            _number(quality[name]["mean"]),
            quality[name]["low"],
            quality[name]["high"],
            quality["volumes"],
        )
        for name, label in (
            ("psnr_foreground_db", "PSNR in the foreground, dB,"),
            ("ssim_foreground", "SSIM in the foreground"),
        )
    ]
    for each in metrics["fidelity"]:
        if each["kind"] in ("real", "generated"):
            what = "requested" if each["kind"] == "generated" else "true (held-out scans)"
            name = f"{each['covariate']}: {what} and measured,"
            rows.append((f"{name} r", _number(each["r"]), each["r_low"], each["r_high"], each["n"]))
            rows.append((f"{name} slope", _number(each["slope"]), each.get("slope_low"), each.get("slope_high"), each["n"]))
    rows += [
        (
            f"{each.get('title', each['name'])} ({each['verdict']})",
            _number(each["value"]),
            each["low"],
            each["high"],
            each["synthetic"],
        )
        for each in metrics["likeness"]
    ]
    lines = ["| figure | value | 95% interval | volumes |", "|---|---|---|---|"]
    for name, value, low, high, volumes in rows:
        interval = "" if low is None or high is None else f"{_number(low)} to {_number(high)}"
        lines.append(f"| {_cell(name)} | {value} | {interval} | {volumes} |")
    made = metrics["provenance"]
    return "\n".join(lines) + f"\n\nOf {made['made'][:10]}, with sampling: {made['sampling']}."


def _limits(pipeline: Pipeline, account: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None) -> list[str]:
    """What the figures themselves say against the model."""
    lines = [
        f"- Nothing is known of {each.label} below {each.seen[0]:g} and above {each.seen[1]:g}: training saw none."
        for each in pipeline.schema
        if each.seen
    ]
    if account:
        few = [f"{name} ({count})" for name, count in account["data"]["few"].items() if count < FEW]
        if few:
            lines.append(f"- Categories with fewer than {FEW} training subjects: {', '.join(few)}.")
        if (people := account["data"]["subjects"].get("train", 0)) < MANY:
            lines.append(f"- {people} people are few: the model may reproduce some of them. Ask for its audit.")
        if len(account["data"]["sites"]) == 1:
            lines.append("- All training scans are of one site.")
    if metrics is None:
        lines.append("- No evaluation stands here: how well it does is not known.")
    else:
        missed = [goal["name"] for goal in metrics.get("goals", ()) if goal["light"] == "red"]
        unsure = [goal["name"] for goal in metrics.get("goals", ()) if goal["light"] in ("amber", "grey")]
        lines += [f"- Not reached: {', '.join(missed)}."] * bool(missed)
        lines += [f"- Not settled by so many volumes, or not measured: {', '.join(unsure)}."] * bool(unsure)
        if "audit" not in metrics:
            lines.append("- No privacy audit stands here: whether it copies training subjects is not known.")
    return lines or ["- None follows from them."]


def _example(covariate: Covariate) -> str | int | float:
    """A value that can be requested: a category, or the mean of the training subjects, rounded."""
    if covariate.kind == "categorical":
        return covariate.categories[0]
    return round(covariate.mean) if abs(covariate.mean) >= 10 else float(f"{covariate.mean:.2g}")


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _number(value: float | None) -> str:
    """Three significant digits; n/a for what JSON writes as null."""
    return "n/a" if value is None else f"{value:.3g}"
