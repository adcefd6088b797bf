"""The main job: from a BIDS folder to volumes for asked covariates, by the commands that a user types."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import SHAPE, command_line, free_port, launch, tiny_settings
from in_process import STAGES
from safetensors.torch import load_file

import ldm3d
from ldm3d.config.read import load_config
from ldm3d.data.preparing import load_prepared, read_scan_table
from ldm3d.diffusion.process import TARGETS
from ldm3d.diffusion.samplers import SAMPLERS
from ldm3d.diffusion.schedules import PROCESSES, make_process
from ldm3d.metrics.reconstruction import psnr
from ldm3d.training.checkpoint import checkpoints
from ldm3d.training.metrics import read_metrics

VALIDATOR = Path(sys.executable).with_name("bids-validator-deno")


@pytest.fixture
def pipeline(experiment):
    return ldm3d.Pipeline.from_pretrained(experiment / "run/model", device="cpu")


def bids_errors(folder) -> list:
    done = subprocess.run([VALIDATOR, folder, "--json"], capture_output=True, text=True)
    issues = json.loads(done.stdout)["issues"]["issues"]
    return [issue for issue in issues if issue["severity"] == "error"]


def test_training_leaves_what_it_promises(experiment):
    for run in ("autoencoder-training", "diffusion-training"):
        folder = experiment / "run" / run
        steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
        assert steps == [2, 4, 6, 8]
        assert (folder / "preview-00000008.png").stat().st_size > 10_000
        assert (folder / "curves.png").is_file()
        assert list(folder.rglob("events.out.tfevents*"))
        assert [f.name for f in checkpoints(folder)] == ["step-00000004", "step-00000008"]
    assert not [p for p in experiment.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin")]


def test_the_autoencoder_knows_the_statistics_of_its_latents(experiment):
    config = load_config(experiment / "config.yaml")
    scans = read_scan_table(config)
    autoencoder = ldm3d.Autoencoder.from_pretrained(config.autoencoder_folder)
    volumes = [load_prepared(config, key) for key in scans.loc[scans["split"] == "train", "key"]]
    moments = autoencoder.encode(torch.from_numpy(np.stack(volumes)))
    generator = torch.Generator().manual_seed(0)
    mean, _ = moments.chunk(2, dim=1)
    z = autoencoder.normalise(autoencoder.sample(moments, torch.randn(mean.shape, generator=generator)))
    torch.testing.assert_close(z.mean((0, 2, 3, 4)), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3, 4)), torch.ones(3), atol=0.01, rtol=0)


def test_reconstruction_is_better_than_the_mean_image(experiment, pipeline):
    config = load_config(experiment / "config.yaml")
    scans = read_scan_table(config)
    volumes = {name: [load_prepared(config, key) for key in rows["key"]] for name, rows in scans.groupby("split")}
    test = torch.from_numpy(np.stack(volumes["test"]))
    mean = torch.from_numpy(np.mean(volumes["train"], axis=0)).expand_as(test)
    assert psnr(pipeline.reconstruct(test), test).mean() > psnr(mean, test).mean() + 1


def test_generated_volumes_lie_where_the_grid_says_and_are_marked(pipeline):
    result = pipeline(age=72, sex="F", ventricular_volume_ml=45, num_volumes=2, steps=2, seed=1)
    assert len(result.images) == 2
    for image in result.images:
        assert image.shape == SHAPE
        assert image.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(image.header.get_zooms(), 7.5)
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        np.testing.assert_allclose(image.affine @ [*(np.array(SHAPE) - 1) / 2, 1], [0, 0, 0, 1])
        assert b"SYNTHETIC" in bytes(image.header["descrip"])
        data = np.asarray(image.dataobj)
        assert data.min() >= 0 and data.max() <= 1 and data.std() > 0.01


@pytest.mark.parametrize("sampler", ["heun", "ddpm"])
def test_a_volume_follows_from_seed_and_number_alone(pipeline, sampler):
    rows = [{"age": 30 + 10 * i, "sex": "FM"[i % 2]} for i in range(5)]

    def volumes(**options):
        images = pipeline(rows=rows, sampler=sampler, steps=3, **options).images
        return np.stack([np.asarray(image.dataobj) for image in images])

    together, alone = volumes(seed=4, batch_size=5), volumes(seed=4, batch_size=1)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, volumes(seed=4, batch_size=2), atol=1e-5)
    assert np.abs(together - volumes(seed=5)).max() > 0.01
    assert np.abs(together[0] - together[1]).max() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", PROCESSES)
def test_every_process_target_and_sampler_go_together(pipeline, kind, sampler):
    """Whatever the network predicts, volumes are finite and lie in [0, 1]."""
    pipeline.process = make_process(kind)
    for pipeline.target in TARGETS:
        result = pipeline(age=40, steps=2, guidance=2.0, guidance_rescale=0.5, guidance_interval=(0.1, 0.9), sampler=sampler)
        data = np.asarray(result.images[0].dataobj)
        assert np.isfinite(data).all() and data.min() >= 0 and data.max() <= 1


def test_the_pipeline_runs_in_bfloat16(pipeline):
    exact = np.asarray(pipeline.to(dtype=torch.float32)(age=50, steps=2).images[0].dataobj)
    rough = np.asarray(pipeline.to(dtype=torch.bfloat16)(age=50, steps=2).images[0].dataobj)
    assert rough.dtype == np.float32
    assert 0 < np.abs(exact - rough).mean() < 0.02


def test_a_saved_pipeline_generates_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    again = ldm3d.Pipeline.from_pretrained(tmp_path / "copy", device="cpu")
    first, second = (np.asarray(p(age=60, steps=2).images[0].dataobj) for p in (pipeline, again))
    np.testing.assert_array_equal(first, second)
    assert again.model_hash == pipeline.model_hash
    assert {p.suffix for p in (tmp_path / "copy").rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_a_model_says_what_it_can_be_asked(experiment, pipeline, capsys):
    command_line("info", experiment / "run/model")
    said = capsys.readouterr().out
    assert said.strip() == repr(pipeline)
    assert "24 x 28 x 24 voxels of 7.5 x 7.5 x 7.5 mm" in said and "sex: F, M" in said
    assert f"age: 0 to 120 years; training saw {pipeline.schema['age'].seen[0]:g} to" in said


def test_generate_writes_a_valid_bids_derivative(experiment, tmp_path):
    out = tmp_path / "out"
    asked = ["--age", "72", "--sex=f", "--ventricular-volume-ml", "45"]
    command_line("generate", experiment / "run/model", *asked, "--num", 2, "--out", out, "--steps", 2, "--seed", 7)
    volume = out / "sub-syn0001/anat/sub-syn0001_desc-synthetic_T1w.nii.gz"
    image = nibabel.load(volume)
    assert image.shape == SHAPE and b"SYNTHETIC" in bytes(image.header["descrip"])
    sidecar = json.loads(Path(str(volume).replace(".nii.gz", ".json")).read_text())
    assert sidecar["synthetic"] is True
    assert (sidecar["seed"], sidecar["sampler"], sidecar["steps"], sidecar["guidance"]) == (7, "heun", 2, 1.5)
    assert sidecar["covariates"] == {"age": 72.0, "sex": "F", "ventricular_volume_ml": 45.0}
    assert len(sidecar["model_hash"]) == 16
    table = pd.read_csv(out / "participants.tsv", sep="\t")
    assert list(table["participant_id"]) == ["sub-syn0001", "sub-syn0002"] and (table["age"] == 72).all()
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative" and description["GeneratedBy"][0]["Name"] == "ldm3d"
    assert (out / "mosaic.png").stat().st_size > 10_000
    assert bids_errors(out) == []


def test_generate_reads_a_table_of_requests(experiment, tmp_path):
    (tmp_path / "requests.tsv").write_text("participant_id\tage\tsex\nx1\t30\tM\nx2\tn/a\tF\n")
    out = tmp_path / "out"
    command_line("generate", experiment / "run/model", "--table", tmp_path / "requests.tsv", "--out", out, "--steps", 1)
    table = pd.read_csv(out / "participants.tsv", sep="\t", keep_default_na=False)
    assert list(table["age"]) == ["30.0", "n/a"] and list(table["sex"]) == ["M", "F"]
    assert bids_errors(out) == []


def test_python_api_saves_what_the_command_line_does(experiment, pipeline, tmp_path):
    command_line("generate", experiment / "run/model", "--age", 40, "--out", tmp_path / "a", "--device", "cpu", "--seed", 2)
    pipeline(age=40, seed=2).save(tmp_path / "b")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file())
    first, second = (nibabel.load(next((tmp_path / x).rglob("*.nii.gz"))).get_fdata() for x in "ab")
    np.testing.assert_array_equal(first, second)


def test_evaluate_judges_held_out_subjects_only(experiment, tmp_path, capsys):
    command_line(
        "evaluate", experiment / "run/model", "--data", experiment / "data", "--out", tmp_path, "--num", 6, "--steps", 1
    )
    assert "ventricular_volume_ml" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    scans = pd.read_csv(experiment / "run/prepared/scans.tsv", sep="\t")
    assert metrics["reconstruction"]["volumes"] == (scans["split"] == "test").sum() == 5
    kinds = {(row["covariate"], row["kind"], row["n"]) for row in metrics["fidelity"]}
    numbers = {"real": 5, "reconstructed": 5, "kept": 5, "generated": 6}
    assert kinds == {("ventricular_volume_ml", kind, n) for kind, n in numbers.items()}
    assert [sweep["covariate"] for sweep in metrics["sweeps"]] == ["age", "ventricular_volume_ml"]
    page = (tmp_path / "report.html").read_text()
    assert "SYNTHETIC" in page and "data:image/png;base64," in page
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)  # which a megabyte of base64 holds by chance, once in a while


def test_evaluate_takes_another_measure_and_other_data(experiment, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def brightness(volume, spacing_mm):\n    return {'age': 100 * float(volume.mean()), 'other': 1.0}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    scans = pd.read_csv(experiment / "run/prepared/scans.tsv", sep="\t", dtype=str)
    kept = scans[scans["split"] == "test"]
    table = kept.rename(columns={"subject": "participant_id"})
    elsewhere.mkdir()
    table.to_csv(elsewhere / "table.csv", index=False)
    arguments = ["--data", elsewhere / "table.csv", "--root", experiment / "data", "--num", 4, "--steps", 1]
    arguments += ["--measure", "mine:brightness"]
    command_line("evaluate", experiment / "run/model", *arguments, "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {row["covariate"] for row in metrics["fidelity"]} == {"age"}


def another_run(experiment, folder, stage) -> Path:
    """The config of the experiment with its output elsewhere, and there all that `stage` starts from."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_settings(experiment) | {"output": str(folder)}))
    for name in ("prepared", "autoencoder", "latents"):
        if name == "prepared" or stage != "autoencoder":
            shutil.copytree(experiment / "run" / name, folder / name)
    return config


