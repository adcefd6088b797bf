"""What the page of an evaluation says: its sections in their order, and the lights at its top with their thresholds."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ldm3d.covariates import CovariateSchema
from ldm3d.evaluation import subgroups
from ldm3d.evaluation.fidelity import Evaluation
from ldm3d.evaluation.subgroups import PART, Gap
from ldm3d.evaluation.support import SHARE
from ldm3d.evaluation.utility import Utility
from ldm3d.report import likeness
from ldm3d.report.page import AMBER, GREEN, GREY, RED, Goal, Section, number
from ldm3d.rulers.categories import Hits
from ldm3d.statistics.agreement import Comparison
from ldm3d.statistics.bootstrap import interval, mean_interval, relative

# The page's lights for verdicts
FAIRNESS = {subgroups.NONE: GREEN, subgroups.GAP: RED, subgroups.SMALL: AMBER, subgroups.FEW: GREY}
ALARMING = {subgroups.GAP: 0, subgroups.SMALL: 1}  # what stands first in a table

# Thresholds of the lights. What can be asked of generated volumes is what the measure itself reaches on real ones.
# Of the foreground: 28 dB and 0.9 over a grid of which a brain fills three tenths and air, without error, the rest
PSNR_DB, SSIM = 23.0, 0.7
KEPT = 0.05  # of the mean, that the autoencoder may add to or take from a volume
R, SLOPE, MAE = 0.9, 0.2, 1.5  # share of the real r, distance from the real slope, multiple of the real error
BLIND = 0.5  # r on real volumes below which a measure judges nobody
MEASURED = 99.0  # percent of generated volumes
OUTSIDE = 5.0  # percent of requests
RATIO = 1.25  # of errors, trained on synthetic to trained on real

# Columns of likelihood.score: what they are, and in which unit
LIKELIHOOD = {
    "bound": ("latent", "nats per latent dimension"),
    "bits_per_voxel": ("volume", "bits per voxel"),
    "image_bits": ("volume given its latent", "bits per voxel"),
    "latent_bits": ("latent, shared among voxels", "bits per voxel"),
}

SHOWN = 10  # requests beyond training that are listed

Picture = dict[str, str]


def lights(found: Evaluation) -> list[Goal]:
    """The summary's lights; a figure that was not measured has none."""
    goals = []
    for figure, name, least, unit in (("PSNR", "psnr_foreground_db", PSNR_DB, "dB"), ("SSIM", "ssim_foreground", SSIM, "")):
        quality = found.quality(name)
        interval = quality["low"], quality["high"]
        goals.append(Goal(f"Reconstruction of the foreground, {figure}", quality["mean"], least, unit=unit, interval=interval))
    for c in found.comparisons:
        real = found.find(c.covariate, "real")
        if c.kind == "kept" and (real is None or real.agreement.r >= BLIND):
            part = 100 / max(abs(float(c.reference.mean())), 1e-9)
            bias, (low, high) = c.agreement.bias * part, c.intervals["bias"]
            title = f"{c.covariate}, bias by the autoencoder"
            goals.append(Goal(title, bias, -100 * KEPT, 100 * KEPT, "%", (low * part, high * part)))
        elif c.kind == "generated" and real:
            goals += _followed(c, real)
    generated = [c for c in found.comparisons if c.kind == "generated"]
    if generated:
        shares = [c.agreement.n / sum(row[c.covariate] is not None for row in found.requests) for c in generated]
        goals.append(Goal("Generated volumes on which all is measured", 100 * min(shares), MEASURED, unit="%"))
    if any(found.requests):  # where nothing can be asked, nothing is beyond
        share = 100 * len(found.beyond) / len(found.requests)
        goals.append(Goal("Requests beyond what training saw", share, high=OUTSIDE, unit="%"))
    if found.likeness:
        goals.append(likeness.light(found.likeness))
    if found.gaps:
        goals.append(_fair(found.gaps))
    return goals


def _followed(c: Comparison, real: Comparison) -> list[Goal]:
    """Of generated volumes against what the same measure reaches on real ones; both figures have their uncertainty."""
    asked, known = c.agreement, real.agreement
    if known.r < BLIND:
        judged = GREY, f"the measure does not see it on real volumes either (r = {known.r:.2f})"
        return [Goal(f"{c.covariate}, asked and measured: r", asked.r, judged=judged)]
    r, within = relative(asked.r, known.r, c.draws["r"], real.draws["r"])
    error, around = relative(asked.mae, known.mae, c.draws["mae"], real.draws["mae"])
    apart = interval(c.draws["slope"] - real.draws["slope"])
    name = f"{c.covariate}, asked and measured"
    return [
        Goal(f"{name}: r, relative to real", r, R, interval=within),
        Goal(f"{name}: slope, less that of real", asked.slope - known.slope, -SLOPE, SLOPE, interval=apart),
        Goal(f"{name}: mean absolute error, relative to real", error, high=MAE, interval=around),
    ]


