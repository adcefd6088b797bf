"""The pictures of an evaluation: drawn, and numbered in the order of the page."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from ldm3d import figures
from ldm3d.covariates import CovariateSchema, Value, in_words
from ldm3d.evaluation.results import Evaluation
from ldm3d.pipeline import Pipeline
from ldm3d.report.page import Section, picture
from ldm3d.report.sections import anatomy, subgroups, truth

PAIR = "pair-"  # and a number: a real and a synthetic volume of the same covariates
CAPTION = (
    "The same axial slices of a held-out and of a generated volume, from below to above. L and R: the person's left and "
    "right; z: height in millimetres."
)


def draw(pipeline: Pipeline, evaluation: Evaluation) -> dict[str, figures.Figure]:
    """Every picture of the page, by name."""
    spacing, schema = pipeline.grid.spacing_mm, pipeline.schema
    columns = min(3, len(evaluation.real))
    found, kinds = {}, [held_out(evaluation, i) for i in evaluation.order[: len(evaluation.real)]]
    for n, pair in enumerate(zip(evaluation.real, evaluation.generated)):
        asked = in_units(evaluation.requests[n], schema)
        titles = [f"{kinds[n]}: {asked}", f"SYNTHETIC, requested: {asked}"] if asked else [kinds[n], "SYNTHETIC"]
        found[f"{PAIR}{n + 1}"] = figures.lightbox(pair, titles, pipeline.output_grid.affine)
    qualities = [f"reconstruction, {evaluation.psnr_foreground_db[i]:.1f} dB" for i in evaluation.order[:columns]]
    shown = evaluation.real[:columns] + evaluation.reconstructed[:columns]
    found["reconstructions"] = figures.mosaic(shown, [*kinds[:columns], *qualities], spacing, columns)
    for c in evaluation.comparisons:
        if c.kind == "kept":  # in a table only
            continue
        name = "requested" if c.kind == "generated" else "true"
        label, title = schema[c.covariate].label, f"{c.kind}: r = {c.agreement.r:.3f}"
        figure = figures.scatter(c.reference, c.measured, f"{name} {label}", f"measured {label}", title, c.band)
        found[f"scatter-{c.covariate}-{c.kind}"] = figure
    for s in evaluation.sweeps:
        covariate = schema[s.covariate]
        titles = [f"synthetic: {in_units({s.covariate: value}, schema)}" for value in s.values]
        found[f"sweep-{s.covariate}"] = figures.mosaic(s.volumes, titles, spacing, columns=3)
        for name, values in s.measured.items():
            title = f"rank correlation {s.rank_correlation[name]:.2f}"
            labels = f"requested {covariate.label}", f"measured {schema[name].label}"
            figure = figures.lines(s.values, {name: values}, *labels, title)
            found[f"curve-{s.covariate}-{name}"] = figure
    if evaluation.likelihood is not None:
        bound = evaluation.likelihood["bound"].to_numpy()
        found["likelihood"] = figures.histogram(bound, "nats per latent dimension", "bound of held-out volumes")
    if pipeline.denoising:
        levels = [float(level) for level in pipeline.denoising]
        own, best = np.array(list(pipeline.denoising.values())).T
        errors = {"this model": own, "best Gaussian": best}
        found["denoising"] = figures.lines(levels, errors, "sigma / alpha", "error / variance", "denoising error", log=True)
    found |= truth.draw(pipeline, evaluation.truth)
    return found | anatomy.draw(evaluation.anatomy) | subgroups.draw(evaluation.gaps)


def held_out(evaluation: Evaluation, i: int) -> str:
    """What a held-out volume is called: a phantom or a rendered brain is no real one."""
    return "HELD-OUT (itself synthetic)" if evaluation.is_synthetic(i) else "REAL (held-out)"


def lightbox_pictures(evaluation: Evaluation, pictures: Mapping[str, str]) -> list[dict[str, str]]:
    """The pairs of real and synthetic volumes; `pictures`: name -> data: URI."""
    count = min(len(evaluation.real), len(evaluation.generated))
    return [picture(pictures, f"{PAIR}{n + 1}", CAPTION) for n in range(count)]


def number_pictures(groups: Iterable[Sequence[dict[str, str]]], saved: Collection[str]) -> None:
    """Give every picture its number, in order, and the name of its file beside the page if there is one."""
    for number, each in enumerate((each for group in groups for each in group), start=1):
        each["number"] = str(number)
        if each["name"] in saved:
            each["file"] = f"{each['name']}.png"


def all_pictures(sections: Iterable[Section]) -> list[dict[str, str]]:
    """Of sections, in the order of the page."""
    return [each for section in sections for each in (*section.pictures, *section.plots)]


def in_units(row: Mapping[str, Value], schema: CovariateSchema) -> str:
    """A request as people say it: "age 72 years, sex F"; "" if nothing was requested."""
    words = []
    for covariate in schema:
        if (value := row.get(covariate.name)) is not None:
            text = str(value) if isinstance(value, str) else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
            words.append(f"{in_words(covariate.name)} {text} {covariate.unit}".rstrip())
    return ", ".join(words)
