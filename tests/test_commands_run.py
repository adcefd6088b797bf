"""Commands of README and docs are run, as they stand, page by page: with a tiny model under every name that a page uses.

What is put in place of a reader's own: files by the names on the pages (scans, tables, a config), the tiny experiment of
`conftest` for every model and data set, few steps and volumes by options at the end. What cannot be run so stands in `APART`
with its reason. That the commands of `APART` are right in form is tested by tests/test_commands.py.
"""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import command_line, tiny_settings
from documented import PAGES, ROOT, blocks, commands, name_of
from in_process import train

from ldm3d import shipped

pytestmark = pytest.mark.slow

APART = {
    r"(pip|uv|head|docker|apptainer|conda|srun|make|scontrol|export|hf|\.|\[|tar|mkdir|pre-commit) ": "not ldm3d",
    r"python -m venv": "not ldm3d",
    r"python benchmarks/": "benchmarks run for long, and have tests of their own",
    r"python -m ldm3d.training.(autoencoder|diffusion) ds.yaml": "other settings of a run that is there, for real scans",
    r"accelerate launch --dynamo_backend": "compiles for minutes",
    r"ldm3d import-monai|ldm3d generate models/brain": "needs MONAI's published weights; tests/test_published.py makes some",
    r"ldm3d import-dicom": "needs DICOM of a scanner; tests/test_from_dicom.py makes some",
    r"ldm3d push|ldm3d generate ann/": "needs a hub; tests/test_hub.py has one",
    r"ldm3d generate runs/ixi": "asks for a site, which the tiny data lack; tests/test_tutorial.py has the rest of the page",
    r"ldm3d evaluate runs/ixi/model --data other": "likewise",
    r"ldm3d evaluate MODEL --data other": "columns of a foreign table; tests/test_other_data.py has one",
    r"ldm3d evaluate MODEL --data DIR --measure package": "a function of the reader's own",
    r"ldm3d measure mine.yaml --out volumes.tsv --labels": "FreeSurfer's label maps; tests/test_measure.py has some",
    r"ldm3d generate runs/masks-to-brain": "needs a model that draws of label maps; tests/test_given.py has one",
    r"ldm3d segmenter|.*--measure segmenter:segmenter": "brain labels; tests/test_segmenter.py has some",
}
TINY = {
    "generate": ["--num", "1", "--steps", "1"],
    "evaluate": ["--num", "4", "--steps", "1"],
    "audit": ["--num", "4", "--steps", "1"],
    "explain": ["--seeds", "6", "--steps", "1"],
    "likelihood": ["--times", "2", "--steps", "2"],
    "edit": ["--steps", "1", "--register", "none"],
    "restore": ["--samples", "2", "--levels", "1", "--register", "none"],
    "calibrate": ["--samples", "1", "--levels", "1"],
    "anomaly": ["--samples", "1", "--levels", "1"],
    "phantoms": ["--subjects", "6"],
    "atlas": ["--volumes", "2", "--rounds", "1", "--steps", "1"],
    "augment": ["--per-group", "3", "--steps", "1"],
}
PARTS = {"csf": [3], "brain": [4, 5], "ventricles": [6, 7]}  # of the phantoms' labels
ABOUT = {"generate": "--table", "edit": "--table"}  # with it, the number of volumes is the table's


def told(page: Path) -> list[list[str]]:
    return [command for text in blocks(page, "bash") for command in commands(text)]


def apart(command: list[str]) -> str | None:
    text = " ".join(command) + " "
    return next((why for pattern, why in APART.items() if re.match(pattern, text)), None)


RUN = [page for page in PAGES if any(not apart(command) for command in told(page))]