def _fair(gaps: Sequence[Gap]) -> Goal:
    judged = [gap for gap in gaps if not gap.of_measure]
    verdicts = [gap.verdict for gap in judged]
    settled = {gap.verdict for gap in judged if gap.decides} == {subgroups.NONE}
    light = next((FAIRNESS[v] for v in (subgroups.GAP, subgroups.SMALL) if v in verdicts), GREEN if settled else GREY)
    order = (*ALARMING, subgroups.FEW, subgroups.NONE)  # the bad news first
    words = ", ".join(f"{verdicts.count(v)} {v}" for v in order if v in verdicts)
    return Goal("Gaps between groups of people", verdicts.count(subgroups.GAP), high=0, judged=(light, words))


def sections(found: Evaluation, schema: CovariateSchema, pictures: dict[str, str]) -> list[Section]:
    """What the page says, in its order; `pictures` are data: URIs by name, see `ldm3d.report.write.draw`."""

    def picture(name: str, caption: str) -> Picture:
        return {"source": pictures[name], "caption": caption}

    slices = [picture("generated", "Axial, coronal and sagittal slices.")]
    first = Section(
        "Generated for the covariates of held-out subjects",
        "Above, held-out subjects; below, volumes generated for their covariates. They need not look alike beyond what was "
        "asked.",
        pictures=slices,
    )
    if not len(schema):  # of what is asked there is nothing to say
        first = Section("Generated volumes", "Above, held-out subjects; below, generated volumes.", pictures=slices)
        alike = likeness.sections(found.likeness, found.realism_of_reconstructions)
        return [first, *alike, _reconstruction(found, schema, picture)]
    return [
        first,
        Section(
            "Covariates, asked and measured",
            "Measured on the images. The rows named real say how well the measure itself agrees with the table, those named "
            "reconstructed what the autoencoder keeps; generated volumes are compared with what they were asked for. A "
            "perfect answer has r and slope 1, bias and mean absolute error (MAE) 0.",
            table=agreements(found.comparisons, schema, ("real", "reconstructed", "generated")),
            labels=2,
            note="n: volumes whose value is known and on which the measure found something. In brackets 95% intervals, by "
            "2,000 bootstrap resamples of people. A covariate that is predicted by regression (see the end of the page) is "
            "drawn towards the mean on real volumes as well: compare slopes with the real one's. Shaded in the plots: 95% "
            "interval of the fitted line.",
            plots=[
                picture(f"scatter-{c.covariate}-{c.kind}", f"{c.covariate} on {c.kind} volumes")
                for c in found.comparisons
                if c.kind != "kept"
            ],
        ),
        _beyond(found),
        *likeness.sections(found.likeness, found.realism_of_reconstructions),
        *(
            Section(
                f"Only {sweep.covariate} asked",
                "All other covariates are left open, and every column starts from the same noise. Lines are means over "
                "noises, bands their range.",
                pictures=[picture(f"sweep-{sweep.covariate}", f"The first noise at each {sweep.covariate}. Synthetic.")],
                plots=[picture(f"curve-{sweep.covariate}-{name}", f"measured {name}") for name in sweep.measured],
            )
            for sweep in found.sweeps
        ),
        _reconstruction(found, schema, picture),
        *subgroup_sections(found.gaps),
    ]


def _reconstruction(found: Evaluation, schema: CovariateSchema, picture: Callable[[str, str], Picture]) -> Section:
    """Of held-out volumes; a table only where something was measured on them."""
    table = agreements(found.comparisons, schema, ("kept",))
    text = (
        f"{_quality(found)}; {len(found.psnr_db)} volumes. The foreground is where the original shows something, and two "
        "voxels around that. The lights judge it, for air is easy, and a larger grid has more of it."
    )
    if table["rows"]:
        text += (
            " The table has what is measured on reconstructions against the same measured on the originals: what the "
            "autoencoder alone adds or takes."
        )
    pictures = [picture("reconstructions", "Held-out originals, and the same after the autoencoder.")]
    return Section("Reconstruction of held-out volumes", text, table if table["rows"] else None, pictures=pictures)


def utility_section(found: Utility) -> Section:
    """Of `ldm3d.evaluation.utility`."""
    rows = []
    for kind, mae in found.mae.items():
        ratio = _with(found.ratio[kind], found.ratio_intervals[kind]) if kind in found.ratio else "1"
        rows.append([kind, str(found.volumes[kind]), _with(mae, found.intervals[kind]), ratio])
    return Section(
        f"Is it of use? {found.covariate} learnt from synthetic volumes",
        f"The same regressor trained on real, on synthetic and on both kinds of volumes, and tested on {found.tested} "
        "held-out real volumes. Synthetic volumes are labelled with what was asked of them.",
        {"columns": ["trained on", "volumes", "mean absolute error", "relative to real"], "rows": rows},
        note="Ridge regression on features, solved exactly. Means over training sets drawn at random; intervals are over "
        "training sets and tested people. Synthetic volumes were asked for the covariates of the tested people, so their "
        "range is the same.",
    )