def test_two_processes_train_as_one(experiment, tmp_path):
    """Both stages, the same global batch on two gloo processes, in two accumulated parts each: the same losses, to rounding.

    What a sum is rounded to follows from the CPU's kernels for a batch of that size, and Muon and AdamW make an update of full
    size even of a gradient that is little but rounding. What that does to the loss grows with the learning rate, which is
    small here, with AdamW in both stages. Both sides have all of the machine's cores.
    """
    folders = tmp_path / "one", tmp_path / "two"
    program = Path(__file__).with_name("in_process.py")
    for processes, folder in enumerate(folders, start=1):
        for stage in STAGES:
            (folder / stage).mkdir(parents=True)
            another_run(experiment, folder / stage, stage)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", f"{processes}"]
        command += ["--master_port", free_port(), program, folder, f"training.accumulation={processes}"]
        command += ["training.optimizer=adamw", "training.learning_rate=1e-4"]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # other tests want cores, too
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    for stage in STAGES:
        runs = [folder / stage / f"{stage}-training" for folder in folders]
        one, two = (read_metrics(run / "metrics.jsonl") for run in runs)
        assert len(one) == len(two) == 4
        assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
        whole, shared = (load_file(run / "checkpoints/step-00000008/tensors.safetensors") for run in runs)
        assert json.loads((runs[1] / "checkpoints/step-00000008/state.json").read_text())["circumstances"]["processes"] == 2
        for name in whole:
            if name.startswith("model/"):
                torch.testing.assert_close(shared[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)


def test_perceptual_and_adversarial_losses_train(experiment, tmp_path):
    from monai.networks.nets import ResNetFeatures
    from safetensors.torch import save_file

    features = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1)
    save_file(features.state_dict(), tmp_path / "resnet10.safetensors")
    shutil.copytree(experiment / "run/prepared", tmp_path / "prepared")
    launch(
        "ldm3d.training.autoencoder",
        experiment / "config.yaml",
        *("--set", f"output={tmp_path}", "--set", "training.steps=4"),
        *("--set", f"perceptual={{weight: 0.01, weights: {tmp_path / 'resnet10.safetensors'}}}"),
        *("--set", "adversarial={weight: 0.01, start: 2, channels: 8, layers: 1}"),
    )
    rows = read_metrics(tmp_path / "autoencoder-training/metrics.jsonl")
    assert "adversarial" not in rows[0] and rows[-1]["discriminator"] > 0


