"""The page of an evaluation: its verdicts, and the sections of each in their order, and the summary for the terminal."""

from collections.abc import Mapping

from ldm3d.covariates import CovariateSchema
from ldm3d.evaluation.likelihood import COLUMNS
from ldm3d.evaluation.results import Evaluation
from ldm3d.privacy.findings import Audit
from ldm3d.report.page import Goal, Section, picture, with_interval
from ldm3d.report.sections import anatomy, fidelity, realism, regression, subgroups, truth
from ldm3d.report.sections import audit as privacy
from ldm3d.report.verdicts import FOLLOWS, QUESTIONS, REAL, RECONSTRUCTION, SAFE, Question, Verdict


def verdicts(found: Evaluation, audit: Audit | None = None) -> list[Verdict]:
    """The four verdicts with their lights, without sections."""
    missing: dict[Question, list[str]] = {question: [] for question in QUESTIONS}
    goals = {
        RECONSTRUCTION: [*fidelity.reconstruction_lights(found), *anatomy.dice_lights(found.anatomy)],
        FOLLOWS: [
            *truth.lights(found.truth),
            *fidelity.conditioning_lights(found),
            *regression.categories_lights(found.categories),
            *(regression.utility_light(each) for each in found.utility or ()),
        ],
        REAL: [
            *([realism.light(found.realism)] if found.realism else []),
            *anatomy.lights(found.anatomy, found.discriminability),
        ],
        SAFE: [*([subgroups.light(found.gaps)] if found.gaps else []), *(privacy.lights(audit) if audit else [])],
    }
    if not any(found.requests) and not found.truth:
        missing[FOLLOWS].append("the model takes no covariates")
    elif not any(c.kind == "generated" for c in found.comparisons) and not found.categories:
        missing[FOLLOWS].append("no covariate could be measured on volumes")
    if not found.realism:
        missing[REAL].append("metrics of realism were not computed")
    if not found.gaps:
        missing[SAFE].append("there are no groups of people to compare")
    if audit is None:
        missing[SAFE].append("copies of training subjects were not looked for (--audit looks for them)")
    return [Verdict(question, goals[question], missing[question]) for question in QUESTIONS]


def lights(found: Evaluation, audit: Audit | None = None) -> list[Goal]:
    """The lights of all verdicts."""
    return [goal for verdict in verdicts(found, audit) for goal in verdict.goals]


def sections(
    found: Evaluation, schema: CovariateSchema, pictures: Mapping[str, str], audit: Audit | None = None
) -> dict[Question, list[Section]]:
    """The detail of each verdict; `pictures` are data: URIs by name, see `ldm3d.report.write.draw`."""
    follows = [*([truth.section(found.truth, pictures)] if found.truth else [])]
    if len(schema):  # a model without covariates has no requests
        follows.append(fidelity.conditioning_section(found, schema, pictures))
        follows += [*fidelity.sweep_sections(found, pictures), fidelity.outside_section(found)]
    if found.predicted:
        follows.append(regression.prediction_section(found, schema))
    if found.categories:
        follows.append(regression.categories_section(found.categories))
    follows += [regression.utility_section(each) for each in found.utility or ()]
    if found.segmentation:
        follows.append(regression.segmentation_section(found.segmentation))
    real = [
        *realism.sections(found.realism, found.realism_of_reconstructions),
        *anatomy.sections(found.anatomy, found.discriminability, pictures),
    ]
    if found.likelihood is not None:
        real.append(likelihood_section(found, pictures))
    units = {covariate.name: covariate.unit for covariate in schema}
    safe = subgroups.subgroup_sections(found.gaps, pictures, units)
    return {
        RECONSTRUCTION: [fidelity.reconstruction_section(found, schema, pictures)],
        FOLLOWS: follows,
        REAL: real,
        SAFE: [*(privacy.sections(audit, pictures) if audit else []), *safe],
    }


def likelihood_section(found: Evaluation, pictures: Mapping[str, str]) -> Section:
    """Of `ldm3d.evaluation.likelihood.score` with the bound."""
    table = found.likelihood
    rows = [
        [title, unit, with_interval(float(table[column].mean()), found.likelihood_interval(column))]
        for column, (title, unit) in COLUMNS.items()
    ]
    return Section(
        "Likelihood of held-out volumes",
        f"Upper bounds of the negative log-likelihood of {len(table)} held-out volumes given their covariates, without "
        "guidance: lower is better. Figures are comparable only between models of the same volumes, and those of latents only "
        "between models with the same autoencoder.",
        {"columns": ["figure", "unit", "mean over volumes"], "rows": rows},
        labels=2,
        plots=[picture(pictures, "likelihood", "Number of held-out volumes.")],
        note=f"The variational bound with {table.attrs['times']} times a volume; bits per voxel are of 256 grey levels. "
        "`ldm3d likelihood` computes them with more times, and by the probability flow ODE.",
    )


def summary(found: Evaluation) -> str:
    """What was found, as tables for the terminal."""
    parts = fidelity.summary(found), truth.summary(found.truth), subgroups.summary(found.gaps), realism.summary(found.realism)
    return "\n".join(line for part in (*parts, anatomy.summary(found.anatomy, found.discriminability)) for line in part)