def utility_light(found: Utility) -> Goal:
    """Whether synthetic volumes can stand in for real ones."""
    title = f"{found.covariate} learnt from synthetic volumes, error relative to real"
    return Goal(title, found.ratio["synthetic"], high=RATIO, interval=found.ratio_intervals["synthetic"])


def prediction_section(found: Evaluation, schema: CovariateSchema, names: Sequence[str], volumes: int) -> Section:
    """How covariates were read off that no measure gives, and how far that errs on real people."""
    rows = []
    for name in names:
        if real := found.find(name, "real"):
            errors = [_with(getattr(real.agreement, key), real.intervals[key]) for key in ("r", "bias", "mae")]
            rows.append([schema[name].label, str(real.agreement.n), *errors])
    return Section(
        "How predicted covariates were read off",
        f"By ridge regression on features of {volumes} real training volumes and of their reconstructions. The table has its "
        "own error on held-out real people: what generated volumes cannot do better than.",
        {"columns": ["covariate", "real volumes", "r", "bias", "MAE"], "rows": rows},
    )


def categories_section(found: Sequence[Hits]) -> Section:
    """Of `ldm3d.rulers.categories`."""
    rows = []
    for hits in found:
        each = ", ".join(f"{name} {share:.0%}" for name, share in hits.by_category.items())
        rows.append([hits.covariate, hits.kind, str(hits.n), _with(hits.share, hits.interval), each, number(hits.commonest)])
    return Section(
        "Categories, asked and read off",
        "Share of volumes off which the asked category is read, or on real volumes and their reconstructions the table's. "
        "Read off by linear regression on features, learnt from real training volumes and their reconstructions.",
        {"columns": ["covariate", "volumes", "n", "right", "by category", "always the commonest"], "rows": rows},
        labels=2,
    )


def categories_lights(found: Sequence[Hits]) -> list[Goal]:
    """Of generated volumes, against what is reached on real ones."""
    goals, known = [], {hits.covariate: hits for hits in found if hits.kind == "real"}
    for made in found:
        real = known.get(made.covariate)
        if made.kind == "generated" and real:
            judged = None
            if real.interval[0] <= real.commonest:
                judged = GREY, f"it is not told on real volumes either ({real.share:.0%} right)"
            share, within = relative(made.share, real.share, made.draws, real.draws)
            title = f"{made.covariate}, asked and read off: share right, relative to real"
            goals.append(Goal(title, share, R, interval=within, judged=judged))
    return goals


def likelihood_section(table: pd.DataFrame, people: Sequence, times: int, histogram: str) -> Section:
    """Of `ldm3d.evaluation.likelihood.score` with the bound; `histogram` is the picture's data: URI."""
    rows = [
        [title, unit, _with(float(table[column].mean()), mean_interval(table[column].to_numpy(), people))]
        for column, (title, unit) in LIKELIHOOD.items()
    ]
    return Section(
        "How likely the model finds held-out people",
        f"Upper bounds of the negative log-likelihood of {len(table)} held-out volumes given their covariates, without "
        "guidance: lower is better. Figures compare only between models of the same volumes, and those of latents only "
        "between models of the same autoencoder.",
        {"columns": ["figure", "unit", "mean over volumes"], "rows": rows},
        labels=2,
        plots=[{"source": histogram, "caption": "One count a held-out volume."}],
        note=f"The variational bound with {times} times a volume; bits per voxel are of 256 grey levels. `ldm3d likelihood` "
        "computes them with more times, and by the probability flow ODE.",
    )


def _quality(found: Evaluation) -> str:
    return "; ".join(
        f"{where}, PSNR {psnr['mean']:.2f} dB (95% interval {psnr['low']:.2f} to {psnr['high']:.2f}, standard deviation "
        f"{psnr['std']:.2f}) and SSIM {ssim['mean']:.3f} ({ssim['low']:.3f} to {ssim['high']:.3f})"
        for where, kind in (("In the foreground", "_foreground"), ("over the whole grid, air included", ""))
        for psnr, ssim in [(found.quality(f"psnr{kind}_db"), found.quality(f"ssim{kind}"))]
    )


def agreements(found: Sequence[Comparison], schema: CovariateSchema, kinds: Sequence[str]) -> dict[str, list]:
    """One row a comparison; its kind only where there are several."""
    rows = []
    for c in found:
        if c.kind in kinds:
            values = [_with(getattr(c.agreement, name), interval) for name, interval in c.intervals.items()]
            rows.append([schema[c.covariate].label, *([c.kind] if len(kinds) > 1 else []), str(c.agreement.n), *values])
    return {"columns": ["covariate", *(["volumes"] if len(kinds) > 1 else []), "n", "r", "slope", "bias", "MAE"], "rows": rows}


