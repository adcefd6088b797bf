"""Subgroup analysis on the page: gaps between groups of people."""

import math
from collections.abc import Mapping, Sequence

from ldm3d import figures
from ldm3d.covariates import in_words
from ldm3d.evaluation.subgroups import ERROR_TOLERANCE, FEW, GAP, MEAN_TOLERANCE, MIN_GROUP, NO_GAP, SMALL_GAP, Gap, Group
from ldm3d.report.page import AMBER, GREEN, GREY, RED, Goal, Section, number, picture, with_interval

INKS = {RED: "#b3261e", AMBER: "#8a6000", GREEN: "#1f7a55", GREY: "#5d6a76"}  # as on the page
LIGHTS = {GAP: RED, SMALL_GAP: AMBER, FEW: GREY, NO_GAP: GREEN}  # the bad news first

NOTE = (
    "± half of a 95% interval; (of n people): if these are not all. Gap: the worst group minus the best, or for a bias the "
    "largest minus the smallest, with its 95% interval. By chance: 95th percentile of the gaps of random groups, for one "
    "row; the verdict is corrected for the number of rows of all these tables together (Holm 1979). Real: error of the "
    "measure on real volumes; no property of the model, so it does not count for the light, and neither do likelihoods, as "
    "some groups vary more than others. Autoencoder: error of reconstructions against the originals. Minus real: on "
    "generated volumes, minus that on real volumes with the same covariates, as the measure itself may be worse in some "
    "groups; distances are computed with equally many volumes in all groups. Gap (red): significant at 5%, and possibly "
    "above the tolerance: for autoencoder and generated the mean absolute error of the measure on real volumes, for other "
    f"errors {ERROR_TOLERANCE:.0%} of the overall one, or {MEAN_TOLERANCE:.0%} of the mean of the covariate if that is "
    f"larger; for distances {ERROR_TOLERANCE:.0%} of the distance. Small gap (amber): significant, and within the "
    "tolerance. No gap (green): not significant, and within the tolerance. Too few to tell (grey): a gap beyond the "
    "tolerance cannot be excluded. The light at the top is green if no row has a gap, and reconstruction, autoencoder and "
    "generated are certain to have none; shares and distances can show a gap, but hardly ever prove that there is none."
)

CAPTION = (
    "Points: the gap between the worst and the best group; lines: its 95% interval. Grey band: gaps that are small enough to "
    f"be tolerated. Ticks: gaps that random groups have by chance (95th percentile). Red: {GAP}; amber: {SMALL_GAP}; green: "
    f"{NO_GAP}; grey: {FEW}. An arrowhead: the interval goes on beyond the picture, to the "
    "figure beside it; ticks beyond it are left out."
)


def light(gaps: Sequence[Gap]) -> Goal:
    """One for all gaps but those of the measure itself."""
    counted = [gap for gap in gaps if not gap.of_measure]
    verdicts = [gap.verdict for gap in counted]
    settled = {gap.verdict for gap in counted if gap.decides} == {NO_GAP}
    colour = next((LIGHTS[v] for v in (GAP, SMALL_GAP) if v in verdicts), GREEN if settled else GREY)
    words = ", ".join(f"{verdicts.count(v)} {v}" for v in LIGHTS if v in verdicts)
    return Goal("Gaps between groups of people", verdicts.count(GAP), high=0, judged=(colour, words))


def draw(gaps: Sequence[Gap]) -> dict[str, figures.Figure]:
    """A forest plot for each covariate that people are grouped by, of those gaps that could be tested."""
    drawn, order = {}, list(LIGHTS)
    for grouping in dict.fromkeys(gap.grouping for gap in gaps):
        own = [gap for gap in gaps if gap.grouping == grouping and _is_drawn(gap)]
        rows = []
        for gap in sorted(own, key=lambda gap: (gap.of_measure, order.index(gap.verdict))):
            sizes = [value / gap.tolerance for value in (gap.gap, gap.low, gap.high, gap.chance)]
            name = f"{in_words(gap.figure)}{' (the measure itself)' if gap.of_measure else ''}"
            rows.append((name, *sizes, INKS[LIGHTS[gap.verdict]]))
        if rows:
            drawn[_picture(grouping)] = figures.forest(rows, f"gap by {in_words(grouping)}, in units of its tolerance")
    return drawn


