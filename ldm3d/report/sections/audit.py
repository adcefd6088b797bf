"""Privacy on the page: copies of training subjects, and membership inference. The page shows and names training subjects."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ldm3d import figures
from ldm3d.pipeline import Pipeline
from ldm3d.privacy.calibration import PLAIN_RATIO
from ldm3d.privacy.findings import ALARM, Audit
from ldm3d.privacy.membership import FALSE_POSITIVE_RATE, Membership
from ldm3d.report.page import AMBER, GREEN, RED, Goal, Section, picture
from ldm3d.statistics.conformal import Rate


def summary(found: Audit) -> str:
    """For the terminal; the verdict is the last line."""
    low, high = found.threshold.false_interval
    lines = [
        f"{'copies':44} {found.copies()}; {found.plain} of them plain",
        f"{'expected of new subjects':44} {found.threshold.false_rate:.1%} ({low:.1%} to {high:.1%})",
        f"{'training subjects copied':44} {found.copied_subjects}",
    ]
    for name, space in found.spaces.items():
        shares = f"AuthPct {space.authentic.value:.1%} (held-out subjects {space.held_out_authentic.value:.1%})"
        lines.append(f"{f'{name} space':44} {shares}, C_T {space.c_t:+.2f}")
    if found.membership:
        attack = found.membership
        named = f"identified by loss, false positive rate {attack.false_positive_rate:.1%}"
        lines.append(f"{named:44} {attack.true_positives}; {_auc(attack)}")
    return "\n".join([*lines, found.verdict])


def lights(found: Audit) -> list[Goal]:
    """Of copies and membership inference."""
    copies, threshold = found.copies(), found.threshold
    if found.has_copies:
        judged = (RED, "copies")
    elif threshold.false_rate > 2 * ALARM:
        judged = (AMBER, f"no copies found, but with {threshold.held_out} held-out subjects only")
    else:
        judged = (GREEN, "no copies beyond the held-out rate")
    interval = tuple(100 * end for end in copies.interval)
    most = 100 * threshold.false_interval[1]
    plain = (RED, "copies") if found.plain else (GREEN, "none")
    goals = [
        Goal("Copies among synthetic volumes", 100 * copies.value, high=most, unit="%", interval=interval, judged=judged),
        Goal("Plain copies", float(found.plain), high=0, judged=plain),
    ]
    return [*goals, _membership_light(found.membership)] if found.membership else goals


def _membership_light(attack: Membership) -> Goal:
    """Whether the loss reveals training subjects: identifies some of them, or is lower for most."""
    by_chance = attack.auc_low <= 0.5 <= attack.auc_high
    if attack.chance < ALARM:
        light, words = RED, "more than by chance"
    elif attack.auc > 0.5 and not by_chance and attack.auc_chance < ALARM:
        light, words = RED, "training subjects have lower losses"
    elif not by_chance and attack.auc < 0.5:
        light, words = AMBER, "held-out subjects have lower losses: the groups differ in other respects"
    elif not by_chance or attack.false_positive_rate > 2 * FALSE_POSITIVE_RATE:
        light, words = AMBER, f"{attack.training} training and {attack.held_out} held-out subjects are too few to tell"
    else:
        light, words = GREEN, "not more than by chance"
    name = f"Membership inference: training subjects identified at a false positive rate of {attack.false_positive_rate:.1%}"
    interval = tuple(100 * end for end in attack.true_positives.interval)
    judged = light, f"{words}; {_auc(attack)}"
    return Goal(name, 100 * attack.true_positives.value, unit="%", interval=interval, judged=judged)


def _auc(attack: Membership) -> str:
    return f"AUC {attack.auc:.3f} ({attack.auc_low:.3f} to {attack.auc_high:.3f})"


def sections(found: Audit, pictures: Mapping[str, str]) -> list[Section]:
    """All sections; `pictures`: name -> data: URI, of the figures of `draw`."""
    return [
        _copies(found, pictures),
        Section(
            "The most suspicious pairs",
            "Synthetic volumes with the lowest scores, the training subject that each is most similar to, and the difference.",
            pictures=[picture(pictures, "pairs", "Left synthetic, middle a training subject, right the absolute difference.")],
        ),
        _distances(found),
        *_membership(found),
    ]


def _copies(found: Audit, pictures: Mapping[str, str]) -> Section:
    """Volumes below the similarity threshold."""
    threshold = found.threshold
    low, high = threshold.false_interval
    rows = [["synthetic volumes", *_cells(found.copies())]]
    rows += [[f"... for covariates of {group} subjects", *_cells(found.copies(group))] for group in found.groups]
    rows.append(["new subjects, expected", "", f"{threshold.false_rate:.1%}", f"{low:.1%} to {high:.1%}"])
    rows.append(["training subjects of whom there is a copy", *_cells(found.copied_subjects)])
    return Section(
        "Copies of training subjects",
        f"{found.verdict}. This page shows and names training subjects: keep it as you keep the training data.",
        table={"columns": ["copies", "count", "share", "95% interval"], "rows": rows},
        plots=[picture(pictures, "scores", "Scores; below the threshold (dashed) a volume counts as a copy.")],
        note="The score is the similarity of a volume to one training subject, compared with the next ones, in deviations of "
        f"the training subjects; low is similar. The threshold is number {threshold.counted}, from below, of the scores of "
        f"{threshold.held_out} held-out subjects. The distance of a plain copy, in units of the distance to the next "
        f"subjects, is less than {PLAIN_RATIO:g} times that of any held-out volume. Whether more volumes than expected are "
        "copies is tested by the beta-binomial distribution, which takes the number of held-out subjects into account.",
    )


def _distances(found: Audit) -> Section:
    """Distance to the training subjects in every space."""
    spaces = [
        [
            name,
            *(f"{value:.3f}" for value in (*space.held_out_ratio, *space.synthetic_ratio)),
            f"{space.held_out_authentic.value:.1%}",
            "{:.1%}\n({:.1%} to {:.1%})".format(space.authentic.value, *space.authentic.interval),
            f"{space.c_t:+.2f}",
        ]
        for name, space in found.spaces.items()
    ]
    columns = ["space", "held out: lowest", "median", "synthetic: lowest", "median", "AuthPct held out", "AuthPct", "C_T"]
    return Section(
        "Distance to the training subjects",
        f"Distance to the nearest of {found.training_subjects} training subjects, in units of the mean distance to the next "
        "ones: 0 is a copy, near 1 no subject stands out. Mirrored and moved copies count.",
        table={"columns": columns, "rows": spaces},
        note="AuthPct (Alaa et al. 2022): share of volumes whose nearest training volume is nearer to another training "
        "subject than to them. C_T (Meehan et al. 2020): z of the distances to the training set, synthetic against held out; "
        "below -3 synthetic volumes are systematically nearer, as copies are. Both use plain distances.",
    )


def _membership(found: Audit) -> list[Section]:
    """Membership inference; none if it was not possible."""
    attack = found.membership
    if not attack:
        return []
    text = (
        "An attacker who has a volume and the model can compute how well the model denoises it. At a false positive rate of "
        f"{attack.false_positive_rate:.1%}, this identifies {attack.true_positives} of the training subjects "
        f"(p = {attack.chance:.2g}). Area under the ROC curve: {_auc(attack)}; 0.5 is chance (p = {attack.auc_chance:.2g})."
    )
    needed = round(1 / FALSE_POSITIVE_RATE) - 1
    if attack.held_out < needed:
        text += f" A rate of {FALSE_POSITIVE_RATE:.0%} needs {needed} held-out subjects; here are {attack.held_out}."
    rows = [[f"{t:g}", f"{training:.4f}", f"{held_out:.4f}"] for t, (training, held_out) in attack.losses.items()]
    columns = ["time", "loss of training subjects", "of held-out subjects"]
    return [Section("Membership inference", text, {"columns": columns, "rows": rows})]


def _cells(rate: Rate) -> list[str]:
    low, high = rate.interval
    return [f"{rate.count} of {rate.total}", f"{rate.value:.1%}", f"{low:.1%} to {high:.1%}"]


def draw(pipeline: Pipeline, found: Audit) -> dict[str, figures.Figure]:
    """Every picture of the page, by name."""
    volumes, titles = [], []
    for audited, made, original in found.suspects:
        original, mirrored = _best_orientation(made, original)
        similarity = audited.similarity
        ratio = similarity.nearest[similarity.space].ratio
        volumes += [made, original, np.abs(made - original)]
        kind = "plain copy, " if audited.plain else "below the threshold, " if audited.copy else ""
        titles += [
            f"{audited.name}: {kind}score {similarity.score:.1f}, ratio {ratio:.2f} ({similarity.space})",
            f"training subject {audited.subject}{', mirrored' if mirrored else ''}",
            "difference",
        ]
    percent = np.linspace(0, 100, 41)
    scores = {
        "held out": np.percentile(found.held_out_scores, percent),
        "synthetic": np.percentile([each.similarity.score for each in found.volumes], percent),
    }
    threshold = found.threshold.score
    return {
        "pairs": figures.mosaic(volumes, titles, pipeline.output_grid.spacing_mm, columns=3),
        "scores": figures.lines(percent, scores, "percent of volumes", "score", f"threshold {threshold:.2f}", limit=threshold),
    }


def _best_orientation(made: NDArray, original: NDArray) -> tuple[NDArray, bool]:
    """The training volume, mirrored if that is nearer to the synthetic one; and whether it is mirrored."""
    mirrored = original[:, ::-1]
    nearer = np.square(made - mirrored).sum() < np.square(made - original).sum()
    return (mirrored, True) if nearer else (original, False)