@pytest.fixture
def here(experiment, tmp_path, monkeypatch) -> Iterator[Path]:
    """A working folder with all that the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    one_step(ROOT / "models", tmp_path / "shipped", monkeypatch)
    for name in ("toy", "brains-3mm", "ixi", "ds002748", "age-and-sex"):
        shutil.copytree(experiment / "run", f"runs/{name}")
    Path("runs/t1w-to-t2w").symlink_to("inpaint")  # one model with the images of both, which the page trains
    shutil.copytree(experiment / "run", "parts")
    for name in ("MODEL", "NAME"):
        Path(name).symlink_to("parts/model")
    for name in ("trained/run", "alone", "residual", "muon"):
        shutil.copytree(experiment / "run", name, ignore=shutil.ignore_patterns("diffusion-training", "model"))
    for name in ("DIR", "data/toy", "data/brains", "data/clinic", "ds002748", "path/to/bids"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(experiment / "data")
    own_files(experiment)
    return tmp_path


def one_step(models: Path, folder: Path, monkeypatch) -> None:
    """The shipped models, whose sampling takes one step."""
    shutil.copytree(models, folder)
    for path in folder.glob("*/pipeline.json"):
        settings = json.loads(path.read_text())
        settings["sampling"]["steps"] = 1
        path.write_text(json.dumps(settings))
    monkeypatch.setattr(shipped, "FOLDERS", (folder,))


def thick(source: Path, target: Path) -> None:
    """A scan whose slices are thicker, and whose head is longer."""
    image = nib.load(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32), image.affine @ np.diag([1, 1, 1.3, 1])), target)


def own_files(experiment: Path) -> None:
    """Scans, tables and configs of the reader's own."""
    data = experiment / "data"
    scans = sorted(data.glob("sub-*/anat/*_T1w.nii.gz"))
    thick(scans[0], Path("scan.nii.gz"))
    for path in scans[:2]:
        thick(path, Path("dataset") / path.relative_to(data))
    for name in ("dataset_description.json", "participants.tsv"):
        shutil.copy(data / name, "dataset")
    Path("patients").symlink_to("dataset")
    marked = np.zeros(nib.load("scan.nii.gz").shape, np.uint8)
    marked[tuple(slice(n // 2 - 2, n // 2 + 2) for n in marked.shape)] = 1
    for name in ("lesion", "mask"):
        nib.save(nib.Nifti1Image(marked, nib.load("scan.nii.gz").affine), f"{name}.nii.gz")
    people = pd.read_csv(experiment / "data/participants.tsv", sep="\t")
    table = pd.DataFrame({"path": list(map(str, scans)), "age": people["age"], "sex": people["sex"]})
    table.to_csv("healthy.tsv", sep="\t", index=False)
    table[["age", "sex"]].to_csv("training.csv", index=False)
    paths = sorted(map(str, Path("dataset").glob("sub-*/anat/*.nii.gz")))
    table[:3].to_csv("three.csv", index=False)
    table[:2].assign(path=paths, hole="lesion.nii.gz").to_csv("scans.tsv", sep="\t", index=False)
    shutil.copytree(data, "ixi/T1")
    table["path"] = [f"T1/{path.relative_to(data)}" for path in scans]
    table["participant_id"] = people["participant_id"]
    table["ventricular_volume_ml"] = people["ventricular_volume_ml"]
    table.to_csv("ixi/scans.csv", index=False)
    Path("requests.tsv").write_text("age\tsex\n72\tF\n30\tM\n")
    Path("about.md").write_text("Whose data it was trained on.\n")
    settings = tiny_settings(Path.cwd() / "trained")
    settings["data"]["bids"] = str(experiment / "data")
    for name in ("CONFIG", "mine.yaml", "ixi.yaml", "ds.yaml", "configs/toy.yaml", "configs/brains-3mm.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(yaml.safe_dump(settings))
    hidden = {"name": "holed", "kind": "degraded", "degradations": [{"operator": "hole", "strength": [40, 80]}]}
    settings["diffusion"]["conditions"] = [{"name": "T1w", "kind": "image", "suffix": "T1w"}, hidden]
    settings["diffusion"]["init_from"] = str(experiment / "run/model")
    settings["output"] = "runs/inpaint"
    Path("configs/conditions").mkdir()
    for name in ("inpaint", "t1w-to-t2w"):
        Path(f"configs/conditions/{name}.yaml").write_text(yaml.safe_dump(settings))
    labels = {"name": "labels", "kind": "labels", "derivatives": str(data / "derivatives/labels"), "groups": PARTS}
    settings["diffusion"] = settings["diffusion"] | {"conditions": [labels], "makes": "labels"}
    del settings["diffusion"]["init_from"]
    settings["output"] = "runs/segment"
    Path("configs/conditions/segment.yaml").write_text(yaml.safe_dump(settings))


def synthseg(scans: Path, labels: Path, table: Path) -> None:
    """What SynthSeg would write about generated volumes, under its names and labels: it is not installed."""
    asked = pd.DataFrame({"age": range(30, 90, 10), "ventricular_volume_ml": range(15, 75, 10)})
    asked.to_csv("asked.csv", index=False)
    command_line("generate", "NAME", "--table", "asked.csv", "--out", scans)
    rows = []
    for path in sorted(scans.glob("sub-*/anat/*_T1w.nii.gz")):
        image = nib.load(path)
        found = np.where(image.get_fdata() > 0.5, 4, 0).astype(np.int16)
        labels.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(found, image.affine), labels / path.name.replace("_T1w", "_synthseg"))
        rows.append({"subject": path.name, "left lateral ventricle": (found > 0).sum(), "right lateral ventricle": 0})
    pd.DataFrame(rows).to_csv(table, index=False)


def run(command: list[str]) -> None:
    match command:
        case ["ldm3d", "serve", *rest]:
            answers(rest)
        case ["ldm3d", "config", name, *rest]:
            command_line("config", name, *("own.yaml" if word == "mine.yaml" else word for word in rest))
        case ["ldm3d", name, *rest]:
            if name == "phantoms" and Path(rest[0]).is_symlink():
                Path(rest[0]).unlink()
            given = TINY.get(name, [])
            if ABOUT.get(name) in rest or "--bids" in rest:
                given = given[2:] if name == "generate" else given
            command_line(name, *rest, *given)
        case ["mri_synthseg", "--i", scans, "--o", labels, "--vol", table]:
            synthseg(Path(scans), Path(labels), Path(table))
        case ["torchrun", *words] if "ldm3d" in words:
            run(words[words.index("ldm3d") :])
        case ["accelerate" | "torchrun" | "python", *words]:
            module, config, *options = words[words.index("-m") + 1 :]
            train(module.rpartition(".")[2], Path(config), *options[1::2], "training.steps=4")
        case _:
            pytest.fail(f"how is {command} run?")


def answers(arguments: list[str]) -> None:
    """`ldm3d serve`, at any port that is free, until it has answered."""
    command = [sys.executable, "-m", "ldm3d", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
            with urllib.request.urlopen(address) as answer:
                assert b"ldm3d" in answer.read()
        finally:
            process.terminate()


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_commands_of_a_page_run(here, page):
    """One after another, as a reader would; tables without a language on the page are the requests."""
    done = 0
    for command in told(page):
        if not apart(command):
            run(command)
            done += 1
    assert done


def test_nothing_is_apart_without_need():
    """Each reason is of a command that is still there."""
    texts = [" ".join(command) + " " for page in PAGES for command in told(page)]
    assert [pattern for pattern in APART if not any(re.match(pattern, text) for text in texts)] == []
