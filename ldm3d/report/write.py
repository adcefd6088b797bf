"""The output of an evaluation: a self-contained HTML page, metrics.json, fidelity.tsv and the pictures."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import ldm3d
from ldm3d import figures
from ldm3d.covariates import describe
from ldm3d.description import Sampling
from ldm3d.evaluation.results import Evaluation
from ldm3d.pipeline import Pipeline
from ldm3d.privacy.findings import Audit
from ldm3d.report.page import METRICS, Goal, command, now, save_pictures, write_json, write_page
from ldm3d.report.sections import anatomy
from ldm3d.report.sections import audit as privacy
from ldm3d.report.sections.evaluation import lights, sections
from ldm3d.report.sections.fidelity import fidelity_table
from ldm3d.report.sections.training import denoising_section

FIDELITY = "fidelity.tsv"


def write_report(
    folder: Path,
    title: str,
    pipeline: Pipeline,
    evaluation: Evaluation,
    sampling: Sampling,
    goals: Sequence[Goal] = (),
    audit: Audit | None = None,
) -> Path:
    """Write report.html, metrics.json, fidelity.tsv and every picture as PNG.

    Args:
        goals: for the summary at the top, before the lights of the evaluation.
        audit: of the same model; the page then shows training subjects.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = save_pictures(folder, draw(pipeline, evaluation))
    fidelity_table(evaluation).to_csv(folder / FIDELITY, sep="\t", index=False)
    parts, goals = sections(evaluation, pipeline.schema, pictures), [*goals, *lights(evaluation)]
    if pipeline.denoising:
        parts.append(denoising_section(pipeline.denoising, pictures))
    metrics, made = evaluation.to_dict(), provenance(pipeline, sampling)
    if audit:
        drawn = {name: figures.to_data_uri(figure) for name, figure in privacy.draw(pipeline, audit).items()}
        parts, goals = parts + privacy.sections(audit, drawn), goals + privacy.lights(audit)
        metrics["audit"] = audit.to_dict()
    write_json(folder / METRICS, metrics | {"goals": [goal.to_dict() for goal in goals], "provenance": made})
    return write_page(folder, title, parts, made, goals)


def provenance(pipeline: Pipeline, sampling: Sampling) -> dict[str, str]:
    """How the volumes were generated."""
    return {
        "model": pipeline.model_hash,
        "grid": f"{' x '.join(map(str, pipeline.grid.shape))} voxels of {pipeline.grid.spacing_mm} mm",
        "diffusion": f"{pipeline.process.kind}, target {pipeline.target}",
        "sampling": ", ".join(f"{key} {value}" for key, value in sampling.to_dict().items() if value is not None),
        "parameters": f"{_count(pipeline.autoencoder):,} autoencoder, {_count(pipeline.unet):,} U-Net",
        "versions": f"ldm3d {ldm3d.__version__}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "monai", "accelerate", "nibabel")),
        "command": command(),
        "made": now(),
    }


def draw(pipeline: Pipeline, evaluation: Evaluation) -> dict[str, figures.Figure]:
    """Every picture of the page, by name."""
    spacing = pipeline.grid.spacing_mm
    columns = min(3, len(evaluation.real))
    titles = [f"{kind}: {describe(row)}" for kind in ("real", "synthetic") for row in evaluation.requests[:columns]]
    shown = evaluation.real[:columns] + evaluation.generated[:columns]
    found = {"generated": figures.mosaic(shown, titles, spacing, columns)}
    qualities = [f"{evaluation.psnr_foreground_db[i]:.1f} dB" for i in evaluation.order[:columns]]
    shown = evaluation.real[:columns] + evaluation.reconstructed[:columns]
    found["reconstructions"] = figures.mosaic(shown, ["original"] * columns + qualities, spacing, columns)
    for c in evaluation.comparisons:
        if c.kind == "kept":  # in a table only
            continue
        name = "requested" if c.kind == "generated" else "true"
        label, title = pipeline.schema[c.covariate].label, f"{c.kind}: r = {c.agreement.r:.3f}"
        figure = figures.scatter(c.reference, c.measured, f"{name} {label}", f"measured {label}", title, c.band)
        found[f"scatter-{c.covariate}-{c.kind}"] = figure
    for s in evaluation.sweeps:
        covariate = pipeline.schema[s.covariate]
        titles = [f"{s.covariate} {value:g} {covariate.unit}" for value in s.values]
        found[f"sweep-{s.covariate}"] = figures.mosaic(s.volumes, titles, spacing, columns=3)
        for name, values in s.measured.items():
            title = f"rank correlation {s.rank_correlation[name]:.2f}"
            figure = figures.lines(s.values, {name: values}, f"requested {covariate.label}", f"measured {name}", title)
            found[f"curve-{s.covariate}-{name}"] = figure
    if evaluation.likelihood is not None:
        bound = evaluation.likelihood["bound"].to_numpy()
        found["likelihood"] = figures.histogram(bound, "nats per latent dimension", "bound of held-out volumes")
    if pipeline.denoising:
        levels = [float(level) for level in pipeline.denoising]
        own, best = np.array(list(pipeline.denoising.values())).T
        errors = {"this model": own, "best Gaussian": best}
        found["denoising"] = figures.lines(levels, errors, "sigma / alpha", "error / variance", "denoising error", log=True)
    return found | anatomy.draw(evaluation.anatomy)


def _count(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
