"""What the page of an evaluation says of likeness: are generated volumes, and reconstructed ones, like real ones?"""

from collections.abc import Sequence

from ldm3d.evaluation.realism_metrics import REALISM_METRICS
from ldm3d.report.page import AMBER, GREEN, GREY, RED, Goal, Section
from ldm3d.statistics.equivalence import BEYOND, CLOSER, ENOUGH, FEW, WITHIN, Finding

LIKENESS = {WITHIN: GREEN, BEYOND: RED, CLOSER: AMBER, FEW: GREY}  # the page's lights for verdicts


def light(findings: Sequence[Finding]) -> Goal:
    """One for all measures: green if those that decide are within their margins, and no other is beyond it or closer."""
    verdicts = [finding.verdict for finding in findings]
    deciding = [finding.verdict for finding in findings if REALISM_METRICS[finding.name].decides]
    colour = next((LIKENESS[v] for v in (BEYOND, CLOSER) if v in verdicts), GREY if FEW in deciding or not deciding else GREEN)
    words = ", ".join(f"{verdicts.count(v)} {v}" for v in LIKENESS if v in verdicts)
    return Goal("Measures of likeness beyond the margin", verdicts.count(BEYOND), high=0, judged=(colour, words))


def sections(generated: Sequence[Finding], reconstructed: Sequence[Finding]) -> list[Section]:
    """The distribution of generated volumes beside that of held-out ones; nothing where it was not measured."""
    if not generated:
        return []
    again = {finding.name: finding for finding in reconstructed}
    rows = []
    for finding in generated:
        known = REALISM_METRICS[finding.name]
        null = f"{finding.null_low:.3g}\nto {finding.null_high:.3g}\nmargin {finding.margin:.3g}"
        title = f"{known.title} *" if known.decides else known.title
        rows.append([f"{title}: {known.says}", *_beside(finding), *_beside(again.get(finding.name)), null])
    text = (
        "Reconstructed against real: the same held-out volumes after the autoencoder alone. Where these are beyond the margin "
        "too, look at the autoencoder first; where only generated ones are, at the diffusion. Each figure with its 95% "
        "interval; in the last column what real volumes reach against other real volumes in the same numbers. Below it, by "
        "how much it differs from that on average, with a 90% interval."
    )
    note = (
        f"{WITHIN.capitalize()} (green): the whole 90% interval lies within the margin, with {ENOUGH} volumes or pairs or "
        f"more on each side. {BEYOND.capitalize()} (red): all of it lies beyond. {CLOSER.capitalize()} (amber): better than "
        f"real volumes are to each other; look for copies, and for too little variety. {FEW.capitalize()} (grey): the "
        "interval reaches over the end of the margin. Margins: of distances, what they say of real volumes that are all "
        "moved by a quarter of the standard deviation between people; of similarities of pairs, what a tenth less difference "
        "between the two does; of the others a tenth of what real volumes reach. The light is green if all measures with "
        "an asterisk are within the margin and no other is beyond it or closer."
    )
    table = {"columns": ["measure", "generated", "verdict", "reconstructed", "verdict", "real"], "rows": rows}
    return [Section("Are they like real volumes?", text, table, 1, lights=LIKENESS, note=note)]


def _beside(finding: Finding | None) -> tuple[str, str]:
    """A figure with its interval, numbers and excess, and its verdict; where there is none, that."""
    if finding is None:
        return "not taken", ""
    numbers = f"{finding.real} + {finding.synthetic}"
    if finding.needed:
        numbers += f"\nabout {finding.needed} would tell"
    figure = f"{finding.value:.3g}\n({finding.low:.3g} to {finding.high:.3g})"
    excess = f"{finding.excess:+.3g}\n({finding.excess_low:+.3g} to {finding.excess_high:+.3g})"
    return f"{figure}\n{excess}\n{numbers}", finding.verdict
