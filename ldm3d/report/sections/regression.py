"""What regression on images contributes to the page: predicted covariates, recognised categories, downstream utility."""

from collections.abc import Sequence

from ldm3d.covariates import CovariateSchema, in_words
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.segmentation_utility import DRAWN, MOVED, REAL, SegmentationUtility
from ldm3d.evaluation.utility import Utility
from ldm3d.report.page import GREY, Goal, Section, number, with_interval
from ldm3d.report.sections.fidelity import MIN_R
from ldm3d.rulers.categories import Hits
from ldm3d.statistics.bootstrap import relative

MAX_UTILITY_RATIO = 1.25  # of errors, trained on synthetic to trained on real volumes


def prediction_section(found: Evaluation, schema: CovariateSchema) -> Section:
    """Covariates that no measure gives, and the error of their prediction on real people."""
    names, volumes = found.predicted
    rows = []
    for name in names:
        if real := found.find(name, "real"):
            errors = [with_interval(getattr(real.agreement, key), real.intervals[key]) for key in ("r", "bias", "mae")]
            rows.append([schema[name].label, str(real.agreement.n), *errors])
    return Section(
        "Covariates predicted by regression",
        f"By ridge regression on features of {volumes} real training volumes and of their reconstructions. The table has the "
        "error on held-out real people, which limits what can be measured on generated volumes.",
        {"columns": ["covariate", "real volumes", "r", "bias", "MAE"], "rows": rows},
    )


def categories_section(found: Sequence[Hits]) -> Section:
    """Of `ldm3d.rulers.categories`."""
    rows = []
    for hits in found:
        each = ", ".join(f"{name} {share:.0%}" for name, share in hits.by_category.items())
        share = with_interval(hits.share, hits.interval)
        rows.append([in_words(hits.covariate), hits.kind, str(hits.n), share, each, number(hits.commonest)])
    return Section(
        "Categories, requested and recognised",
        "Share of volumes on which the requested category is recognised; on real volumes and their reconstructions, that "
        "of the table. By linear regression on features of real training volumes and their reconstructions.",
        {"columns": ["covariate", "volumes", "n", "correct", "by category", "always the commonest"], "rows": rows},
        labels=2,
    )


def categories_lights(found: Sequence[Hits]) -> list[Goal]:
    """Of generated volumes, relative to real ones."""
    goals, known = [], {hits.covariate: hits for hits in found if hits.kind == "real"}
    for made in found:
        real = known.get(made.covariate)
        if made.kind == "generated" and real:
            judged = None
            if real.interval[0] <= real.commonest:
                judged = GREY, f"not recognised on real volumes either ({real.share:.0%} correct)"
            share, ends = relative(made.share, real.share, made.draws, real.draws)
            title = f"{in_words(made.covariate)}, requested and recognised: share correct, relative to real"
            goals.append(Goal(title, share, MIN_R, interval=ends, judged=judged))
    return goals


def utility_section(found: Utility) -> Section:
    """Of `ldm3d.evaluation.utility`."""
    rows = []
    for kind, mae in found.mae.items():
        ratio = with_interval(found.ratio[kind], found.ratio_intervals[kind]) if kind in found.ratio else "1"
        rows.append([kind, str(found.volumes[kind]), with_interval(mae, found.intervals[kind]), ratio])
    return Section(
        f"Downstream utility: {in_words(found.covariate)} predicted after training on synthetic volumes",
        f"The same regressor trained on real volumes, on synthetic volumes and on both, and tested on {found.tested} held-out "
        "real volumes. The label of a synthetic volume is the requested value.",
        {"columns": ["trained on", "volumes", "mean absolute error", "relative to real"], "rows": rows},
        note="Ridge regression on features. Means over training sets drawn at random; intervals are over training sets and "
        "tested people. Synthetic volumes were generated for the covariates of the tested people, so their range is the same.",
    )


def segmentation_section(found: SegmentationUtility) -> Section:
    """Of `ldm3d.evaluation.segmentation_utility`."""
    rows = []
    for size, kind in found.scores:
        beside = [
            with_interval(*found.mean(size, kind, other)) if kind == DRAWN and (size, other) in found.scores else ""
            for other in (REAL, MOVED)
        ]
        rows.append([str(size), kind, with_interval(*found.mean(size, kind)), *beside])
    seeds = len(next(iter(found.scores.values())))
    return Section(
        "Downstream utility: segmentation after training with volumes that the model draws of label maps",
        f"The same small network trained on few people's scans and label maps, and tested on {len(found.people)} others: mean "
        f"Dice over {', '.join(map(in_words, found.groups))}. Every second volume is what the table names: a real scan, the "
        "same mirrored and shifted, or one that the model drew of a label map, mirrored and shifted with it. The model itself "
        "was trained on everybody, as the last row's network is.",
        {"columns": ["people", "every second volume", "Dice", f"minus {REAL}", f"minus {MOVED}"], "rows": rows},
        labels=2,
        note=f"Means over {seeds} trainings on other people; intervals are over trainings and tested people. Where a network "
        "that was trained on everybody is no better than one of few people, the network is the limit, and no volume can help.",
    )


def utility_light(found: Utility) -> Goal:
    """Whether synthetic volumes can replace real ones in training."""
    title = f"Downstream utility: {in_words(found.covariate)}, error after training on synthetic volumes, relative to real"
    return Goal(title, found.ratio["synthetic"], high=MAX_UTILITY_RATIO, interval=found.ratio_intervals["synthetic"])
