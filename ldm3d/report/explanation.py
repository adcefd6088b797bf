"""The output of an explanation: maps as NIfTI, pictures, metrics.json and a page."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm3d import figures
from ldm3d.covariates import Value, describe, in_words
from ldm3d.data.nifti import write_volume
from ldm3d.evaluation.explanation import ALL, FAMILY_WISE_ERROR, NOTABLE, Contrast, Explanation, smallest_p
from ldm3d.files import checked_name
from ldm3d.pipeline import Pipeline, Sampling
from ldm3d.report.page import METRICS, Section, picture, save_pictures, write_json, write_page
from ldm3d.report.write import provenance


def write_explanation(folder: Path, title: str, pipeline: Pipeline, found: Explanation, sampling: Sampling) -> Path:
    """Write every map as NAME.nii.gz, every picture as NAME.png, metrics.json and report.html. Returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, volume in _maps(found):
        write_volume(folder / f"{checked_name(name, 'map')}.nii.gz", volume, pipeline.output_grid.affine, pipeline.mark)
    pictures = save_pictures(folder, draw(pipeline, found))
    made = provenance(pipeline, sampling)
    values = {
        "synthetic": True,
        "request": found.request,
        "seeds": found.seeds,
        "family_wise_error": FAMILY_WISE_ERROR,
        "notable_change": NOTABLE,
        "changes": [contrast.to_dict(pipeline.output_grid) for contrast in found.contrasts],
        "mean_deviation": float(found.deviation.mean()),
        "mean_attention": {name: float(share.mean()) for name, share in found.attention.items()},
        "provenance": made,
    }
    write_json(folder / METRICS, values)
    return write_page(folder, title, sections(pipeline, found, pictures), made)


def summary(pipeline: Pipeline, found: Explanation) -> str:
    """The changes, as a table for the terminal."""
    lines = [f"{'changed':24} {'brighter ml':>12} {'darker ml':>12} {'largest change':>15}  at mm"]
    for values in (contrast.to_dict(pipeline.output_grid) for contrast in found.contrasts):
        place = ", ".join(f"{mm:g}" for mm in values["largest_change_at_mm"])
        sizes = f"{values['notably_brighter_ml']:12.1f} {values['notably_darker_ml']:12.1f} {values['largest_change']:+15.3f}"
        lines.append(f"{values['changed']:24} {sizes}  {place}")
    lines.append(f"counted: changes of {NOTABLE:g} or more, significant at a family-wise error of {FAMILY_WISE_ERROR:.0%}")
    lines.append(f"the smallest p that {found.seeds} seeds can give is {smallest_p(found.seeds):.2g}")
    return "\n".join(lines)


def sections(pipeline: Pipeline, found: Explanation, pictures: Mapping[str, str]) -> list[Section]:
    """All sections; `pictures`: name -> data: URI."""
    asked = describe(found.request)
    rows = []
    for contrast in found.contrasts:
        values = contrast.to_dict(pipeline.output_grid)
        place = ", ".join(f"{mm:g}" for mm in values["largest_change_at_mm"])
        sizes = [f"{values[name]:.1f}" for name in ("notably_brighter_ml", "notably_darker_ml", "significant_ml")]
        peak = [f"{values['largest_change']:+.3f}", place, f"{values['smallest_p']:.4f}"]
        rows.append([_change(found, contrast), *sizes, *peak])
    columns = ["change", "brighter (ml)", "darker (ml)", "any size (ml)", "largest mean change", "at (mm, RAS+)", "smallest p"]
    text = (
        f"Volumes were generated for {asked} with {found.seeds} seeds, and with the same noise for every changed request. "
        "The maps show the mean change (after minus before), in units of the intensity range. Outlined, and counted as "
        "brighter and "
        f"darker, are voxels where it is {NOTABLE:g} or more and differs from 0 by a sign-flip test over the seeds; the "
        f"next column counts smaller changes, too. The family-wise error of a map is {FAMILY_WISE_ERROR:.0%}, and the "
        f"smallest p that {found.seeds} seeds can give is {smallest_p(found.seeds):.2g}. A map shows how this model "
        "responds to a request; it says nothing about patients."
    )
    caption = "red is brighter, blue darker."
    changes = [picture(pictures, f"difference-{c.name}", f"{_change(found, c)}: {caption}") for c in found.contrasts]
    parts = [Section("Effect of each change", text, {"columns": columns, "rows": rows}, labels=1, pictures=changes)]
    if found.attention:
        text = (
            "The share of the U-Net's cross-attention that each covariate gets, averaged over heads, layers and sampling "
            f"steps. The coarsest of its maps has a position for every {found.attention_voxels} voxels along an axis. "
            "Attention shows what the network reads, not its effect, and covariates also act through the scale and shift of "
            "every block, which have no position: the changes above are more reliable."
        )
        maps = [picture(pictures, f"attention-{name}", f"Attention to {name}.") for name in found.attention]
        parts.append(Section("Cross-attention", text, pictures=maps))
    text = (
        f"Standard deviation over {found.seeds} seeds of volumes for {asked}: what the request does not determine. It "
        "includes the variety of anatomies and the uncertainty of the model, and grows with every covariate that is left "
        "open."
    )
    deviation = [picture(pictures, "deviation", "Standard deviation.")]
    parts.append(Section("Variability given the request", text, pictures=deviation))
    return parts


def draw(pipeline: Pipeline, found: Explanation) -> dict[str, figures.Figure]:
    """Every picture of the page, by name."""
    spacing = pipeline.grid.spacing_mm
    drawn = {
        f"difference-{c.name}": figures.overlay(
            found.mean, c.difference, spacing, _change(found, c), "change in intensity", signed=True, outline=c.notable
        )
        for c in found.contrasts
    }
    for name, share in found.attention.items():
        drawn[f"attention-{name}"] = figures.overlay(found.mean, share, spacing, name, "share of attention")
    deviation = figures.overlay(found.mean, found.deviation, spacing, describe(found.request), "standard deviation")
    return {**drawn, "deviation": deviation}


def _maps(found: Explanation) -> Iterator[tuple[str, NDArray]]:
    """(name of the file, volume) of every map."""
    yield "mean", found.mean
    yield "deviation", found.deviation
    for contrast in found.contrasts:
        yield f"difference-{contrast.name}", contrast.difference
        yield f"t-{contrast.name}", contrast.t
        yield f"p-{contrast.name}", contrast.p
        yield f"significant-{contrast.name}", contrast.significant.astype(np.uint8)
    for name, share in found.attention.items():
        yield f"attention-{name}", share


def _change(found: Explanation, contrast: Contrast) -> str:
    """In words: "age 60 to 80"."""
    names = [name for name, value in contrast.request.items() if value != found.request[name]]
    values = [(in_words(name), found.request[name], contrast.request[name]) for name in names]
    words = [f"{name} {_value(before)} to {_value(after)}" for name, before, after in values]
    return ("together: " if contrast.name == ALL else "") + ", ".join(words)


def _value(value: Value) -> str:
    return "open" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
