"""What an audit leaves behind: audit.json, report.html, pictures of the most suspicious pairs, and the guard.

All but the guard show or name training subjects: it is to be kept as the training data is.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm3d import figures
from ldm3d.description import Sampling
from ldm3d.evaluation import subgroups
from ldm3d.pipeline import Pipeline
from ldm3d.privacy.audit import ALARM, Audit
from ldm3d.privacy.calibration import PLAINLY
from ldm3d.privacy.guard import FOLDER, Guard
from ldm3d.privacy.membership import LEVEL, Membership
from ldm3d.report.page import AMBER, GREEN, RED, Goal, Section, plain, write_page
from ldm3d.report.sections import subgroup_sections
from ldm3d.report.write import provenance
from ldm3d.statistics.conformal import Rate

AUDIT = "audit.json"


def write_audit(folder: Path, title: str, pipeline: Pipeline, found: Audit, guard: Guard, sampling: Sampling) -> Path:
    """Write audit.json, report.html, pictures as PNG, and the folder `guard`.

    Args:
        folder: is made if it is not there.
        title: of the page.
        pipeline, found, guard, sampling: what was audited, what was found, what it leaves, how volumes were generated.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(pipeline, found)
    for name, figure in pictures.items():
        figures.save(figure, folder / f"{name}.png")
    guard.save(folder / FOLDER)
    made = provenance(pipeline, sampling)
    # Bands of age by the training subjects, whom the last figures are of
    bands = subgroups.groupings(pipeline.schema, found.judged[-1].rows)
    gaps = subgroups.gaps(pipeline.schema, bands, found.judged)
    values = found.to_dict() | {"fairness": [gap.to_dict() for gap in gaps]}
    values |= {"goals": [goal.to_dict() for goal in goals(found)], "provenance": made}
    (folder / AUDIT).write_text(json.dumps(plain(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return write_page(folder, title, [*sections(found, pictures), *subgroup_sections(gaps)], made, goals(found))


def summary(found: Audit) -> str:
    """What was found, for the terminal; the verdict is the last line."""
    threshold, lines = found.threshold, []
    low, high = threshold.false_interval
    lines.append(f"{'copies':44} {found.copies()}; {found.plain} of them plain")
    lines.append(f"{'expected of new subjects':44} {threshold.false_rate:.1%} ({low:.1%} to {high:.1%})")
    lines.append(f"{'training subjects copied':44} {found.copied_subjects}")
    for name, space in found.spaces.items():
        shares = f"AuthPct {space.authentic.value:.1%} (held-out subjects {space.held_out_authentic.value:.1%})"
        lines.append(f"{f'{name} space':44} {shares}, C_T {space.c_t:+.2f}")
    if found.membership:
        attack = found.membership
        named = f"named by their loss, at a false rate of {attack.false_positive_rate:.1%}"
        lines.append(f"{named:44} {attack.true_positives}; {_auc(attack)}")
    return "\n".join([*lines, found.verdict])


def goals(found: Audit) -> list[Goal]:
    """The lights at the top."""
    copies, threshold = found.copies(), found.threshold
    if found.has_copies:
        judged = (RED, "copies")
    elif threshold.false_rate > 2 * ALARM:
        judged = (AMBER, f"no copies found; {threshold.held_out} held-out subjects are few")
    else:
        judged = (GREEN, "no copies beyond the held-out rate")
    interval = tuple(100 * end for end in copies.interval)
    lights = [
        Goal(
            "Copies among synthetic volumes",
            100 * copies.value,
            high=100 * threshold.false_interval[1],
            unit="%",
            interval=interval,
            judged=judged,
        ),
        Goal("Plain copies", float(found.plain), high=0, judged=(RED, "copies") if found.plain else (GREEN, "none")),
    ]
    if found.membership:
        lights.append(_given_away(found.membership))
    return lights


def _given_away(attack: Membership) -> Goal:
    """Whether the loss tells training subjects from others: names some of them, or is lower for most."""
    by_chance = attack.auc_low <= 0.5 <= attack.auc_high
    if attack.chance < ALARM:
        light, words = RED, "more than by chance"
    elif attack.auc > 0.5 and not by_chance and attack.auc_chance < ALARM:
        light, words = RED, "training subjects have lower losses"
    elif not by_chance and attack.auc < 0.5:
        light, words = AMBER, "held-out subjects have lower losses: the groups differ otherwise, too"
    elif not by_chance or attack.false_positive_rate > 2 * LEVEL:
        light, words = AMBER, f"{attack.training} training and {attack.held_out} held-out subjects are few"
    else:
        light, words = GREEN, "not more than by chance"
    name = f"Training subjects named by their loss, at a false positive rate of {attack.false_positive_rate:.1%}"
    interval = tuple(100 * end for end in attack.true_positives.interval)
    judged = light, f"{words}; {_auc(attack)}"
    return Goal(name, 100 * attack.true_positives.value, unit="%", interval=interval, judged=judged)


def _auc(attack: Membership) -> str:
    return f"AUC {attack.auc:.3f} ({attack.auc_low:.3f} to {attack.auc_high:.3f})"


def sections(found: Audit, pictures: Mapping[str, figures.Figure]) -> list[Section]:
    """What the page says, in its order."""

    def picture(name: str, caption: str) -> dict[str, str]:
        return {"source": figures.to_data_uri(pictures[name]), "caption": caption}

    threshold = found.threshold
    low, high = threshold.false_interval
    rows = [["synthetic volumes", *_cells(found.copies())]]
    for group in sorted({each.asked for each in found.looked} - {""}):
        rows.append([f"... for covariates of {group} subjects", *_cells(found.copies(group))])
    rows.append(["new subjects, expected", "", f"{threshold.false_rate:.1%}", f"{low:.1%} to {high:.1%}"])
    rows.append(["training subjects of whom there is a copy", *_cells(found.copied_subjects)])
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
    return [
        Section(
            "Are there copies?",
            f"{found.verdict}. This page shows and names training subjects: keep it as you keep the training data.",
            table={"columns": ["copies", "count", "share", "95% interval"], "rows": rows},
            plots=[picture("scores", "Scores; below the threshold (dashed) a volume counts as a copy.")],
            note="A score says by how many usual deviations a volume is too near to one training subject, compared with "
            f"the next ones. The threshold is number {threshold.counted}, from below, of the scores of {threshold.held_out} "
            f"held-out subjects. A plain copy is less than {PLAINLY:g} times as far from its training subject, in units of "
            "the distance to the next ones, as any held-out volume. Whether more volumes than expected are copies is tested "
            "by the beta-binomial distribution, which knows how many subjects were held out.",
        ),
        Section(
            "The most suspicious pairs",
            "Synthetic volumes with the lowest scores, the training subject that each is most like, and the difference.",
            pictures=[picture("pairs", "Left synthetic, middle a training subject, right their absolute difference.")],
        ),
        Section(
            "Distance to the training subjects",
            f"Distance to the nearest of {found.training_subjects} training subjects, in units of the mean distance to the "
            "next ones: 0 is a copy, 1 means that nobody stands out. Mirrored and moved copies count.",
            table={"columns": columns, "rows": spaces},
            note="AuthPct (Alaa et al. 2022): share of volumes whose nearest training volume is nearer to another training "
            "subject than to them. C_T (Meehan et al. 2020): z of the distances to the training set, synthetic against held "
            "out; below -3 synthetic volumes are systematically nearer, as copies are. Both use plain distances.",
        ),
        *_membership(found),
    ]


def _membership(found: Audit) -> list[Section]:
    """What the attack by losses found; nothing where it was not tried."""
    attack = found.membership
    if not attack:
        return []
    text = (
        f"Whoever has a volume and the model can measure how well the model denoises it. At a false positive rate of "
        f"{attack.false_positive_rate:.1%}, this names {attack.true_positives} of the training subjects as such "
        f"(p = {attack.chance:.2g}). Area under the ROC curve: {_auc(attack)}; 0.5 is chance (p = {attack.auc_chance:.2g})."
    )
    if attack.held_out < round(1 / LEVEL) - 1:
        text += f" For a rate of {LEVEL:.0%}, {round(1 / LEVEL) - 1} held-out subjects are needed; here are {attack.held_out}."
    rows = [[f"{t:g}", f"{training:.4f}", f"{held_out:.4f}"] for t, (training, held_out) in attack.losses.items()]
    columns = ["time", "loss of training subjects", "of held-out subjects"]
    return [Section("Does the loss give training subjects away?", text, {"columns": columns, "rows": rows})]


def _cells(rate: Rate) -> list[str]:
    low, high = rate.interval
    return [f"{rate.count} of {rate.total}", f"{rate.value:.1%}", f"{low:.1%} to {high:.1%}"]


def draw(pipeline: Pipeline, found: Audit) -> dict[str, figures.Figure]:
    """Every picture of the page, by name."""
    volumes, titles = [], []
    for looked, made, original in found.suspects:
        original, mirrored = _as_seen(made, original)
        ratio = looked.likeness.nearest[looked.likeness.space].ratio
        volumes += [made, original, np.abs(made - original)]
        what = "plain copy, " if looked.plain else "copy, " if looked.copy else ""
        titles += [
            f"{looked.name}: {what}score {looked.likeness.score:.1f}, ratio {ratio:.2f} ({looked.likeness.space})",
            f"training subject {looked.subject}{', mirrored' if mirrored else ''}",
            "difference",
        ]
    percent = np.linspace(0, 100, 41)
    scores = {
        "held out": np.percentile(found.held_out_scores, percent),
        "synthetic": np.percentile([each.likeness.score for each in found.looked], percent),
    }
    threshold = found.threshold.score
    return {
        "pairs": figures.mosaic(volumes, titles, pipeline.output_grid.spacing_mm, columns=3),
        "scores": figures.lines(percent, scores, "percent of volumes", "score", f"threshold {threshold:.2f}", limit=threshold),
    }


def _as_seen(made: NDArray, original: NDArray) -> tuple[NDArray, bool]:
    """The training volume, mirrored where that is nearer to the synthetic one; and whether it was."""
    mirrored = original[::-1]
    nearer = np.square(made - mirrored).sum() < np.square(made - original).sum()
    return (mirrored, True) if nearer else (original, False)
