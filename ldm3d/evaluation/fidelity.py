"""Conditioning: do volumes show the covariates that were requested? Measured values beside their reference, and by subgroup.

Everything is measured on images, by a function that can be replaced: `measure(volume, spacing_mm) -> {name: value}`. A
covariate of the schema is assessed if the function measures a quantity of its name.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from ldm3d.errors import InputError
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.subgroups import (
    MODEL_TOLERANCE,
    PSNR_TOLERANCE_DB,
    SSIM_TOLERANCE,
    VolumeScores,
    error_scores,
    minus_real,
    tolerance,
)
from ldm3d.statistics.agreement import Comparison, compare

KINDS = {"kept": "autoencoder"}  # kinds of comparison that tables name otherwise


def compare_kinds(
    name: str, result: Evaluation, on_real: Sequence[float], on_reconstructed: Sequence[float], on_generated: Sequence[float]
) -> list[Comparison]:
    """One covariate on every kind of volume, see `Evaluation.comparisons`."""
    found, table = [], [row[name] for row in result.subjects]
    for kind, reference, measured, people in (
        ("real", table, on_real, result.people),
        ("reconstructed", table, on_reconstructed, result.people),
        ("kept", on_real, on_reconstructed, result.people),
        ("generated", [row[name] for row in result.requests], on_generated, result.requested_people),
    ):
        try:
            found.append(compare(name, kind, reference, measured, people))
        except InputError as error:  # the other figures are still useful
            warnings.warn(f"{name} on {kind} volumes is not assessed: {error}", stacklevel=2)
    return found


def group_scores(result: Evaluation) -> list[VolumeScores]:
    """Reconstruction and the errors of every covariate; on generated volumes minus the error on real ones."""
    real = result.subjects, result.people
    psnr_db, similarity = result.psnr_foreground_db, result.ssim_foreground
    scores = [
        VolumeScores("PSNR of the foreground (dB)", psnr_db, *real, "high", PSNR_TOLERANCE_DB, decides=True),
        VolumeScores("SSIM of the foreground", similarity, *real, "high", SSIM_TOLERANCE, decides=True),
    ]
    for c in result.comparisons:
        if c.kind == "reconstructed":  # the errors of the measure and of the autoencoder are assessed separately
            continue
        generated, on_real = c.kind == "generated", result.find(c.covariate, "real")
        of_measure = c.kind == "real"
        small = tolerance(c) if of_measure or on_real is None else tolerance(on_real, MODEL_TOLERANCE)
        rows, people = (result.requests, result.requested_people) if generated else real
        error = c.errors(len(rows))
        size, title = abs(error), f"{c.covariate}, {KINDS.get(c.kind, c.kind)}"
        if generated:
            known = on_real.errors(len(result.subjects)) if on_real else np.full(len(result.subjects), np.nan)
            size, error = (minus_real(*each, result.sources) for each in ((size, abs(known)), (error, known)))
            title += " minus real"
        scores += error_scores(title, size, error, rows, people, small, of_measure, not of_measure)
    return scores
