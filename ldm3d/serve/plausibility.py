"""Whether a request lies among the training subjects: each value by itself, and all of them together.

A model knows the range of each covariate. One that starts with a Gaussian (`ldm3d.start`) also knows how they vary together.
"""

from collections.abc import Mapping

import torch
from scipy import stats

from ldm3d.covariates import Value
from ldm3d.pipeline import Pipeline
from ldm3d.start import features

UNUSUAL = 0.01  # share of Gaussian subjects that lie further away


def remarks(pipeline: Pipeline, row: Mapping[str, Value]) -> list[str]:
    """What is to be said of a request, from `CovariateSchema.parse`, in sentences; none where it is plausible."""
    found, beyond = [], False
    for covariate in pipeline.schema:
        value = row[covariate.name]
        if covariate.seen and isinstance(value, float) and not covariate.seen[0] <= value <= covariate.seen[1]:
            low, high = covariate.seen
            found.append(f"{covariate.name} {value:g}: training saw {low:g} to {high:g}; beyond it the model guesses.")
            beyond = True
    together = [c.name for c in pipeline.schema if c.kind == "continuous" and row[c.name] is not None]
    share = 1.0 if beyond or len(together) < 2 else share_further_away(pipeline, row)
    if share < UNUSUAL:
        found.append(
            f"{', '.join(together)} together are unusual: about {share:.2g} of the training subjects lie further from their "
            "mean."
        )
    return found


def share_further_away(pipeline: Pipeline, row: Mapping[str, Value]) -> float:
    """Share of Gaussian subjects whose continuous covariates lie further from the mean than those that are given here.

    By the Mahalanobis distance (Mahalanobis 1936), which follows a chi-squared distribution. 1 where nothing is known of how
    they vary together.
    """
    if pipeline.start is None:
        return 1.0
    counts = pipeline.schema.num_categories
    values, known = features(pipeline.schema.encode([row]), counts)
    continuous = torch.cat([torch.full((max(n - 1, 1),), n == 0) for n in counts])
    chosen = known[0] & continuous
    away = (values[0] - pipeline.start.centre.float().cpu())[chosen].double()
    covariance = pipeline.start.covariance.double().cpu()[chosen][:, chosen]
    squared = float(away @ torch.linalg.solve(covariance, away))
    return float(stats.chi2.sf(squared, int(chosen.sum())))
