"""The page of an evaluation: its lights and sections in their order, and the summary for the terminal."""

from collections.abc import Mapping

from ldm3d.covariates import CovariateSchema
from ldm3d.evaluation.likelihood import COLUMNS
from ldm3d.evaluation.results import Evaluation
from ldm3d.report.page import Goal, Section, picture, with_interval
from ldm3d.report.sections import anatomy, fidelity, realism, regression, subgroups


def lights(found: Evaluation) -> list[Goal]:
    """The lights of the summary."""
    goals = fidelity.lights(found)
    if found.realism:
        goals.append(realism.light(found.realism))
    goals += anatomy.lights(found.anatomy, found.discriminability)
    if found.gaps:
        goals.append(subgroups.light(found.gaps))
    goals += regression.categories_lights(found.categories)
    return goals + [regression.utility_light(each) for each in found.utility or ()]


def sections(found: Evaluation, schema: CovariateSchema, pictures: Mapping[str, str]) -> list[Section]:
    """All sections; `pictures` are data: URIs by name, see `ldm3d.report.write.draw`."""
    parts = [fidelity.generated_section(schema, pictures)]
    if len(schema):  # a model without covariates has no requests
        parts += [fidelity.conditioning_section(found, schema, pictures), fidelity.outside_section(found)]
    parts += realism.sections(found.realism, found.realism_of_reconstructions)
    parts += anatomy.sections(found.anatomy, found.discriminability, pictures)
    parts += fidelity.sweep_sections(found, pictures)
    parts.append(fidelity.reconstruction_section(found, schema, pictures))
    parts += subgroups.subgroup_sections(found.gaps)
    if found.predicted:
        parts.append(regression.prediction_section(found, schema))
    if found.categories:
        parts.append(regression.categories_section(found.categories))
    parts += [regression.utility_section(each) for each in found.utility or ()]
    if found.likelihood is not None:
        parts.append(likelihood_section(found, pictures))
    return parts


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
    parts = fidelity.summary(found), subgroups.summary(found.gaps), realism.summary(found.realism)
    return "\n".join(line for part in (*parts, anatomy.summary(found.anatomy, found.discriminability)) for line in part)
