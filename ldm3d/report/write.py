"""The self-contained HTML page that an evaluation leaves behind, with metrics.json and the pictures beside it."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ldm3d
from ldm3d import figures
from ldm3d.covariates import describe
from ldm3d.description import Sampling
from ldm3d.evaluation.fidelity import Evaluation
from ldm3d.evaluation.realism_metrics import REALISM_METRICS
from ldm3d.evaluation.subgroups import GAP, SMALL
from ldm3d.files import checked_name
from ldm3d.pipeline import Pipeline
from ldm3d.report.page import METRICS, Goal, Section, command, now, plain, write_page
from ldm3d.report.sections import fidelity_table, lights, sections

FIDELITY = "fidelity.tsv"


def write_report(
    folder: Path,
    title: str,
    pipeline: Pipeline,
    evaluation: Evaluation,
    sampling: Sampling,
    goals: Sequence[Goal] | None = None,
    extra: Sequence[Section] = (),
    figures_of_extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.html, metrics.json, fidelity.tsv and every picture as PNG.

    Args:
        folder: is made if it is not there.
        title: of the page.
        pipeline, evaluation, sampling: what was evaluated, what was found, how it was generated.
        goals: for the summary at the top; None for those of `ldm3d.report.sections.lights`.
        extra: sections of others, for the end of the page.
        figures_of_extra: their figures, for metrics.json.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw(pipeline, evaluation)
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{checked_name(name, 'picture')}.png")
    goals = lights(evaluation) if goals is None else goals
    fidelity_table(evaluation).to_csv(folder / FIDELITY, sep="\t", index=False)
    made = provenance(pipeline, sampling)
    metrics = evaluation.to_dict() | dict(figures_of_extra or {})
    metrics |= {"goals": [goal.to_dict() for goal in goals], "provenance": made}
    (folder / METRICS).write_text(json.dumps(plain(metrics), indent=2, allow_nan=False) + "\n")
    pictures = {name: figures.to_data_uri(figure) for name, figure in drawn.items()}
    return write_page(folder, title, [*sections(evaluation, pipeline.schema, pictures), *extra], made, goals)


def provenance(pipeline: Pipeline, sampling: Sampling) -> dict[str, str]:
    """How it was made."""
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


def summary(found: Evaluation) -> str:
    """What was found, as a table for the terminal."""
    lines = [
        f"reconstruction of the foreground: PSNR {found.psnr_foreground_db.mean():.2f} dB, "
        f"SSIM {found.ssim_foreground.mean():.3f} on {len(found.psnr_db)} volumes",
        f"{'covariate':24} {'volumes':14} {'n':>4} {'r':>7} {'slope':>7} {'bias':>9} {'MAE':>8}",
    ]
    for c in found.comparisons:
        a = c.agreement
        lines.append(f"{c.covariate:24} {c.kind:14} {a.n:4} {a.r:7.3f} {a.slope:7.3f} {a.bias:9.2f} {a.mae:8.2f}")
    for gap in (gap for gap in found.gaps if gap.verdict in (GAP, SMALL)):
        lines.append(f"{gap.verdict} by {gap.grouping}: {gap.figure}, {gap.worst} and {gap.best} differ by {gap.gap:.3g}")
    for finding in found.likeness:
        real = f"(real: {finding.null_low:.3g} to {finding.null_high:.3g})"
        lines.append(f"{REALISM_METRICS[finding.name].title:32} {finding.value:9.3g} {real:28} {finding.verdict}")
    return "\n".join(lines)


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
        if c.kind == "kept":  # a table says it better
            continue
        name = "asked" if c.kind == "generated" else "true"
        label, title = pipeline.schema[c.covariate].label, f"{c.kind}: r = {c.agreement.r:.3f}"
        figure = figures.scatter(c.reference, c.measured, f"{name} {label}", f"measured {label}", title, c.band)
        found[f"scatter-{c.covariate}-{c.kind}"] = figure
    for s in evaluation.sweeps:
        covariate = pipeline.schema[s.covariate]
        titles = [f"{s.covariate} {value:g} {covariate.unit}" for value in s.values]
        found[f"sweep-{s.covariate}"] = figures.mosaic(s.volumes, titles, spacing, columns=3)
        for name, values in s.measured.items():
            title = f"rank correlation {s.rank_correlation[name]:.2f}"
            figure = figures.lines(s.values, {name: values}, f"asked {covariate.label}", f"measured {name}", title)
            found[f"curve-{s.covariate}-{name}"] = figure
    return found


def _count(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
