"""The self-contained HTML page that an evaluation leaves behind, with metrics.json and the pictures beside it."""

import datetime
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import ldm3d
from ldm3d import figures
from ldm3d.covariates import describe
from ldm3d.evaluation.fidelity import Evaluation
from ldm3d.evaluation.measures import AS_REAL, CLOSER, MEASURES, UNDECIDED, WORSE
from ldm3d.pipeline import Pipeline, Sampling

# The page's colour for a verdict
VERDICTS = {AS_REAL: "yes", WORSE: "no", CLOSER: "amber", UNDECIDED: "grey"}
METRICS, PAGE, FIDELITY = "metrics.json", "report.html", "fidelity.tsv"


@dataclass(frozen=True)
class Goal:
    """A figure and what it should be: at least `low`, at most `high`."""

    name: str
    found: float
    low: float = -np.inf
    high: float = np.inf
    unit: str = ""

    @property
    def reached(self) -> bool:
        return bool(self.low <= self.found <= self.high)

    @property
    def wanted(self) -> str:
        if np.isinf(self.high):
            return f"at least {self.low:g} {self.unit}".strip()
        return f"{self.low:g} to {self.high:g} {self.unit}".strip()

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "wanted": self.wanted, "found": self.found, "reached": self.reached}


@dataclass
class Section:
    """One heading of the page: a text, a table whose first `labels` columns are text, pictures, and plots side by side."""

    title: str
    text: str = ""
    table: dict[str, list] | None = None
    labels: int = 1
    pictures: list[dict[str, str]] = field(default_factory=list)
    plots: list[dict[str, str]] = field(default_factory=list)


