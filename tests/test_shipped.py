"""Models that come with ldm3d: found by name, written by `ldm3d export`, inside a wheel as beside a clone."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import command_line
from safetensors.torch import load_file, save_file

import ldm3d
from ldm3d import demo, demo_clock, precision
from ldm3d import shipped as registry
from ldm3d.account import read_account
from ldm3d.card import card as card_of
from ldm3d.config.read import load_config
from ldm3d.demo_clock import Clock
from ldm3d.description import hash_of_model
from ldm3d.errors import InputError
from ldm3d.experiment import find_experiment
from ldm3d.export import export
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.pretrained import EIGHT_BITS, weights_hash
from ldm3d.models.segmentation import SegmentationUNet
from ldm3d.models.unet import UNet
from ldm3d.pipeline import Pipeline
from ldm3d.rulers.volumetry import load_measure
from ldm3d.shipped import model_folder, shipped

ROOT = Path(__file__).parents[1]
MAX_MB = 12  # of a shipped model
BESIDE = ("methods.md", "references.bib")  # of which a card tells
KINDS = (".py", ".html", ".typed", ".js", ".css", ".txt")  # of the package's files


@pytest.fixture
def model(experiment) -> Path:
    return experiment / "run/model"


@pytest.fixture
def tiny(model, tmp_path, monkeypatch) -> Path:
    """A shipped model called tiny, with a segmenter; the working folder is another one."""
    SegmentationUNet({"ball_ml": [7]}, (4, 8)).save_pretrained(tmp_path / "segmenter")
    export(model, tmp_path / "models/tiny", segmenter=tmp_path / "segmenter")
    (tmp_path / "models/README.md").write_text("no model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(registry, "FOLDERS", (tmp_path / "none", tmp_path / "models"))
    return tmp_path / "models/tiny"


def front_matter(card: Path) -> dict:
    return yaml.safe_load(card.read_text().split("---\n")[1])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.parent.name} {k}": v for path in folder.rglob("*.safetensors") for k, v in load_file(path).items()}


# By name


def test_a_name_stands_for_a_folder(tiny, tmp_path, capsys):
    assert shipped() == {"tiny": tiny}
    assert Pipeline.from_pretrained("tiny").model_hash == weights_hash(tiny / "autoencoder", tiny / "unet")
    command_line("generate", "tiny", "--age", 72, "--sex", "F", "--steps", 1, "--out", tmp_path / "out")
    assert list((tmp_path / "out").rglob("*_T1w.nii.gz"))
    command_line("info", "tiny")
    assert "ventricular_volume_ml" in capsys.readouterr().out


def test_a_folder_comes_before_a_shipped_model(tiny, model):
    shutil.copytree(model, "tiny")
    assert model_folder("tiny") == Path("tiny")
    assert Pipeline.from_pretrained("tiny").model_hash == weights_hash(model / "autoencoder", model / "unet")


def test_an_unknown_name(tiny, fails, tmp_path):
    for command in ("generate", "info", "explain"):
        options = {"generate": ["--out", tmp_path / "out"], "info": [], "explain": ["--from", "age=60", "--to", "age=70"]}
        message = fails(command, "tyni", *options[command])
        assert "tyni holds no model: there is no such folder" in message and "shipped are: tiny" in message
    Path("tyni").mkdir()
    assert "tyni holds no model: pipeline.json is missing" in fails("info", "tyni")


def test_without_shipped_models(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "FOLDERS", (tmp_path / "none",))
    with pytest.raises(InputError, match="shipped are: none"):
        model_folder("brains")


def test_evaluating_a_shipped_model(tiny, experiment, tmp_path, capsys):
    """With the segmenter beside it, on the scans that its training did not see."""
    measure = ["--measure", "segmenter:tiny", "--no-predict", "--experiment", experiment / "run/experiment.json"]
    command_line(
        "evaluate", "tiny", "--data", experiment / "data", "--out", tmp_path / "page", "--num", 3, "--steps", 1, *measure
    )
    assert "Evaluation of tiny" in (tmp_path / "page/report.html").read_text()
    assert "page written to" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny", "../models/tiny", "../segmenter"])
def test_a_segmenter_beside_a_model(tiny, name):
    measure = load_measure(f"segmenter:{name}")
    assert measure.network.groups == {"ball_ml": [7]}
    assert {p.dtype for p in measure.network.parameters()} == {torch.float32}
    assert measure(np.ones((8, 8, 8)), (1, 1, 1))["ball_ml"] >= 0


# Half precision


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_matrices_are_rounded_and_vectors_kept(model, tmp_path, kind):
    export(model, tmp_path / "out", str(kind).removeprefix("torch."))
    before, after = tensors(model), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and {v.ndim for v in before.values()} == {1, 2, 5}
    for name, value in before.items():
        rounded = value if value.ndim < 2 else value.to(kind)
        assert after[name].dtype == rounded.dtype and torch.equal(after[name], rounded), name


def test_half_of_the_size(model, tmp_path):
    weights = [
        sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        for folder in (model, tmp_path / "out")
        if folder == model or export(model, folder)
    ]
    assert 0.5 < weights[1] / weights[0] < 0.65  # the headers do not shrink


@pytest.mark.parametrize("saved, least_db", [("float16", 65), ("bfloat16", 45)])
def test_volumes_change_little(model, tmp_path, saved, least_db):
    export(model, tmp_path / "out", saved)
    one, two = (Pipeline.from_pretrained(folder, "cpu", torch.float32)(age=60) for folder in (model, tmp_path / "out"))
    a, b = (made.images[0].get_fdata() for made in (one, two))
    assert 0 < np.square(a - b).mean() < 10 ** (-least_db / 10)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("saved", ["float16", "bfloat16"])
def test_the_files_do_not_decide_in_which_precision_is_computed(model, tmp_path, monkeypatch, saved, fast):
    monkeypatch.setattr(precision, "bf16_is_fast", lambda device: fast)
    export(model, tmp_path / "out", saved)
    pipeline = Pipeline.from_pretrained(tmp_path / "out", "cpu")
    kind = torch.bfloat16 if fast else torch.float32
    assert {p.dtype for part in (pipeline.autoencoder, pipeline.unet) for p in part.parameters()} == {kind}
    network = Autoencoder.from_pretrained(tmp_path / "out/autoencoder")  # the widest type of the file
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


def test_vectors_are_read_as_exactly_as_they_were_saved(tmp_path):
    """Though the first tensor of the file is in half precision."""
    network = Autoencoder(latent_channels=2, downsampling=2, channels=[4], blocks=1)
    with torch.no_grad():
        network.latent_std.fill_(1 + 2**-20)
    network.save_pretrained(tmp_path, torch.bfloat16)
    assert Autoencoder.from_pretrained(tmp_path, dtype=torch.float32).latent_std.tolist() == [1 + 2**-20] * 2


def test_weights_beyond_the_range_of_half_precision(tmp_path):
    network = Autoencoder(latent_channels=2, downsampling=2, channels=[4], blocks=1)
    with torch.no_grad():
        network.to_voxels.weight[0] = 1e5
    with pytest.raises(InputError, match=r"to_voxels\.weight holds values beyond the range of torch\.float16"):
        network.save_pretrained(tmp_path, torch.float16)
    network.save_pretrained(tmp_path, torch.bfloat16)


def test_kernels_of_a_unet_in_bytes(tmp_path):
    """Each row in 127ths of its largest weight; vectors exactly."""
    network = UNet(2, 2, [0], (16, 16), 1, (False, True), head_channels=16, context_dim=16)
    network.save_pretrained(tmp_path / "unet", torch.int8)
    network.save_pretrained(tmp_path / "half", torch.float16)
    size, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("unet", "half"))
    assert size < 0.7 * half
    read = UNet.from_pretrained(tmp_path / "unet", dtype=torch.float32)
    for name, value in network.state_dict().items():
        found = read.state_dict()[name]
        if name.endswith("weight") and value.ndim > 1:
            step = value.flatten(1).abs().amax(dim=1) / 127
            assert ((found - value).flatten(1).abs() <= 0.501 * step[:, None]).all(), name
        else:
            assert torch.equal(found, value.half().float() if value.ndim > 1 else value), name


def test_kernels_of_an_autoencoder_in_bytes(tmp_path):
    """Those within residual blocks alone: the linear path, the first and the last convolution carry the voxels themselves."""
    network = Autoencoder(latent_channels=2, downsampling=2, channels=[4], blocks=1)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(weight.numel()))
    network.save_pretrained(tmp_path, torch.int8)
    stored = load_file(tmp_path / "model.safetensors")
    packed = {name for name, value in stored.items() if value.dtype == torch.int8}
    assert packed == {name for name in stored if name.endswith((".conv1.weight", ".conv2.weight"))} and len(packed) == 4
    read = Autoencoder.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, value in network.state_dict().items():
        if name in packed:
            assert (read[name] - value).abs().max() <= 0.501 * value.abs().max() / 127, name
        else:
            assert torch.equal(read[name], value.half().float() if value.ndim > 1 else value), name


@pytest.mark.parametrize("scale", [None, torch.ones(3)])
def test_bytes_without_their_scale_are_no_weights(tmp_path, scale):
    network = UNet(2, 2, [0], (16, 16), 1, (False, True), head_channels=16, context_dim=16)
    network.save_pretrained(tmp_path, torch.int8)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["conv_in.weight.scale"]
    save_file(stored | ({} if scale is None else {"conv_in.weight.scale": scale}), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"conv_in\.weight is of type torch\.int8"):
        UNet.from_pretrained(tmp_path)


def test_rounding_leaves_the_pipeline_itself_alone(model, tmp_path):
    pipeline = Pipeline.from_pretrained(model, "cpu", torch.float32)
    before = pipeline.model_hash, pipeline.dtype
    pipeline.save_pretrained(tmp_path / "half", torch.float16)
    assert (pipeline.model_hash, pipeline.dtype) == before


# What is known of its training, and what it gives away


def test_an_exported_model_keeps_its_experiment(model, tmp_path):
    """The file is of the model before it was rounded."""
    export(model, tmp_path / "out")
    known = find_experiment(tmp_path / "out", model.parent / "experiment.json")
    assert known.train == find_experiment(model).train and known.train
    other = json.loads((model.parent / "experiment.json").read_text()) | {"model": "another"}
    (tmp_path / "experiment.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="is of model 'another'"):
        find_experiment(tmp_path / "out", tmp_path / "experiment.json")
    with pytest.raises(InputError, match="nothing says which scans"):
        find_experiment(tmp_path / "out")


def test_an_export_gives_away_no_path_and_no_scan(experiment, model, tmp_path):
    export(model, tmp_path / "out", segmenter=None)
    files = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    names = {f"{part}/{name}" for part in ("autoencoder", "unet") for name in ("config.json", "model.safetensors")}
    assert files.keys() == {"README.md", "pipeline.json", "training.json", "methods.md", "references.bib", *names}
    known = json.loads((experiment / "run/experiment.json").read_text())
    secrets = [str(experiment), str(tmp_path), *known["train"], *known["validation"], *known["subjects"], "sub-"]
    assert len(secrets) > 20
    for name, content in files.items():
        assert not [secret for secret in secrets if secret.encode() in content], name


# The card


def test_card(tiny, model, tmp_path, capsys):
    (tmp_path / "about.md").write_text("## Data\n\nTwenty toys, drawn by ldm3d.\n", encoding="utf-8")
    out = tmp_path / "toys-7mm"
    command_line("export", model, "--out", out, "--about", tmp_path / "about.md", "--license", "cc-by-4.0")
    assert "model written to" in capsys.readouterr().out
    text, found = (out / "README.md").read_text(), front_matter(out / "README.md")
    assert found["license"] == "cc-by-4.0" and found["library_name"] == "ldm3d" and "synthetic-data" in found["tags"]
    assert "# toys-7mm\n" in text and "Twenty toys, drawn by ldm3d." in text and "segmenter" not in text
    assert "24 x 28 x 24 voxels of 7.5 x 7.5 x 7.5 mm" in text and "float16" in text and "For research only" in text
    for covariate in ("| age | 0 to 120 years; training saw ", "| sex | F, M |", "| ventricular_volume_ml |"):
        assert covariate in text
    assert weights_hash(out / "autoencoder", out / "unet") in text
    other = (tiny / "README.md").read_text()
    assert front_matter(tiny / "README.md")["license"] == "apache-2.0"
    assert "--measure segmenter:tiny" in other and "ball_ml" in other


def titles(card: str) -> list[str]:
    return re.findall(r"^## (.*)$", card, re.MULTILINE)


def test_what_the_makers_say_stands_in_the_sections_of_the_card(model, tmp_path):
    """Each section once, in the card's order, with the text before the first heading above them."""
    about = (
        "Of toys.\n\n## Limits\n\nToys are no people.\n\n## Data\n\nDrawn.\n\n## Thanks\n\nTo all.\n\n## Data\n\nBy ldm3d.\n"
    )
    (tmp_path / "about.md").write_text(about, encoding="utf-8")
    export(model, tmp_path / "out", about=tmp_path / "about.md")
    text = (tmp_path / "out/README.md").read_text()
    sections = ["Data", "Training", "Thanks", "Limits", "Licence"]
    assert titles(text) == ["What it can be asked for", "Networks and volumes", *sections]
    assert "Of toys.\n\n## Data\n\n" in text and "|\n\nDrawn.\n\nBy ldm3d.\n\n## Training" in text
    assert "## Limits\n\nToys are no people.\n\nWhat follows from the figures above:\n\n- " in text