def _beyond(found: Evaluation) -> Section:
    """Requests that training says nothing about."""
    count, asked = len(found.beyond), len(found.requests)
    text = (
        f"{count} of {asked} requests ask for a value outside of what training saw, or for values that hardly ever come "
        f"together in the training volumes (Mahalanobis distance beyond that of {SHARE}% of them). What is generated there is "
        "extrapolation."
    )
    if not found.joint:
        text += " The table that was trained on is not at hand, so each covariate was judged alone."
    rows = [[str(each.number), each.asked, each.reason] for each in found.beyond[:SHOWN]]
    table = {"columns": ["volume", "asked", "why"], "rows": rows} if rows else None
    note = f"The first {SHOWN}; all are in metrics.json." if count > SHOWN else ""
    return Section("Requests beyond what training saw", text, table, labels=3, note=note)


def subgroup_sections(gaps: Sequence[Gap]) -> list[Section]:
    """One section for each covariate that people are grouped by."""
    found = []
    for grouping in dict.fromkeys(gap.grouping for gap in gaps):
        own = [gap for gap in gaps if gap.grouping == grouping]
        labels = list(dict.fromkeys(group.label for gap in own for group in gap.groups))
        sizes = {group.label: group.people for group in own[0].groups}
        rows = []
        for gap in sorted(own, key=lambda gap: ALARMING.get(gap.verdict, len(ALARMING))):
            by_label = {group.label: group for group in gap.groups}
            cells = [_group(by_label.get(label), sizes) for label in labels]
            found_gap = _with(gap.gap, (gap.low, gap.high))
            rows.append([gap.figure, *cells, found_gap, number(gap.chance), number(gap.tolerance), gap.verdict])
        small = [f"{label} ({n})" for label, n in sizes.items() if n < subgroups.LEAST]
        text = f"People in each group: {', '.join(f'{label}: {n}' for label, n in sizes.items())}."
        if small:
            text += f" Too small to judge, with fewer than {subgroups.LEAST} people: {', '.join(small)}."
        note = (
            "Kept: the autoencoder's error; real: the measure's own error on real volumes, which no model can be blamed for "
            "and no light counts; likewise the likelihood, as some groups vary more than others. "
            "Beyond real: of generated volumes less that of real ones of the same group, since the measure may be worse for "
            "some; errors and shares read off volume by volume, distances with as many volumes in every group. "
            "± half of a 95% interval; (of n people): where these are not all. Gap: the worst group less the best, "
            "or for a bias the largest less the smallest, with its 95% interval. By chance: what 95% of random groupings stay "
            "below in one row; the verdict asks for more, since some of so many rows exceed it by chance. "
            "Gap (red): more than chance makes, at 5% over all rows of all these tables together (Holm 1979), and possibly "
            "above the tolerance: for kept and generated the measure's own mean absolute error on real volumes, for other "
            f"errors {PART:.0%} of the overall one, or {subgroups.SHARE:.0%} of the covariate's mean, whichever is larger; for "
            f"distances {PART:.0%} of the distance. The light at the top is green if no row has a gap, and reconstruction and "
            "covariates, kept and generated, have none for certain; shares and distances can show a gap, and hardly ever that "
            "there is none. Small gap (amber): within the "
            "tolerance. No gap (green): no more than chance, and within the tolerance. Too few to tell (grey): chance alone "
            "may make a gap beyond the tolerance."
        )
        columns = ["figure", *labels, "gap", "by chance", "tolerance", "verdict"]
        found.append(
            Section(
                f"By {grouping}: is it as good for everybody?",
                text,
                {"columns": columns, "rows": rows},
                lights=FAIRNESS,
                note=note,
            )
        )
    return found


def _group(group: subgroups.Group | None, sizes: dict[str, int]) -> str:
    """Its value, half of its 95% interval, and its people where they are not all of the group's."""
    if group is None:
        return "none"
    some = f"\n(of {group.people} people)" if group.people != sizes.get(group.label) else ""
    return f"{number(group.value)} ± {number((group.high - group.low) / 2)}{some}"


def _with(value: float, interval: tuple[float, float]) -> str:
    """The value, and below it "(0.874 to 0.941)"; the value alone where there is no interval."""
    if not np.isfinite(interval).all():
        return number(value)
    return f"{number(value)}\n({number(interval[0])} to {number(interval[1])})"


def fidelity_table(found: Evaluation) -> pd.DataFrame:
    """One row a comparison, all figures."""
    return pd.DataFrame([c.to_dict() for c in found.comparisons])