def write_report(
    folder: Path,
    title: str,
    pipeline: Pipeline,
    evaluation: Evaluation,
    sampling: Sampling,
    goals: Sequence[Goal] = (),
) -> Path:
    """Write report.html, metrics.json, fidelity.tsv and every picture as PNG.

    Args:
        folder: is made if it is not there.
        title: of the page.
        pipeline, evaluation, sampling: what was evaluated, what was found, how it was generated.
        goals: for the summary at the top; none leaves it out.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(pipeline, evaluation)
    for name, figure in pictures.items():
        figures.save(figure, folder / f"{name}.png")
    fidelity = pd.DataFrame(evaluation.to_dict()["fidelity"])
    fidelity.to_csv(folder / FIDELITY, sep="\t", index=False)
    provenance = _provenance(pipeline, sampling)
    metrics = evaluation.to_dict() | {"goals": [goal.to_dict() for goal in goals], "provenance": provenance}
    (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
    environment = jinja2.Environment(loader=jinja2.PackageLoader("ldm3d", ""), autoescape=True)
    page = environment.get_template("report.html").render(
        title=title,
        subtitle=f"ldm3d {ldm3d.__version__}, {provenance['made'][:10]}",
        goals=[{**goal.to_dict(), "found": f"{goal.found:.3f} {goal.unit}".strip()} for goal in goals],
        sections=_sections(evaluation, fidelity, pictures),
        provenance=provenance,
        verdicts=VERDICTS,
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
    return folder / PAGE


def _sections(evaluation: Evaluation, fidelity: pd.DataFrame, pictures: dict[str, Figure]) -> list[Section]:
    """What the page says, in its order."""

    def picture(name: str, caption: str) -> dict[str, str]:
        return {"source": figures.to_data_uri(pictures[name]), "caption": caption}

    mean, deviation = evaluation.psnr_db.mean(), evaluation.psnr_db.std()
    return [
        Section(
            "Generated for the covariates of held-out subjects",
            "Above, held-out subjects; below, volumes generated for their covariates. They need not look alike beyond "
            "what was asked.",
            pictures=[picture("generated", "Axial, coronal and sagittal slices.")],
        ),
        Section(
            "Covariates, asked and measured",
            "Measured on the images. The rows named real say how well the measure itself agrees with the table, those named "
            "reconstructed what the autoencoder keeps; generated volumes are compared with what they were asked for.",
            table=_rounded(fidelity),
            labels=2,
            plots=[
                picture(f"scatter-{c.covariate}-{c.kind}", f"{c.covariate} on {c.kind} volumes")
                for c in evaluation.comparisons
            ],
        ),
        *_likeness(evaluation),
        *(
            Section(
                f"Only {sweep.covariate} asked",
                "All other covariates are left open, and every column starts from the same noise. Lines are means over "
                "noises, bands their range.",
                pictures=[picture(f"sweep-{sweep.covariate}", f"The first noise at each {sweep.covariate}. Synthetic.")],
                plots=[picture(f"curve-{sweep.covariate}-{name}", f"measured {name}") for name in sweep.measured],
            )
            for sweep in evaluation.sweeps
        ),
        Section(
            "Reconstruction of held-out volumes",
            f"PSNR {mean:.2f} dB (standard deviation {deviation:.2f}), SSIM {evaluation.ssim.mean():.3f}, over "
            f"{len(evaluation.psnr_db)} volumes.",
            pictures=[picture("reconstructions", "Held-out originals, and the same after the autoencoder.")],
        ),
    ]


def _likeness(evaluation: Evaluation) -> list[Section]:
    """The distribution of generated volumes beside that of held-out ones; nothing where it was not measured."""
    if not evaluation.likeness:
        return []
    rows = []
    for finding in evaluation.likeness:
        known = MEASURES[finding.name]
        value = f"{finding.value:.3g} ({finding.low:.3g} to {finding.high:.3g})"
        null = f"{finding.null_low:.3g} to {finding.null_high:.3g}"
        rows.append([known.title, known.says, value, null, f"{finding.real} + {finding.synthetic}", finding.verdict])
    text = (
        "Each figure with its 95% interval, beside what real volumes reach against other real volumes in the same numbers. "
        "Worse than real: outside of that. As real: the whole interval within it, widened by a quarter on either side, with "
        "50 volumes or more on each. Closer than real: better than real volumes are to each other; look for copies. Else "
        "these volumes are too few to tell."
    )
    columns = ["measure", "what it sees", "synthetic", "real", "volumes", "verdict"]
    return [Section("Are they like real volumes?", text, {"columns": columns, "rows": rows}, labels=2)]


def _provenance(pipeline: Pipeline, sampling: Sampling) -> dict[str, str]:
    """How it was made."""
    return {
        "model": pipeline.model_hash,
        "grid": f"{' x '.join(map(str, pipeline.grid.shape))} voxels of {pipeline.grid.spacing_mm} mm",
        "diffusion": f"{pipeline.process.kind}, target {pipeline.target}",
        "sampling": ", ".join(f"{key} {value}" for key, value in sampling.to_dict().items() if value is not None),
        "parameters": f"{_count(pipeline.autoencoder):,} autoencoder, {_count(pipeline.unet):,} U-Net",
        "versions": f"ldm3d {ldm3d.__version__}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "monai", "accelerate", "nibabel")),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def summary(found: Evaluation) -> str:
    """What was found, as a table for the terminal."""
    lines = [
        f"reconstruction: PSNR {found.psnr_db.mean():.2f} dB, SSIM {found.ssim.mean():.3f} on {len(found.psnr_db)} volumes",
        f"{'covariate':24} {'volumes':14} {'n':>4} {'r':>7} {'slope':>7} {'bias':>9} {'MAE':>8}",
    ]
    for c in found.comparisons:
        a = c.agreement
        lines.append(f"{c.covariate:24} {c.kind:14} {a.n:4} {a.r:7.3f} {a.slope:7.3f} {a.bias:9.2f} {a.mae:8.2f}")
    for finding in found.likeness:
        real = f"(real: {finding.null_low:.3g} to {finding.null_high:.3g})"
        lines.append(f"{MEASURES[finding.name].title:32} {finding.value:9.3g} {real:28} {finding.verdict}")
    return "\n".join(lines)


def draw(pipeline: Pipeline, evaluation: Evaluation) -> dict[str, Figure]:
    """Every picture of the page, by name."""
    spacing = pipeline.grid.spacing_mm
    columns = min(3, len(evaluation.real))
    titles = [f"{kind}: {describe(row)}" for kind in ("real", "synthetic") for row in evaluation.requests[:columns]]
    shown = evaluation.real[:columns] + evaluation.generated[:columns]
    found = {"generated": figures.mosaic(shown, titles, spacing, columns)}
    qualities = [f"{quality:.1f} dB" for quality in evaluation.psnr_db]
    shown = evaluation.real[:columns] + evaluation.reconstructed[:columns]
    found["reconstructions"] = figures.mosaic(shown, ["original"] * columns + qualities[:columns], spacing, columns)
    for c in evaluation.comparisons:
        name = "asked" if c.kind == "generated" else "true"
        label, title = pipeline.schema[c.covariate].label, f"{c.kind}: r = {c.agreement.r:.3f}"
        figure = figures.scatter(c.reference, c.measured, f"{name} {label}", f"measured {label}", title)
        found[f"scatter-{c.covariate}-{c.kind}"] = figure
    for s in evaluation.sweeps:
        covariate = pipeline.schema[s.covariate]
        titles = [f"{s.covariate} {value:g} {covariate.unit}" for value in s.values]
        found[f"sweep-{s.covariate}"] = figures.mosaic(s.volumes, titles, spacing, columns=3)
        for name, values in s.measured.items():
            title = f"rank correlation {s.rank_correlation[name]:.2f}"
            figure = figures.lines(s.values, {name: values}, f"asked {covariate.label}", f"measured {name}", title)
            found[f"curve-{s.covariate}-{name}"] = figure
    return found


def _rounded(frame: pd.DataFrame) -> dict[str, list]:
    rows = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in frame.itertuples(index=False)]
    return {"columns": list(frame.columns), "rows": rows}


def _count(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