def on_two_processes(*arguments) -> str:
    """`ldm3d ARGUMENTS` by torchrun; what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ldm3d"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_prepare_encode_and_evaluate_as_one(experiment, tmp_path):
    """The same tables and latents, and the same figures to rounding; each thing is said once."""
    config, run = tmp_path / "config.yaml", experiment / "run"
    config.write_text(yaml.safe_dump(tiny_settings(experiment) | {"output": str(tmp_path)}))
    assert on_two_processes("prepare", config, "--workers", 1).count("20 scans prepared") == 1
    for name in ("scans.tsv", "splits.tsv"):
        assert (tmp_path / "prepared" / name).read_bytes() == (run / "prepared" / name).read_bytes()
    shutil.copytree(run / "autoencoder", tmp_path / "autoencoder")
    assert on_two_processes("encode", config).count("latents of 20 scans") == 1
    assert (tmp_path / "latents/latents.json").read_bytes() == (run / "latents/latents.json").read_bytes()
    one, two = (np.load(folder / "latents/moments.npy") for folder in (run, tmp_path))
    np.testing.assert_allclose(two, one, atol=1e-5)
    asked = ["evaluate", run / "model", "--data", experiment / "data", "--volumes", 6, "--steps", 1]
    command_line(*asked, "--out", tmp_path / "one")
    assert on_two_processes(*asked, "--out", tmp_path / "two").count("page written") == 1
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["reconstruction"]["psnr_db"]["mean"] == pytest.approx(one["reconstruction"]["psnr_db"]["mean"], abs=1e-3)
    assert [row["n"] for row in two["fidelity"]] == [row["n"] for row in one["fidelity"]]
    for a, b in zip(one["sweeps"], two["sweeps"]):
        assert a["values"] == b["values"]
        for name, values in a["measured_mean"].items():
            np.testing.assert_allclose(b["measured_mean"][name], values, rtol=0.05, atol=1)


def test_likelihood_scores_held_out_subjects(experiment, tmp_path, capsys):
    arguments = ["--data", experiment / "data", "--out", tmp_path / "found.tsv", "--times", 4, "--steps", 2]
    command_line("likelihood", experiment / "run/model", *arguments)
    table = pd.read_csv(tmp_path / "found.tsv", sep="\t", dtype={"subject": str})
    assert len(table) == 5 and np.isfinite(table[["bound", "ode", "bits_per_voxel"]].to_numpy()).all()
    parts = table["prior"] + table["reconstruction"] + table["diffusion"]
    np.testing.assert_allclose(table["bound"], parts, rtol=1e-4)
    assert "5 subjects written" in capsys.readouterr().out
