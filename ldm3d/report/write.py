"""The output of an evaluation: a self-contained HTML page, metrics.json, tables and the pictures."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ldm3d
from ldm3d import figures
from ldm3d.data.tables import write_table
from ldm3d.description import Sampling
from ldm3d.evaluation.coverage import coverage
from ldm3d.evaluation.results import Evaluation
from ldm3d.methods import METHODS, REFERENCES, bibtex, methods_text, write_methods
from ldm3d.pipeline import Pipeline
from ldm3d.privacy.findings import Audit
from ldm3d.report.page import METRICS, Goal, Section, command, now, save_pictures, times, write_json, write_page
from ldm3d.report.pictures import all_pictures, draw, lightbox_pictures, number_pictures
from ldm3d.report.sections import audit as privacy
from ldm3d.report.sections.coverage import matrices
from ldm3d.report.sections.evaluation import sections, verdicts
from ldm3d.report.sections.fidelity import fidelity_table
from ldm3d.report.sections.training import denoising_section
from ldm3d.report.volumes import people_section, volume_table

FIDELITY, VOLUMES = "fidelity.tsv", "volumes.tsv"
TEMPLATE = "evaluation.html"
OWN = " {} held-out volumes are themselves synthetic, such as phantoms or rendered brains. "
ALL_OWN = "Where this page says real, it means these: what it says of realism holds for them, and for no real person."
SOME_OWN = "Where this page says real, they are among those that it means."
LEAD = (
    "Held-out people, and volumes that were generated for their covariates. Both have the same covariates, but they are not "
    "the same person."
)
LEAD_IMAGES = "Held-out people, and volumes that were generated from their images and covariates: answers for the same person."
LEAD_OPEN = "Held-out people, and generated volumes."
FILES = {
    METRICS: "every figure of this page, with its interval",
    FIDELITY: "requested or true, and measured: how they agree, a row for each covariate and kind of volumes",
    VOLUMES: "a row for each volume: its covariates, what was measured on it, and the quality of its reconstruction. It names "
    "nobody, but holds the covariates of single held-out people: share it as you may share your table",
    METHODS: f"text for a methods section; {REFERENCES} has what it cites",
}


def write_report(
    folder: Path,
    title: str,
    pipeline: Pipeline,
    evaluation: Evaluation,
    sampling: Sampling,
    goals: Sequence[Goal] = (),
    audit: Audit | None = None,
    account: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.html, metrics.json, fidelity.tsv, volumes.tsv, methods.md with its references, and every picture as PNG.

    Args:
        goals: beside the lights of the evaluation.
        audit: of the same model; the page then shows training subjects.
        account: of the model's training (`ldm3d.account`), for the text of the methods and the people of the training.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = save_pictures(folder, draw(pipeline, evaluation))
    fidelity_table(evaluation).to_csv(folder / FIDELITY, sep="\t", index=False)
    write_table(folder / VOLUMES, volume_table(evaluation, pipeline.schema))
    metrics, made = evaluation.to_dict(), provenance(pipeline, sampling)
    shown = dict(pictures)
    if audit:  # its pictures, of training subjects, are on the page only
        shown |= {name: figures.to_data_uri(figure) for name, figure in privacy.draw(pipeline, audit).items()}
        metrics["audit"] = audit.to_dict()
    covered = coverage(pipeline.schema, evaluation, account)
    metrics["coverage"] = [each.to_dict() for each in covered]
    detail = sections(evaluation, pipeline.schema, shown, audit)
    answers = [replace(verdict, sections=detail[verdict.question]) for verdict in verdicts(evaluation, audit)]
    metrics["verdicts"] = {each.question.key: {"answer": each.answer, "light": each.light} for each in answers}
    every = [*goals, *(goal for verdict in answers for goal in verdict.goals)]
    write_json(folder / METRICS, metrics | {"goals": [goal.to_dict() for goal in every], "provenance": made})
    parts = [denoising_section(pipeline.denoising, shown)] if pipeline.denoising else []
    parts.append(people_section(evaluation, pipeline.schema, account))
    text = methods_text(account, sampling, metrics)
    write_methods(folder, text, account)
    parts.append(methods_section(text, account))
    lightbox = lightbox_pictures(evaluation, shown)
    number_pictures([lightbox, *(all_pictures(each.sections) for each in answers), all_pictures(parts)], set(pictures))
    more = {"verdicts": answers, "lightbox": lightbox, "lead": _lead(pipeline) + _own(evaluation)}
    more |= {"matrices": matrices(covered), "files": FILES}
    return write_page(folder, title, parts, made, goals, TEMPLATE, **more)


def _lead(pipeline: Pipeline) -> str:
    """What the pairs of real and generated volumes have in common."""
    if pipeline.conditions:
        return LEAD_IMAGES
    return LEAD if len(pipeline.schema) else LEAD_OPEN


def _own(evaluation: Evaluation) -> str:
    """That held-out volumes are no real ones, where it is so."""
    own, count = sum(evaluation.synthetic), len(evaluation.synthetic)
    if not own:
        return ""
    return OWN.format(f"All {count}") + ALL_OWN if own == count else OWN.format(f"{own} of the {count}") + SOME_OWN


def methods_section(text: str, account: Mapping[str, Any] | None = None) -> Section:
    """The text of the methods, to be copied, with what it cites."""
    about = (
        f"To paste into a paper and to be completed; also in {METHODS} and {REFERENCES}. Citations are [@key], as pandoc and "
        "Quarto read them."
    )
    return Section("Text for a methods section", about, quote=text, folded=("What it cites, as BibTeX", bibtex(text, account)))


def provenance(pipeline: Pipeline, sampling: Sampling) -> dict[str, str]:
    """How the volumes were generated."""
    return {
        "model": pipeline.model_hash,
        "grid": f"{times(pipeline.grid.shape)} voxels of {times(pipeline.grid.spacing_mm)} mm",
        "diffusion": f"{pipeline.process.kind}, target {pipeline.target}",
        "sampling": ", ".join(f"{key} {value}" for key, value in sampling.to_dict().items() if value is not None),
        "parameters": f"{_count(pipeline.autoencoder):,} autoencoder, {_count(pipeline.unet):,} U-Net",
        "versions": f"ldm3d {ldm3d.__version__}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "monai", "accelerate", "nibabel")),
        "command": command(),
        "made": now(),
    }


def _count(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