def test_a_card_tells_each_part_of_a_training(model, tmp_path):
    """Where the U-Net began with the weights of another one: what the files do not tell, they say that they do not."""
    account = read_account(model)
    unet = account["stages"]["diffusion"]
    pipeline = Pipeline.from_pretrained(model)

    def training(earlier: list | None) -> str:
        changed = account | {"started_with": {"autoencoder": True, "diffusion": earlier != []}}
        changed = {key: value for key, value in changed.items() if key != "earlier"}
        changed |= {} if earlier is None else {"earlier": earlier}
        return card_of("toys", pipeline, "float16", account=changed).split("## Training")[1].split("##")[0]

    assert "| |autoencoder | U-Net |\n" in training([]) and "| steps | 8 | 8 |" in training([])
    two = training([unet | {"steps": 1234}])
    assert "| |autoencoder | U-Net, part 1 | U-Net, last part |\n" in two and "| steps | 8 | 1,234 | 8 |" in two
    assert "was not trained further" in two and "of whose training" not in two
    for unknown in ([None], None):  # of today's accounts, and of those that tell of no earlier part
        text = training(unknown)
        assert "| |autoencoder | U-Net, last part |\n" in text and "of whose training" in text


def test_what_is_known_of_the_training_is_in_the_card_and_the_methods(experiment, model, tmp_path, fails):
    """And figures of an evaluation, with their intervals, if it is of this model."""
    likeness = {
        "name": "rbf_mmd",
        "title": "MMD",
        "value": 0.1234,
        "low": 0.1,
        "high": 0.15,
        "verdict": "beyond the margin",
        "synthetic": 9,
    }
    interval = {"r_low": 0.7, "r_high": 0.95, "slope_low": 0.5, "slope_high": 0.8}
    quality = {name: {"mean": 30.25, "low": 29.0, "high": 31.5} for name in ("psnr_foreground_db", "ssim_foreground")}
    metrics = {
        "reconstruction": {"volumes": 5, **quality},
        "held_out": {"generated_for": [0] * 9},
        "fidelity": [{"covariate": "age", "kind": "generated", "r": 0.876, "slope": 0.66, "n": 9, **interval}],
        "likeness": [likeness],
        "goals": [{"name": "age, r", "light": "red"}, {"name": "copies", "light": "grey"}],
        "provenance": {"model": hash_of_model(model), "made": "2026-01-02T00:00:00", "sampling": "heun"},
    }
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/metrics.json").write_text(json.dumps(metrics))
    command_line("export", model, "--out", tmp_path / "out", "--evaluation", tmp_path / "evaluation")
    card = (tmp_path / "out/README.md").read_text()
    for line in (
        "| subjects | 20 | 11 | 4 | 5 |",
        "| steps | 8 | 8 |",
        "| age: requested and measured, r | 0.876 | 0.7 to 0.95 | 9 |",
        "| MMD (beyond the margin) | 0.123 | 0.1 to 0.15 | 9 |",
        "- Not reached: age, r.",
        "- 11 people are few",
        "- No privacy audit stands here",
    ):
        assert line in card, line
    assert "Not described" not in card
    text = (tmp_path / "out/methods.md").read_text()
    assert "11 (11 scans) for training" in text and "r = 0.876 (0.700 to 0.950)" in text
    metrics["provenance"]["model"] = "another"
    (tmp_path / "evaluation/metrics.json").write_text(json.dumps(metrics))
    assert "is of model another" in fails("export", model, "--out", tmp_path / "new", "--evaluation", tmp_path / "evaluation")
    assert "ldm3d evaluate --out FOLDER" in fails("export", model, "--out", tmp_path / "new", "--evaluation", tmp_path)


