"""What applications take in memory and time on volumes of full size, with networks that are not trained.

    python benchmarks/applications.py [--config configs/brain-1mm.yaml] [--steps 2] [--parts gradient]

Each in its own process, on one thread: a scan placed and encoded, a decode with gradients, the way back to the scan's voxels,
an edit by the method ode, a scan restored from missing slices by one draw of one level, a healthy counterpart likewise, the
calibration of anomalies by 40 people (of made-up residuals) and a scan judged by it, the template of three volumes with one
round of registration, and a film over eight templates.
"""

import argparse
import json
import time

import numpy as np
import protocol
import torch
from numpy.typing import NDArray

from ldm3d.applications.atlas import film, template_of
from ldm3d.applications.calibration import Calibration
from ldm3d.config.read import load_config
from ldm3d.data.nifti import to_image
from ldm3d.data.placing import grid_of
from ldm3d.diffusion.schedules import make_process
from ldm3d.models.pretrained import make_network
from ldm3d.pipeline import Pipeline

PARTS = ("encode", "gradient", "back", "edit", "restore", "counterpart", "calibrate", "template", "film")
PEOPLE, TEMPLATES = 40, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/brain-1mm.yaml")
    parser.add_argument("--steps", type=int, default=2, help="of the edit: time grows with them, memory does not")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(perform(**arguments.task)))
        return
    rows = []
    for part in arguments.parts:
        task = {"part": part, "config": arguments.config, "steps": arguments.steps}
        rows.append({"part": part, **protocol.in_own_process(__file__, task, 3600, 12.0)})
        print(json.dumps(rows[-1]), flush=True)
    file = protocol.RESULTS / "applications-cpu.json"
    before = json.loads(file.read_text())["rows"] if file.is_file() else []
    of_parts = {row["part"]: row for row in before + rows}  # parts that were not asked stay as they are
    protocol.write("applications", [of_parts[part] for part in PARTS if part in of_parts])


def perform(part: str, config: str, steps: int) -> dict:
    """Seconds, and GB at the peak with everything that is loaded."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = load_config(config, ["data.bids=."])
    schema = settings.schema().fit([{"age": age, "sex": sex, "ventricular_volume_ml": age, "brain_volume_ml": 900 + age}
                                    for age, sex in ((20, "F"), (80, "M"))])  # fmt: skip
    autoencoder = make_network("Autoencoder", **settings.autoencoder.network.model_dump())
    latents = autoencoder.latent_channels
    of_data = {"in_channels": latents, "out_channels": latents, "num_categories": schema.num_categories}
    unet = make_network("UNet", **of_data, **settings.diffusion.network.model_dump())
    grid = grid_of(settings.data.grid)
    pipe = Pipeline(autoencoder.eval(), unet.eval(), schema, grid, make_process("flow"), "v")
    scan = np.random.default_rng(0).random((1, *grid.shape), np.float32)
    scan[:, :20], scan[:, -20:] = 0, 0
    image = to_image(scan, grid.affine)
    placed = pipe.encode(image) if part not in ("encode", "calibrate", "template", "film") else None

    def gradient() -> None:
        z = placed.z.clone().requires_grad_()
        pipe.decode(z).square().sum().backward()
        assert z.grad.isfinite().all()

    def calibrate() -> None:
        residuals = [_made_up(grid.shape, number) for number in range(PEOPLE)]
        found = Calibration.fit(residuals, [scan[0]] * PEOPLE, {})
        score = found.score(residuals[0])
        assert found.p_values(score).max() == 1 and len(found.clusters(score)) == 2

    calls = {
        "encode": lambda: pipe.encode(image),
        "gradient": gradient,
        "back": lambda: placed.back(placed.reconstruction),
        "restore": lambda: pipe.restore(placed, "missing=z:40-60", samples=1, levels=1).image(),
        "counterpart": lambda: pipe.counterpart(placed, {"age": 60}, strengths=(0.5,), steps=1, samples=1, levels=1).image(),
        "calibrate": calibrate,
        "template": lambda: template_of(lambda: (_made_up(grid.shape, number) for number in range(3)), rounds=1),
        "film": lambda: film(range(TEMPLATES), [_made_up(grid.shape, number) for number in range(TEMPLATES)]),
        "edit": lambda: pipe.edit(placed, {"age": 60}, age="+10", steps=steps).back(),
    }
    start = time.perf_counter()
    calls[part]()
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(protocol.memory_of("self", "VmHWM"), 2)}


def _made_up(shape: tuple[int, ...], number: int) -> NDArray:
    return np.random.default_rng(number).random(shape, np.float32)


if __name__ == "__main__":
    main()