def subgroup_sections(
    gaps: Sequence[Gap], pictures: Mapping[str, str] | None = None, units: Mapping[str, str] | None = None
) -> list[Section]:
    """One section for each covariate that people are grouped by.

    Args:
        gaps: to be shown.
        pictures: of `draw`, name -> data: URI, before tables that are then folded; None: tables only.
        units: of covariates, by name.
    """
    found, order = [], list(LIGHTS)
    for grouping in dict.fromkeys(gap.grouping for gap in gaps):
        own = [gap for gap in gaps if gap.grouping == grouping]
        labels = list(dict.fromkeys(group.label for gap in own for group in gap.groups))
        sizes = {group.label: group.people for group in own[0].groups}
        rows = []
        for gap in sorted(own, key=lambda gap: min(order.index(gap.verdict), 2)):
            by_label = {group.label: group for group in gap.groups}
            cells = [_group(by_label.get(label), sizes) for label in labels]
            size = with_interval(gap.gap, (gap.low, gap.high))
            rows.append(
                [_title(gap.figure, units or {}), *cells, size, number(gap.chance), number(gap.tolerance), gap.verdict]
            )
        text = f"People in each group: {', '.join(f'{label}: {n}' for label, n in sizes.items())}."
        if small := [f"{label} ({n})" for label, n in sizes.items() if n < MIN_GROUP]:
            text += f" Not tested, with fewer than {MIN_GROUP} people: {', '.join(small)}."
        table = {"columns": ["figure", *labels, "gap", "by chance", "tolerance", "verdict"], "rows": rows}
        section = Section(f"Subgroup analysis by {in_words(grouping)}", text, table, lights=LIGHTS, note=NOTE)
        if pictures is not None:
            section.fold = f"Table of all {len(rows)} figures"
            if any(map(_is_drawn, own)):
                section.pictures = [picture(pictures, _picture(grouping), CAPTION)]
            if untested := sum(not math.isfinite(gap.gap) for gap in own):
                section.text += f" {untested} of {len(own)} figures could not be tested, as too few groups are large enough."
        found.append(section)
    return found


def _is_drawn(gap: Gap) -> bool:
    """Whether it could be tested, and has a unit."""
    return math.isfinite(gap.gap) and gap.tolerance > 0


def _picture(grouping: str) -> str:
    return f"gaps-{grouping}"


def _title(figure: str, units: Mapping[str, str]) -> str:
    """A score in words, errors with their unit."""
    unit = units.get(figure.split(",")[0], "") if figure.endswith((": MAE", ": bias")) else ""
    return in_words(figure) + (f" ({unit})" if unit else "")


def _group(group: Group | None, sizes: dict[str, int]) -> str:
    """Its value, half of its 95% interval, and its people if they are not all of the group's."""
    if group is None:
        return "none"
    some = f"\n(of {group.people} people)" if group.people != sizes.get(group.label) else ""
    return f"{number(group.value)} ± {number((group.high - group.low) / 2)}{some}"


def summary(gaps: Sequence[Gap]) -> list[str]:
    """Gaps for the terminal."""
    lines = [
        f"{gap.verdict} by {gap.grouping}: {gap.figure}, {gap.worst} and {gap.best} differ by {gap.gap:.3g}"
        for gap in gaps
        if gap.verdict in (GAP, SMALL_GAP)
    ]
    explained = "(minus real: the error on generated volumes minus that of the measure on real volumes of the same covariates)"
    return [*lines, explained] if any("minus real" in line for line in lines) else lines
