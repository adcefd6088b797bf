"""Hashes of what small trainings and a generation end with: equal lines before and after a change of the code mean equal bits.

    python benchmarks/same_numbers.py [--repository OTHER_CHECKOUT]

Takes three minutes. Hashes compare on one machine only, for kernels differ between processors.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib

CONFIG = """
name: same-numbers
output: first
data: {bids: data, grid: {shape: [24, 28, 24], spacing_mm: 7.5}, splits: {validation: 0.2, test: 0.25, seed: 18}}
covariates:
  - {name: age, kind: continuous, range: [0, 120]}
  - {name: sex, kind: categorical, categories: [F, M]}
autoencoder:
  network: {latent_channels: 3, downsampling: 4, channels: [8, 16], blocks: 1}
  linear_path_steps: 10
  training: &training {optimizer: muon, steps: 4, batch_size: 4, learning_rate: 1e-3, mixed_precision: no, warmup_steps: 2,
                       log_every: 1, validate_every: 2}
diffusion:
  network: {channels: [16, 32], attention: [no, yes], head_channels: 16, context_dim: 16}
  training: {<<: *training, optimizer: adamw}
decoder: {training: *training}
generation: {sampler: unipc, steps: 3, guidance: 1.5}
"""
ACCUMULATION = ["training.accumulation=2"]
ADVERSARY = ["adversarial={weight: 0.01, start: 1, channels: 4, layers: 1}"]
BEST = ["training.keep=best", "training.validate_every=1"]
VDM = ["process={kind: vdm}", "time_sampling={kind: uniform}"]
# Stage, what is different from the config, settings, processes. The plain ones make what the next stage starts from.
CASES = [
    ("autoencoder", "", [], 1),
    ("autoencoder", "accumulation", ACCUMULATION, 1),
    ("autoencoder", "adversary", ADVERSARY, 1),
    ("diffusion", "", [], 1),
    ("diffusion", "accumulation", ACCUMULATION, 1),
    ("diffusion", "best", BEST, 1),
    ("diffusion", "vdm", VDM, 1),
    ("diffusion", "two processes", [], 2),
    ("decoder", "", [], 1),
    ("decoder", "adversary", ADVERSARY, 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path(__file__).parents[1], help="whose code is run")
    repository = parser.parse_args().repository.resolve()
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.yaml").write_text(CONFIG)

        def run(*command: object, processes: int = 1) -> None:
            launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", processes]
            words = [str(word) for word in (sys.executable, *launcher, "-m", *command)]
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(words)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")

        run("ldm3d", "phantoms", "data", "--subjects", 20, "--shape", 24, 28, 24)
        run("ldm3d", "prepare", "config.yaml")
        for stage, difference, settings, processes in CASES:
            output = f"{stage} {difference}" if difference else "first"
            if difference:
                shutil.copytree(folder / "first", folder / output, ignore=shutil.ignore_patterns(f"{stage}-training"))
            module = f"ldm3d.training.{stage}"
            overrides = [word for setting in (f"output={output}", *settings) for word in ("--set", setting)]
            run(module, "config.yaml", *overrides, processes=processes)
            training = folder / output / f"{stage}-training"
            (weights,) = training.glob("checkpoints/step-*4/*.safetensors")
            report(f"{stage} {difference}", weights, training / "metrics.jsonl")
            if (stage, difference) == ("autoencoder", ""):
                run("ldm3d", "encode", "config.yaml")
        run("ldm3d", "generate", "first/model", "--out", "volumes", "--num", 3, "--age", 60, "--no-check")
        report("volumes", *sorted((folder / "volumes").rglob("*.nii.gz")))


def report(title: str, *files: Path) -> None:
    """One line: eight digits of the SHA-256 of each file, or of its voxels."""
    contents = (nib.load(file).get_fdata().tobytes() if file.name.endswith(".gz") else file.read_bytes() for file in files)
    print(f"{title:26}", *(hashlib.sha256(content).hexdigest()[:8] for content in contents), flush=True)


if __name__ == "__main__":
    main()
