"""How near volumes of a model that is given images come to each subject's own truth, on the page."""

from collections.abc import Mapping

from ldm3d import figures
from ldm3d.evaluation.label_maps import SCORES
from ldm3d.evaluation.truth import ANSWERS, FIGURES, MEAN, ONE_STEP, SAMPLE, SAMPLES, SIMPLER, VARIES, Truth
from ldm3d.pipeline import Pipeline
from ldm3d.report.page import Goal, Section, picture, with_interval

MOST_BEHIND_DB = 0.3  # of the mean of the samples, behind the best simpler answer
HELD_LOW, HELD_HIGH = 0.85, 0.95  # of voxels whose truth lies in the 90% interval
SHOWN = ("given", SAMPLE, MEAN, ONE_STEP, "truth")


def lights(found: Truth | None) -> list[Goal]:
    """Of the mean beside the best simpler answer, and of calibration; none for a model without images."""
    if found is None:
        return []
    best = best_simpler(found)
    behind, ends = found.beyond(best)
    held, held_ends = found.held()
    return [
        Goal(f"{MEAN[0].upper()}{MEAN[1:]}: PSNR minus that of {best}", behind, -MOST_BEHIND_DB, unit="dB", interval=ends),
        Goal("Truth within the 90% interval of samples, share of voxels", held, HELD_LOW, HELD_HIGH, interval=held_ends),
    ]


def best_simpler(found: Truth) -> str:
    """The simpler answer with the highest PSNR."""
    return max((name for name in SIMPLER if name in found.answers), key=lambda name: found.mean(name, FIGURES[0])[0])


def section(found: Truth, pictures: Mapping[str, str]) -> Section:
    """Distortion and calibration."""
    rows = [[name, *(with_interval(*found.mean(name, figure)) for figure in FIGURES), ANSWERS[name]] for name in found.answers]
    held, (low, high) = found.held()
    return Section(
        "Beside each person's own truth",
        f"{SAMPLES} volumes were generated from the images of each of {len(found.scans)} held-out scans. Figures are of the "
        "foreground of the truth or, where voxels are missing in what is given, of those. The mean of many samples is the "
        "answer with the smallest error; a single sample shows what is possible, so its error is larger. Where a simpler "
        "answer is nearer than that mean and one answer is enough, the simpler one is the better tool.",
        {"columns": ["answer", "PSNR (dB)", "SSIM", "mean absolute error", "what it is"], "rows": rows},
        labels=1,
        pictures=[picture(pictures, "truth", "What is given, and answers. Samples, their mean and one step are synthetic.")],
        note=f"Calibration: 90% intervals of the samples hold the truth in {100 * held:.0f}% ({100 * low:.0f} to "
        f"{100 * high:.0f}%) of the voxels that vary (standard deviation above {VARIES:g}). Continuous ranked probability "
        f"score {found.crps.mean():.4f}, in units of the mean absolute error, which it would be for samples that do not vary; "
        f"their standard deviation is {found.deviation.mean():.4f}.{of_labels(found)}",
    )


def of_labels(found: Truth) -> str:
    """What is said of label maps; nothing for a model that makes images."""
    said = (f"{SCORES[name]} {with_interval(*each.values())}".replace("\n", " ") for name, each in found.of_labels().items())
    return f" Label maps: {'; '.join(said)}." if found.labels.size else ""


def draw(pipeline: Pipeline, found: Truth | None) -> dict[str, figures.Figure]:
    """The picture of the section: a row for each of the first people."""
    if found is None or not found.shown:
        return {}
    volumes = [volume[:1] for shown in found.shown for volume in shown]
    titles = [*SHOWN] * len(found.shown)
    return {"truth": figures.mosaic(volumes, titles, pipeline.grid.spacing_mm, columns=len(SHOWN))}


def summary(found: Truth | None) -> list[str]:
    """For the terminal."""
    if found is None:
        return []
    lines = [f"beside the truth of {len(found.scans)} scans: {'PSNR (dB)':>12} {'SSIM':>7} {'MAE':>8}"]
    for name in found.answers:
        psnr, ssim, mae = (found.mean(name, figure)[0] for figure in FIGURES)
        lines.append(f"  {name:32} {psnr:10.2f} {ssim:7.3f} {mae:8.4f}")
    held = 100 * found.held()[0]
    return [*lines, f"  90% intervals of {SAMPLES} samples hold the truth in {held:.0f}% of the voxels that vary"]
