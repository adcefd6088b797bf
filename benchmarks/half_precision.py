"""What does a model lose when its weights are saved in half precision? (what `ldm3d export` goes by)

    python benchmarks/half_precision.py MODEL [--volumes 16]

Volumes are generated from the same noise with the weights as they are and with rounded ones, computed in float32 and in
bfloat16, and compared; so are reconstructions of the generated volumes. The last rows say what computing in bfloat16 alone
changes.
"""

import argparse
import tempfile

import torch
from protocol import write
from torch import Tensor

from ldm3d.metrics.reconstruction import psnr
from ldm3d.pipeline import Pipeline
from ldm3d.shipped import model_folder

ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a trained pipeline's folder, in float32, or the name of a shipped model")
    parser.add_argument("--volumes", type=int, default=16)
    arguments = parser.parse_args()
    folder, rows = model_folder(arguments.model), []
    exact = made(Pipeline.from_pretrained(folder, "cpu", torch.float32), arguments.volumes)
    print(f"{'saved in':>9} {'computed in':>12} {'generated, dB':>14} {'largest difference':>19} {'reconstructed, dB':>18}")
    for saved in (*ROUNDED, "float32"):
        with tempfile.TemporaryDirectory() as place:
            pipeline = Pipeline.from_pretrained(folder, "cpu", torch.float32)
            pipeline.save_pretrained(place, ROUNDED.get(saved))
            for computed in ("float32", "bfloat16"):
                if saved == computed == "float32":
                    continue
                found = made(Pipeline.from_pretrained(place, "cpu", getattr(torch, computed)), arguments.volumes, exact[0])
                generated, again = (float(psnr(*sides).mean()) for sides in zip(found, exact))
                largest = float((found[0] - exact[0]).abs().max())
                rows.append({"saved": saved, "computed": computed, "psnr_db": generated, "largest": largest})
                rows[-1]["reconstructed_psnr_db"] = again
                print(f"{saved:>9} {computed:>12} {generated:14.1f} {largest:19.4f} {again:18.1f}", flush=True)
    print(write(f"half-precision-{folder.name}", rows))


def made(pipeline: Pipeline, count: int, volumes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Generated volumes (N, C, X, Y, Z), and the reconstructions of `volumes`, or else of these."""
    pipeline.threads = None  # all
    drawn = pipeline.volumes(pipeline.parse([{}] * count), pipeline.sampling)
    generated = torch.stack([torch.from_numpy(each.copy()) for each in drawn])
    return generated, pipeline.reconstruct(generated if volumes is None else volumes)


if __name__ == "__main__":
    main()
