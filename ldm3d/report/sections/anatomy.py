"""Anatomy on the page: what a segmentation and a classifier say of generated volumes."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ldm3d import figures
from ldm3d.evaluation.anatomy import ALL, MARGIN, REFERENCES, Anatomy
from ldm3d.evaluation.discriminability import Discriminability
from ldm3d.report.page import GREY, RED, Goal, Section, number, picture, with_interval
from ldm3d.report.sections.realism import LIGHTS
from ldm3d.statistics.equivalence import BEYOND, CLOSER, ENOUGH, FEW, WITHIN, Finding

MAX_AUC = 0.75
MIN_VARIETY, MAX_VARIETY = 0.8, 1.25  # a tenth less, or more, distance between people
MIN_DICE = 0.85  # of reconstructions, of the class that is kept worst
PICTURE = "anatomy"

TEXT = (
    "A segmentation network divided real held-out, reconstructed and generated volumes into classes. For each figure of a "
    "class the table has the middle 90% of real people, and the share of reconstructed and of generated volumes within it. A "
    "model that draws brains like those of these people has 90% of its own there. If reconstructions have fewer, look at the "
    "autoencoder first."
)
NOTE = (
    "Surface: by Crofton's formula. Thickness: twice the volume over the surface, as of a sheet. Asymmetry: (right - left) / "
    f"(right + left). Overlap: Dice with the nearest of {REFERENCES} other real people. In brackets 95% intervals, by 2,000 "
    f"bootstrap resamples of people. {WITHIN.capitalize()} (green): the whole 90% interval is within {MARGIN:.0%} of the "
    f"share of other real people, with {ENOUGH} people or more. {BEYOND.capitalize()} (red): all of it lies below. "
    f"{CLOSER.capitalize()} (amber): more volumes are there than of real people, so the usual brain is drawn too often. "
    f"{FEW.capitalize()} (grey): anything else. The light is red if any figure of generated volumes is beyond the margin (not "
    f"counted with fewer than {ENOUGH} people), otherwise that of the mean over figures."
)


def dice_lights(anatomy: Anatomy | None) -> list[Goal]:
    """Of reconstructed tissues; none if they were not measured."""
    if anatomy:
        means = {name: anatomy.mean_dice(name) for name in anatomy.dice}
        worst = min(means, key=lambda name: np.nan_to_num(means[name][0], nan=-1))
        dice = Goal(f"Dice of reconstructions, {_words(worst)}", means[worst][0], MIN_DICE, interval=means[worst][1])
        return [_with_enough(dice, len(set(anatomy.people)))]
    return []


def lights(anatomy: Anatomy | None, found: Discriminability | None) -> list[Goal]:
    """Of anatomy, classifier and variety; those that were not measured have none."""
    goals = [anatomy_light(anatomy.generated)] if anatomy else []
    if found:
        told = Goal("Generated told from reconstructed volumes, AUC", found.auc, high=MAX_AUC, interval=found.auc_interval)
        variety = found.variety, MIN_VARIETY, MAX_VARIETY
        varied = Goal("Variance between generated volumes, relative", *variety, interval=found.variety_interval)
        goals += [_with_enough(goal, found.people) for goal in (told, varied)]
    return goals


def _with_enough(goal: Goal, people: int) -> Goal:
    """Grey where too few people are no proof that all is well; what is red stays red."""
    return goal if people >= ENOUGH or goal.verdict[0] == RED else replace(goal, judged=(GREY, FEW))


def anatomy_light(findings: list[Finding]) -> Goal:
    """Red if any figure is beyond the margin, else as the mean over figures.

    With fewer than `ENOUGH` people a single figure of many is beyond it by chance, so that the mean alone counts.
    """
    mean, *others = findings
    beyond = sum(finding.verdict == BEYOND for finding in others) if min(mean.real, mean.synthetic) >= ENOUGH else 0
    verdict = BEYOND if beyond else mean.verdict
    words = f"{beyond} of {len(others)} figures {BEYOND}" if beyond else verdict
    name = "Anatomy within the middle 90% of real people"
    return Goal(name, 100 * mean.value, unit="%", interval=(100 * mean.low, 100 * mean.high), judged=(LIGHTS[verdict], words))


def sections(anatomy: Anatomy | None, found: Discriminability | None, pictures: Mapping[str, str]) -> list[Section]:
    """What was measured; `pictures`: name -> data: URI."""
    parts = []
    if anatomy:
        again = {finding.name: finding for finding in anatomy.reconstructed}
        rows = []
        for finding in anatomy.generated:
            name = finding.name
            usual = "" if name == ALL else "{} to {}".format(*map(number, anatomy.middle(name)))
            shares = [cell for each in (finding, again[name]) for cell in (_share(each), each.verdict)]
            rows.append(["mean of all figures" if name == ALL else _words(name), usual, *shares])
        columns = ["figure", "real, middle 90%", "generated", "verdict", "reconstructed", "verdict"]
        kept = ", ".join(f"{_words(name)} {_line(*anatomy.mean_dice(name))}" for name in anatomy.dice)
        text = f"{TEXT} Dice of reconstructions with their originals: {kept}."
        drawn = picture(pictures, PICTURE, "Lines: middle 90%. Points: medians. Grey band: middle 90% of real people.")
        table = {"columns": columns, "rows": rows}
        parts.append(Section("Anatomy", text, table, pictures=[drawn], lights=LIGHTS, note=NOTE))
    if found:
        text = (
            f"A small 3D classifier was trained to tell {found.people} generated from as many reconstructed volumes, and "
            "tested on people whom it had not seen. Area under its ROC curve (AUC): "
            f"{_line(found.auc, found.auc_interval)}; 0.5 is chance. Variance between generated volumes, averaged over "
            f"voxels, relative to that between reconstructed ones: {_line(found.variety, found.variety_interval)}; 1 is as "
            "much variety. Reconstructions are the reference, so that the blur of the autoencoder does not count."
        )
        parts.append(Section("Told apart, and variety", text))
    return parts


def draw(anatomy: Anatomy | None) -> dict[str, figures.Figure]:
    """Medians and middle 90% of all figures, in units of the middle 90% of real people."""
    if not anatomy:
        return {}
    series = {}
    for kind in ("reconstructed", "generated"):
        rows = []
        for f, name in enumerate(anatomy.names):
            low, high = anatomy.middle(name)
            values = anatomy.values[kind][:, f]
            ends = np.nanpercentile(values, (5, 50, 95)) if np.isfinite(values).any() else np.full(3, np.nan)
            rows.append((2 * ends - low - high) / max(high - low, 1e-9))
        series[kind] = np.array(rows)
    names = [_words(name) for name in anatomy.names]
    return {PICTURE: figures.ranges(names, series, "in units of the middle 90% of real people", "Anatomy by segmentation")}


def summary(anatomy: Anatomy | None, found: Discriminability | None) -> list[str]:
    """For the terminal."""
    lines = []
    if anatomy:
        share, words = 100 * anatomy.generated[0].value, anatomy_light(anatomy.generated).verdict[1]
        lines.append(f"anatomy: {share:.1f}% within the middle 90% of real people, {words}")
    if found:
        lines.append(f"classifier: AUC {found.auc:.3f} against reconstructions; variety {found.variety:.2f} of theirs")
    return lines


def _share(finding: Finding) -> str:
    return f"{100 * finding.value:.1f}%\n({100 * finding.low:.0f} to {100 * finding.high:.0f})"


def _line(value: float, interval: tuple[float, float]) -> str:
    """The value and its interval in one line."""
    return with_interval(value, interval).replace("\n", " ")


def _words(name: str) -> str:
    """grey_volume_ml -> grey volume (ml)."""
    for unit, shown in (("_ml", " (ml)"), ("_mm2", " (mm²)"), ("_mm", " (mm)")):
        if name.endswith(unit):
            name = name.removesuffix(unit) + shown
            break
    return name.replace("_", " ")
