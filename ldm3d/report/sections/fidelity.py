"""Conditioning and reconstruction on the page: do volumes show what was requested, and how well does the autoencoder work?"""

from collections.abc import Mapping, Sequence

import pandas as pd

from ldm3d.covariates import CovariateSchema, in_words
from ldm3d.evaluation.fidelity import KINDS
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.support import PERCENT_WITHIN
from ldm3d.report.page import GREY, Goal, Section, picture, with_interval
from ldm3d.statistics.agreement import Comparison
from ldm3d.statistics.bootstrap import interval, relative

# Thresholds of the lights. Generated volumes are compared with what the measure reaches on real ones.
# Of the foreground; they correspond to 28 dB and 0.9 over a grid of which the brain fills three tenths
MIN_PSNR_DB, MIN_SSIM = 23.0, 0.7
MAX_AUTOENCODER_BIAS = 0.05  # as a part of the covariate's mean
MIN_R, MAX_SLOPE_DIFFERENCE, MAX_MAE = (
    0.9,
    0.2,
    1.5,
)  # share of the real r, difference from the real slope, multiple of the real error
MIN_MEASURE_R = 0.5  # r on real volumes below which a measure is not used for lights
MIN_MEASURED_PERCENT = 99.0  # of generated volumes
MAX_OUTSIDE_PERCENT = 5.0  # of requests
SHOWN = 10  # requests outside of the training data that are listed

LEGEND = (
    "real: the measure against the table; reconstructed: the same after the autoencoder; autoencoder: reconstructed "
    "against the original volume; generated: against the request"
)


def reconstruction_lights(found: Evaluation) -> list[Goal]:
    """Of reconstruction; figures that were not measured have none."""
    goals = []
    psnr = "PSNR", "psnr_foreground_db", MIN_PSNR_DB, "dB"
    for name, key, least, unit in (psnr, ("SSIM", "ssim_foreground", MIN_SSIM, "")):
        mean, low, high, _ = found.quality(key).values()
        goals.append(Goal(f"Reconstruction of the foreground, {name}", mean, least, unit=unit, interval=(low, high)))
    for c in found.comparisons:
        real = found.find(c.covariate, "real")
        if c.kind == "kept" and (real is None or real.agreement.r >= MIN_MEASURE_R):
            part = 100 / max(abs(float(c.reference.mean())), 1e-9)
            bias, ends = c.agreement.bias * part, tuple(end * part for end in c.intervals["bias"])
            most = 100 * MAX_AUTOENCODER_BIAS
            goals.append(Goal(f"{in_words(c.covariate)}, bias by the autoencoder", bias, -most, most, "%", ends))
    return goals


def conditioning_lights(found: Evaluation) -> list[Goal]:
    """Of conditioning and requests; figures that were not measured have none."""
    goals = []
    for c in found.comparisons:
        real = found.find(c.covariate, "real")
        if c.kind == "generated" and real:
            goals += _conditioning(c, real)
    generated = [c for c in found.comparisons if c.kind == "generated"]
    if generated:
        shares = [c.agreement.n / sum(row[c.covariate] is not None for row in found.requests) for c in generated]
        goals.append(Goal("Generated volumes that could be measured", 100 * min(shares), MIN_MEASURED_PERCENT, unit="%"))
    if any(found.requests):  # a model without covariates has no requests
        share = 100 * len(found.outside) / len(found.requests)
        goals.append(Goal("Requests outside of the training data", share, high=MAX_OUTSIDE_PERCENT, unit="%"))
    return goals


def _conditioning(c: Comparison, real: Comparison) -> list[Goal]:
    """Generated volumes beside what the same measure reaches on real ones; the intervals are of both."""
    made, known = c.agreement, real.agreement
    title = f"{in_words(c.covariate)}, requested and measured"
    if known.r < MIN_MEASURE_R:
        judged = GREY, f"not measurable on real volumes either (r = {known.r:.2f})"
        return [Goal(f"{title}: r", made.r, judged=judged)]
    r, r_ends = relative(made.r, known.r, c.draws["r"], real.draws["r"])
    error, error_ends = relative(made.mae, known.mae, c.draws["mae"], real.draws["mae"])
    slope_ends = interval(c.draws["slope"] - real.draws["slope"])
    slope, most = made.slope - known.slope, MAX_SLOPE_DIFFERENCE
    return [
        Goal(f"{title}: r, relative to real", r, MIN_R, interval=r_ends),
        Goal(f"{title}: slope, minus that of real", slope, -most, most, interval=slope_ends),
        Goal(f"{title}: mean absolute error, relative to real", error, high=MAX_MAE, interval=error_ends),
    ]


