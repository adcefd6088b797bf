"""Realism on the page: do generated volumes, and reconstructed ones, look like real ones?"""

from collections.abc import Sequence

from ldm3d.evaluation.realism_metrics import REALISM_METRICS
from ldm3d.report.page import AMBER, GREEN, GREY, RED, Goal, Section
from ldm3d.statistics.equivalence import BEYOND, CLOSER, ENOUGH, FEW, WITHIN, Finding

LIGHTS = {WITHIN: GREEN, BEYOND: RED, CLOSER: AMBER, FEW: GREY}

TEXT = (
    "Metrics of two sets of volumes: generated against held-out volumes, and the same held-out volumes after the "
    "autoencoder. If reconstructions are beyond the margin too, look at the autoencoder first, otherwise at the diffusion "
    "model. Each figure has its 95% interval; below it, its excess over real against real with a 90% interval, and n, the "
    "numbers of real and other volumes. The last column has the 95% interval between two sets of real volumes of the same "
    "size, and the "
    "equivalence margin."
)
NOTE = (
    f"{WITHIN.capitalize()} (green): the whole 90% interval lies within the margin, with {ENOUGH} volumes or pairs or more "
    f"on each side. {BEYOND.capitalize()} (red): all of it lies outside. {CLOSER.capitalize()} (amber): better than real "
    f"volumes are to each other; look for copies, and for too little variety. {FEW.capitalize()} (grey): the margin lies in "
    "the interval. Margins: of distances, their change when real volumes are moved by a quarter of the standard deviation "
    "between people; of similarities of pairs, the effect of a tenth less difference; of others a tenth of the value of "
    "real volumes. The light is green if all metrics with an asterisk are within the margin and no other is beyond it or "
    "closer."
)


def light(findings: Sequence[Finding]) -> Goal:
    """One for all metrics: green if those that decide are within their margins, and no other is beyond it or closer."""
    verdicts = [finding.verdict for finding in findings]
    deciding = [finding.verdict for finding in findings if REALISM_METRICS[finding.name].decides]
    colour = next((LIGHTS[v] for v in (BEYOND, CLOSER) if v in verdicts), GREY if FEW in deciding or not deciding else GREEN)
    words = ", ".join(f"{verdicts.count(v)} {v}" for v in LIGHTS if v in verdicts)
    return Goal("Metrics of realism beyond the margin", verdicts.count(BEYOND), high=0, judged=(colour, words))


def sections(generated: Sequence[Finding], reconstructed: Sequence[Finding]) -> list[Section]:
    """Metrics of generated and of reconstructed volumes; none if they were not computed."""
    if not generated:
        return []
    again = {finding.name: finding for finding in reconstructed}
    rows = []
    for finding in generated:
        metric = REALISM_METRICS[finding.name]
        null = f"{finding.null_low:.3g}\nto {finding.null_high:.3g}\nmargin {finding.margin:.3g}"
        title = f"{metric.title} *" if metric.decides else metric.title
        rows.append([f"{title}: {metric.says}", *_cells(finding), *_cells(again.get(finding.name)), null])
    table = {"columns": ["metric", "generated", "verdict", "reconstructed", "verdict", "real"], "rows": rows}
    return [Section("Realism", TEXT, table, 1, lights=LIGHTS, note=NOTE)]


def _cells(finding: Finding | None) -> tuple[str, str]:
    """A figure with its interval, excess and numbers, and its verdict."""
    if finding is None:
        return "not measured", ""
    numbers = f"n = {finding.real} + {finding.synthetic}"
    if finding.needed:
        numbers += f"\nabout {finding.needed} needed"
    figure = f"{finding.value:.3g}\n({finding.low:.3g} to {finding.high:.3g})"
    excess = f"excess {finding.excess:+.3g}\n({finding.excess_low:+.3g} to {finding.excess_high:+.3g})"
    return f"{figure}\n{excess}\n{numbers}", finding.verdict


def summary(findings: Sequence[Finding]) -> list[str]:
    """Metrics for the terminal."""
    lines = []
    for finding in findings:
        real = f"(real: {finding.null_low:.3g} to {finding.null_high:.3g})"
        lines.append(f"{REALISM_METRICS[finding.name].title:32} {finding.value:9.3g} {real:28} {finding.verdict}")
    return lines
