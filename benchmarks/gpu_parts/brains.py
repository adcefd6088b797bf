"""Part 3: configs/brains-3mm.yaml, wider and with ten times the samples, from data to figures."""

from functools import partial
from pathlib import Path
from typing import Any

import sampling
import torch

from gpu_parts.part import Part
from gpu_parts.speed import SMALL
from gpu_parts.training import encode_all, fit, make_data, pictures, throughput, write_config
from ldm3d.config.read import load_config
from ldm3d.config.sections import Config
from ldm3d.data.preparing import load_prepared
from ldm3d.evaluation.assess import evaluate
from ldm3d.experiment import scans_by_use
from ldm3d.metrics.features import RandomFeatures
from ldm3d.pipeline import Pipeline
from ldm3d.report.sections.evaluation import summary
from ldm3d.report.write import write_report
from ldm3d.rulers.volumetry import measure_volumes

SUBJECTS, GENERATED, COMPARED = 800, 64, 16  # phantoms; volumes that are evaluated; of each sampler
QUIET = {"log_every": 50, "validate_every": 500, "preview_every": 10**6, "checkpoint_every": 1000}
# Ten times the samples of the config: 60,000 and 640,000. Batches fill a GPU; four processes read
WIDER = {
    "autoencoder": {"network": {"channels": [64, 128]}, "training": {**QUIET, "steps": 3750, "batch_size": 16, "workers": 4}},
    "diffusion": {
        "network": {"channels": [64, 128, 256], "blocks": [1, 2, 3], "attention": [False, True, True]},
        "start": {"components": 48},
        "training": {**QUIET, "steps": 10000, "batch_size": 64, "learning_rate": 2e-3, "ema": 0.999, "workers": 4},
    },
}
FEW = {"steps": 6, "batch_size": 2, "log_every": 1, "validate_every": 6, "checkpoint_every": 6, "workers": 0}
if not torch.cuda.is_available():  # convolutions of so small latents are NaN in bfloat16 on some CPUs
    FEW["mixed_precision"] = "no"
TINY = {
    "data": {"grid": {"shape": [16, 20, 16], "spacing_mm": 12}, "splits": {"validation": 0.2, "test": 0.3}},
    "autoencoder": {"network": {"channels": [4, 8]}, "linear_path_steps": 2, "training": FEW},
    "diffusion": {
        "network": {"channels": [8, 16, 16], "blocks": 1, "attention": [False, False, True], "head_channels": 8},
        "training": FEW,
    },
    "generation": {"sampler": "unipc", "steps": 2, "guidance": 1.5},
}


def work(part: Part, work: Path, data: Path | None) -> None:
    """Each item needs what the one before has made."""
    folder = work / "brains-3mm"
    path = write_config(SMALL, folder, data, TINY if part.dry else WIDER)
    config = load_config(path)
    for name, call in (
        ("data", lambda: make_data(config, *((14, 1) if part.dry else (SUBJECTS,)))),
        ("autoencoder", fit(part, "autoencoder", path, 150 if part.dry else 130)),
        ("encode", partial(encode_all, path)),
        ("diffusion", fit(part, "diffusion", path, 150 if part.dry else 190)),
    ):
        if part.do(name, call) is None:
            return
    part.do("pictures", partial(pictures, part, config, 2 if part.dry else 6))
    for group in (1, 2) if part.dry else (1, 8, 32, 64):
        part.do(f"volumes in groups of {group}", partial(draw, config, group))
    part.do("evaluate", partial(figures_of, part, config, folder / "work"), needs=0 if part.dry else 60)
    if any(c.name == sampling.ASKED for c in config.covariates):
        part.do("samplers", partial(samplers, part, config), needs=0 if part.dry else 90)


def draw(config: Config, group: int) -> dict[str, Any]:
    return throughput(Pipeline.from_pretrained(config.model_folder), group)


def figures_of(part: Part, config: Config, work: Path) -> dict[str, Any]:
    """What `ldm3d evaluate` finds, with its page, pictures and metrics.json in the results."""
    pipeline = Pipeline.from_pretrained(config.model_folder)
    _, _, scans = scans_by_use(config.model_folder, Path(config.data.bids), work)
    scans = scans.head(4 if part.dry else GENERATED)
    subjects = scans[pipeline.schema.names].to_dict("records")
    count = 4 if part.dry else GENERATED
    options = {"num_generated": count, "extractor": RandomFeatures(), "people": list(scans["subject"])}

    def load(i: int):
        return load_prepared(config, scans["key"][i])

    found = evaluate(pipeline, subjects, load, measure_volumes, pipeline.sampling, **options)
    found.analyse_subgroups(pipeline.schema)
    write_report(part.folder / "evaluation", "brains at 3 mm on a GPU", pipeline, found, pipeline.sampling)
    return {"text": summary(found).splitlines()}


def samplers(part: Part, config: Config) -> dict[str, Any]:
    """benchmarks/sampling.py on this model."""
    pipeline = Pipeline.from_pretrained(config.model_folder)
    pipeline.threads = None
    if part.dry:
        return {"rows": sampling.compare(pipeline, 4, (3,), converged=4, chain=5)}
    return {"rows": sampling.compare(pipeline, COMPARED, sampling.QUICK_CALLS)}