def test_examples_of_a_card_run(tiny, tmp_path):
    text = (tiny / "README.md").read_text()
    command = re.search(r"^ldm3d (generate tiny .*)$", text, re.MULTILINE)[1].split()
    assert "--age" in command and "--sex" in command
    command_line(*command[:-1], tmp_path / "one", "--steps", 1)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(code, {})
    assert len(list(Path("synthetic").rglob("*.nii.gz"))) == len(list((tmp_path / "one").rglob("*.nii.gz"))) == 1


def test_input_of_export(tiny, fails, model, tmp_path):
    assert "is not empty" in fails("export", model, "--out", tiny)
    assert "no file" in fails("export", model, "--out", tmp_path / "new", "--about", tmp_path / "none.md")
    assert "did you mean 'float16'?" in fails("export", model, "--out", tmp_path / "new", "--precision", "float61")
    assert "holds no SegmentationUNet" in fails("export", model, "--out", tmp_path / "new", "--segmenter", tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_segmenter_is_exported_again(tiny, tmp_path):
    export("tiny", tmp_path / "again")
    assert (tmp_path / "again/segmenter/model.safetensors").read_bytes() == (tiny / "segmenter/model.safetensors").read_bytes()


def test_an_export_of_an_export_is_still_known_by_the_weights_that_were_trained(tiny, model, tmp_path):
    """So an evaluation of the trained model, and its experiment.json, go with it."""
    export("tiny", tmp_path / "again", "int8")
    rounded = [json.loads((folder / "pipeline.json").read_text())["rounded_from"] for folder in (tiny, tmp_path / "again")]
    assert rounded == [hash_of_model(model)] * 2


# Where they lie


def build(sources: Path, call: str) -> Path:
    """A wheel by setuptools, as pip asks for it, offline; its content, unpacked."""
    subprocess.run([sys.executable, "-c", call], cwd=sources, check=True, capture_output=True)
    wheel = next((sources / "wheels").glob("*.whl"))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(sources / "unpacked")
    return sources / "unpacked"


@pytest.fixture
def sources(tiny, tmp_path) -> Path:
    """A clone that ships the tiny model."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "ldm3d", clone / "ldm3d", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(tiny.parent, clone / "models")
    shutil.copytree(ROOT / "configs", clone / "configs")
    return clone


def says(path: str) -> list[str]:
    """What Python with this path finds: the package's folder, shipped models, the tiny one's hash."""
    code = (
        "import ldm3d, ldm3d.shipped as s; print(ldm3d.__file__); print(*s.shipped()); print(s.model_folder('tiny')); "
        "print(ldm3d.Pipeline.from_pretrained('tiny', 'cpu').model_hash)"
    )
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


def test_a_wheel_holds_the_models(sources, tiny):
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", "wheels"]
    unpacked = build(sources, f"import subprocess; subprocess.run({pip!r}, check=True)")
    inside = {str(path.relative_to(tiny.parent)) for path in tiny.parent.rglob("*") if path.is_file()}
    weights = unpacked / "ldm3d/weights"
    assert {str(path.relative_to(weights)) for path in weights.rglob("*") if path.is_file()} == inside
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"ldm3d"}  # nothing called models
    files = {path.relative_to(ROOT) for path in (ROOT / "ldm3d").rglob("*") if path.suffix in KINDS}
    assert len(files) > 100 and all((unpacked / path).is_file() for path in files)
    hashed = weights_hash(tiny / "autoencoder", tiny / "unet")
    assert says(str(unpacked)) == [str(unpacked / "ldm3d/__init__.py"), "tiny", str(weights / "tiny"), hashed]


def test_an_editable_install_finds_the_models_of_the_clone(sources, tiny):
    call = "from setuptools import build_meta; build_meta.build_editable('wheels', {'editable_mode': 'compat'})"
    paths = next(build(sources, call).glob("*.pth")).read_text().split()
    hashed = weights_hash(tiny / "autoencoder", tiny / "unet")
    assert says(paths[0]) == [str(sources / "ldm3d/__init__.py"), "tiny", str(sources / "models/tiny"), hashed]


def test_what_ships_with_this_version(monkeypatch):
    """Small, in half precision, described, without a trace of the machine; and it answers an open request."""
    monkeypatch.chdir(ROOT / "tests")
    assert (ROOT / "models/README.md").is_file()  # the folder, for a wheel
    assert {path.name for path in (ROOT / "models").iterdir() if path.is_dir()} == set(shipped())
    for name, folder in shipped().items():
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < MAX_MB * 1e6, name
        assert {path.suffix for path in files} - {".bib"} == {".json", ".safetensors", ".md"}
        assert not list(folder.rglob("experiment*"))
        allowed = {torch.float16, torch.bfloat16, EIGHT_BITS, torch.int8}
        assert {value.dtype for value in tensors(folder).values() if value.ndim > 1} <= allowed
        card = (folder / "README.md").read_text()
        assert front_matter(folder / "README.md")["license"] == "apache-2.0" and "Not described" not in card
        assert len(set(titles(card))) == len(titles(card)) and all((folder / f).is_file() for f in BESIDE if f"`{f}`" in card)
        for path in files:
            text = path.read_bytes() if path.suffix != ".safetensors" else b""
            assert not re.search(rb"/(home|root|tmp|work|Users)/|\bsub-\d", text), path
        assert len(Pipeline.from_pretrained(name, "cpu")(steps=1).images) == 1
        if (folder / "segmenter").exists():
            load_measure(f"segmenter:{name}")


# The demo


class Time:
    """A clock of seconds that pass when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_demo_shows_a_shipped_model(tiny, tmp_path, capsys):
    clock = Clock({demo.SHIPPED: 1.0})
    line = demo._draw_shipped(tmp_path / "shown", clock)
    assert "3 volumes of the shipped model tiny" in line and str(tmp_path / "shown") in line
    assert len(list((tmp_path / "shown").rglob("*.nii.gz"))) == 3 and (tmp_path / "shown/mosaic.png").is_file()
    assert demo.SHIPPED in clock.took
    clock.took.clear()
    assert demo._draw_shipped(tmp_path / "shown", clock) == line and not clock.took  # it is there
    assert "tiny" in capsys.readouterr().out


def test_the_demo_without_a_shipped_model(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "FOLDERS", (tmp_path / "none",))
    assert demo._draw_shipped(tmp_path / "shown", Clock({})) == "" and not (tmp_path / "shown").exists()


def test_the_demo_s_clock_counts_the_shipped_model(tiny, monkeypatch):
    """Loading takes no time here; one step 2 s in all, three 3 s: each further step half a second."""
    steps = ldm3d.Pipeline.from_pretrained("tiny", "cpu").sampling.steps
    times = iter([2.0, 3.0])
    monkeypatch.setattr(demo_clock, "shortest_seconds_of", lambda work, repeats: next(times))
    monkeypatch.setattr(demo_clock.time, "perf_counter", Time())
    assert demo_clock.drawing_seconds("tiny", 3) == 2 + 0.5 * (steps - 1)


@pytest.mark.parametrize("finished, expected", [(False, 7.0), (True, 0.0)])
def test_the_demo_announces_the_shipped_model(tiny, experiment, tmp_path, monkeypatch, finished, expected):
    monkeypatch.setattr(demo, "expected_seconds", lambda *_: {"evaluate": 1.0})
    monkeypatch.setattr(demo, "drawing_seconds", lambda model, count: {("tiny", 3): 7.0}[model, count])
    if finished:
        (tmp_path / "shipped").mkdir()
        (tmp_path / "shipped/participants.tsv").touch()
    clock = demo.start_clock(load_config(experiment / "config.yaml"), tmp_path)
    assert clock.expected == {"evaluate": 1.0, demo.SHIPPED: expected}
