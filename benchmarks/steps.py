"""How many steps are worth their time? Nearness to real volumes, by `ldm3d evaluate`'s features, against steps and guidance.

    python benchmarks/steps.py MODEL --data DIR [--volumes 100] [--try unipc:10:1.5 ...]

`sampling.py` asks how near a sampler comes to DDPM with 1,000 steps of the same model; this, whether that matters: the
model's own error may be larger. Volumes are generated for the covariates of held-out subjects, from the same noise in all
settings, and compared with those subjects' volumes.
"""

import argparse
import time
from pathlib import Path

from protocol import write
from torch import Tensor

from ldm3d.data.preparing import load_prepared
from ldm3d.experiment import scans_by_use
from ldm3d.metrics import distances as distribution
from ldm3d.metrics.features import extract, load_extractor, standardise
from ldm3d.pipeline import Pipeline
from ldm3d.precision import dtype
from ldm3d.processes import own_device
from ldm3d.rulers.volumetry import apply_measure, measure_volumes
from ldm3d.statistics.agreement import agreement

TRIED = [
    f"{sampler}:{steps}:{guidance}"
    for guidance in (1.5, 2.0)
    for sampler, steps in (("unipc", 10), ("unipc", 20), ("unipc", 40), ("ddpm", 40))
]
ASKED = "ventricular_volume_ml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a trained pipeline's folder")
    parser.add_argument("--data", type=Path, required=True, help="BIDS folder with held-out subjects")
    parser.add_argument("--volumes", type=int, default=100, help="of each setting, and real ones at most")
    parser.add_argument("--try", dest="tried", nargs="+", default=TRIED, metavar="SAMPLER:STEPS:GUIDANCE")
    arguments = parser.parse_args()
    where = own_device()
    pipeline = Pipeline.from_pretrained(arguments.model, where, dtype("auto", where))
    pipeline.threads = None  # all
    config, _, held_out = scans_by_use(arguments.model, arguments.data, arguments.model.parent / "benchmark-work")
    subjects = pipeline.parse(held_out[pipeline.schema.names].to_dict("records"))
    requests = [subjects[i % len(subjects)] for i in range(arguments.volumes)]
    extractor, rows = load_extractor("random"), []
    real = extract((pipeline.cropped(load_prepared(config, key)) for key in held_out["key"][: arguments.volumes]), extractor)
    print(f"{'sampler':>9} {'steps':>5} {'guidance':>8} {'s/volume':>8} {'Fréchet':>8} {'kernel':>8} {'r':>6} {'slope':>6}")
    for setting in arguments.tried:
        sampler, steps, guidance = setting.split(":")
        sampling = pipeline.sampling.replace(sampler=sampler, steps=int(steps), guidance=float(guidance))
        started = time.perf_counter()
        volumes = [volume.copy() for volume in pipeline.volumes(requests, sampling)]
        row = {"sampler": sampler, "steps": int(steps), "guidance": float(guidance), "volumes": len(volumes)}
        row["seconds"] = (time.perf_counter() - started) / len(volumes)
        row |= nearness(real, extract(volumes, extractor))
        measured = [apply_measure(measure_volumes, volume, pipeline.grid.spacing_mm)[ASKED] for volume in volumes]
        found = agreement([request[ASKED] for request in requests], measured)
        rows.append(row | {"r": found.r, "slope": found.slope, "model": config.name})
        print(
            f"{sampler:>9} {steps:>5} {guidance:>8} {row['seconds']:8.3f} {row['frechet']:8.1f} {row['kernel']:8.2f} "
            f"{found.r:6.3f} {found.slope:6.3f}",
            flush=True,
        )
    print(write(f"steps-{config.name}", rows))


def nearness(real: Tensor, synthetic: Tensor) -> dict[str, float]:
    """Fréchet and kernel distance of two sets of features, (N, D) and (M, D)."""
    pair = standardise(real, synthetic)
    return {"frechet": distribution.frechet_distance(*pair), "kernel": distribution.kernel_distance(*pair)}


if __name__ == "__main__":
    main()