def conditioning_section(found: Evaluation, schema: CovariateSchema, pictures: Mapping[str, str]) -> Section:
    """Requested and measured covariates."""
    return Section(
        "Conditioning: covariates, requested and measured",
        "Measured on the images. Rows named real: agreement of the measure with the table. Reconstructed: the same after the "
        "autoencoder. Generated: agreement with the request. Perfect agreement has r and slope 1, bias and mean absolute "
        "error (MAE) 0.",
        table=agreement_table(found.comparisons, schema, ("real", "reconstructed", "generated")),
        labels=2,
        note="n: volumes with a known value that could be measured. In brackets 95% intervals, by 2,000 bootstrap resamples "
        "of people. Covariates that are predicted by regression (see the end of the page) are biased towards the mean on real "
        "volumes as well: compare slopes with that of real volumes. Shaded in the plots: 95% interval of the fitted line.",
        plots=[
            picture(pictures, f"scatter-{c.covariate}-{c.kind}", f"{in_words(c.covariate)} on {c.kind} volumes")
            for c in found.comparisons
            if c.kind != "kept"
        ],
    )


def outside_section(found: Evaluation) -> Section:
    """Requests for which generation is extrapolation."""
    count = len(found.outside)
    text = (
        f"{count} of {len(found.requests)} requests have a value outside of the training range, or a combination of values "
        f"that is rare in the training data (Mahalanobis distance beyond that of {PERCENT_WITHIN}% of the training "
        "volumes). There, generation is extrapolation."
    )
    if not found.joint:
        text += " Each covariate was checked alone; combinations are where --data has the scans of the training, too."
    rows = [[str(each.number), each.asked, in_words(each.reason)] for each in found.outside[:SHOWN]]
    table = {"columns": ["volume", "request", "reason"], "rows": rows} if rows else None
    note = f"The first {SHOWN}; all are in metrics.json." if count > SHOWN else ""
    return Section("Requests outside of the training data", text, table, labels=3, note=note)


def sweep_sections(found: Evaluation, pictures: Mapping[str, str]) -> list[Section]:
    """One covariate requested alone."""
    return [
        Section(
            f"Only {in_words(sweep.covariate)} requested",
            "All other covariates are left open, and all values start from the same noise. Lines are means over noises, bands "
            "their range.",
            pictures=[
                picture(
                    pictures, f"sweep-{sweep.covariate}", f"The first noise at each {in_words(sweep.covariate)}. Synthetic."
                )
            ],
            plots=[
                picture(pictures, f"curve-{sweep.covariate}-{name}", f"measured {in_words(name)}") for name in sweep.measured
            ],
        )
        for sweep in found.sweeps
    ]


def reconstruction_section(found: Evaluation, schema: CovariateSchema, pictures: Mapping[str, str]) -> Section:
    """Of held-out volumes; with a table if covariates were measured on them."""
    table = agreement_table(found.comparisons, schema, ("kept",))
    quality = "; ".join(
        f"{region}, PSNR {psnr['mean']:.2f} dB (95% interval {psnr['low']:.2f} to {psnr['high']:.2f}, standard deviation "
        f"{psnr['std']:.2f}) and SSIM {ssim['mean']:.3f} ({ssim['low']:.3f} to {ssim['high']:.3f})"
        for region, kind in (("In the foreground", "_foreground"), ("over the whole grid, air included", ""))
        for psnr, ssim in [(found.quality(f"psnr{kind}_db"), found.quality(f"ssim{kind}"))]
    )
    text = (
        f"{quality}; {len(found.psnr_db)} volumes. The foreground is where the original has signal, and two voxels around it. "
        "The lights are of the foreground: air is reconstructed easily, and a larger grid has more of it."
    )
    if table["rows"]:
        text += (
            " The table compares measurements on reconstructions with those on the originals: the error of the autoencoder."
        )
    pictures = [picture(pictures, "reconstructions", "Held-out originals, and the same after the autoencoder.")]
    return Section("Reconstruction of held-out volumes", text, table if table["rows"] else None, pictures=pictures)


def agreement_table(found: Sequence[Comparison], schema: CovariateSchema, kinds: Sequence[str]) -> dict[str, list]:
    """One row a comparison; its kind if there are several."""
    rows = []
    for c in found:
        if c.kind in kinds:
            values = [with_interval(getattr(c.agreement, name), ends) for name, ends in c.intervals.items()]
            rows.append([schema[c.covariate].label, *([c.kind] if len(kinds) > 1 else []), str(c.agreement.n), *values])
    return {"columns": ["covariate", *(["volumes"] if len(kinds) > 1 else []), "n", "r", "slope", "bias", "MAE"], "rows": rows}


def fidelity_table(found: Evaluation) -> pd.DataFrame:
    """One row a comparison, all figures."""
    return pd.DataFrame([c.to_dict() for c in found.comparisons])


def summary(found: Evaluation) -> list[str]:
    """Reconstruction and conditioning, as a table for the terminal."""
    lines = [
        f"reconstruction of the foreground: PSNR {found.psnr_foreground_db.mean():.2f} dB, "
        f"SSIM {found.ssim_foreground.mean():.3f} on {len(found.psnr_db)} volumes",
        f"{'covariate':24} {'volumes':14} {'n':>4} {'r':>7} {'slope':>7} {'bias':>9} {'MAE':>8}",
    ]
    for c in found.comparisons:
        a, kind = c.agreement, KINDS.get(c.kind, c.kind)
        lines.append(f"{c.covariate:24} {kind:14} {a.n:4} {a.r:7.3f} {a.slope:7.3f} {a.bias:9.2f} {a.mae:8.2f}")
    return [*lines, f"({LEGEND})"] if found.comparisons else lines
