"""The experiment file: shipped ones fit the networks, and every mistake is named with its way out."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import typer
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import command_line

from ldm3d import cli
from ldm3d.config.data import RESERVED_NAMES, DataConfig
from ldm3d.config.read import load_config
from ldm3d.config.sections import Config
from ldm3d.data.bids import read_scans
from ldm3d.errors import InputError
from ldm3d.models import blocks
from ldm3d.models.pretrained import make_network
from ldm3d.pipeline import Pipeline

CONFIGS = Path(__file__).parents[1] / "configs"

EXPERIMENT = """
name: example
output: runs/example
data:
  bids: data/example
  grid: {shape: [40, 48, 40], spacing_mm: 4.5}
  splits: {validation: 0.05, test: 0.1}
covariates:
  - {name: age, kind: continuous, unit: years, range: [0, 120]}
  - {name: sex, kind: categorical, categories: [F, M]}
autoencoder:
  network: {latent_channels: 4, downsampling: 4, channels: [32, 64]}
  kl: 1e-6
  training: {steps: 700, batch_size: 8, learning_rate: 2e-3, optimizer: muon}
diffusion:
  network: {channels: [48, 96], attention: [no, yes]}
  training: {steps: 600, batch_size: 32, learning_rate: 3.0e-3}
"""


@pytest.fixture
def load(tmp_path):
    """Load the experiment above with overrides, after `change(values)`."""

    def load(*overrides: str, section: str | None = None, change=None) -> Config:
        path = tmp_path / "experiment.yaml"
        path.write_text(EXPERIMENT)
        if change:
            values = yaml.safe_load(EXPERIMENT)
            change(values)
            path.write_text(yaml.safe_dump(values))
        return load_config(path, overrides, section)

    return load


@pytest.fixture
def error(load, tmp_path):
    """What is said of the experiment above with overrides."""

    def error(*overrides: str, section: str | None = None) -> str:
        with pytest.raises(InputError) as caught:
            load(*overrides, section=section)
        message = str(caught.value)
        assert message.startswith((f"{tmp_path / 'experiment.yaml'}: ", "--set "))
        return message

    return error


# Shipped files


LATENTS = {
    "age-and-sex": (16, 14, 18, 14),
    "brain-1mm": (8, 20, 28, 20),
    "brains-4.5mm": (16, 10, 12, 10),
    "brains-3mm": (16, 14, 18, 14),
    "toy": (4, 10, 12, 10),
}


def test_every_shipped_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(LATENTS)


@pytest.mark.parametrize("name", LATENTS)
def test_shipped_config_builds_networks_that_fit(name):
    """On the meta device shapes are computed and numbers are not, so 1 mm takes no longer than the toy."""
    config = load_config(CONFIGS / f"{name}.yaml")
    schema = config.schema()
    with torch.device("meta"):
        autoencoder = make_network("Autoencoder", **config.autoencoder.network.model_dump())
        channels = autoencoder.latent_channels
        of_data = {"in_channels": channels, "out_channels": channels, "num_categories": schema.num_categories}
        unet = make_network("UNet", **of_data, **config.diffusion.network.model_dump())
        volume = torch.empty(1, 1, *config.data.grid.shape)
        moments = autoencoder.encode(volume)
        z = autoencoder.sample(moments, torch.empty(1, *LATENTS[name]))
        predicted = unet(z, torch.empty(1), torch.empty(1, len(schema), 2))
        decoded = autoencoder.decode(z)
    assert tuple(z.shape[1:]) == autoencoder.latent_shape(config.data.grid.shape) == LATENTS[name]
    assert predicted.shape == z.shape
    assert decoded.shape == volume.shape
    names = ["age", "sex"] if name == "age-and-sex" else ["age", "sex", "ventricular_volume_ml", "brain_volume_ml"]
    assert schema.names == names
    assert schema.num_categories == [0, 2, 0, 0][: len(names)]
    assert config.name == name
    assert config.output == Path("runs") / name


MONAI_S_NETWORKS = [
    f"{library}.networks.nets.{module}"
    for library in ("monai", "generative")
    for module in ("autoencoderkl", "diffusion_model_unet")
]


@pytest.mark.parametrize(
    "name, kind, processes", [("cpu", "NO", 1), ("one-gpu", "NO", 1), ("gpus", "MULTI_GPU", 8), ("fsdp", "FSDP", 8)]
)
def test_accelerate_configs_load(name, kind, processes):
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes) == (kind, processes)
    assert config.use_cpu == (name == "cpu")
    assert config.mixed_precision == "no"  # else it would overrule the experiment's
    if name == "fsdp":
        wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
        modules = [blocks, *map(importlib.import_module, MONAI_S_NETWORKS)]
        assert set(wrapped) <= {name for module in modules for name in vars(module)}


# What a file may say


def test_values_arrive_as_written(load):
    config = load()
    assert config.data.grid.shape == (40, 48, 40)
    assert config.data.grid.spacing_mm == (4.5, 4.5, 4.5)  # one number is isotropic
    assert config.covariates[0].range == (0, 120)
    assert config.covariates[1].categories == {"F": (), "M": ()}
    assert config.diffusion.network.attention == (False, True)  # YAML's no and yes
    assert config.prepared_folder == Path("runs/example/prepared")


def test_exponents_are_numbers(load):
    """YAML 1.1 reads 1e-3, without a point, as a string."""
    assert yaml.safe_load("1e-3") == "1e-3"
    config = load()
    assert config.autoencoder.kl == 1e-6
    assert config.autoencoder.training.learning_rate == 2e-3
    assert load("autoencoder.training.learning_rate=5e-4").autoencoder.training.learning_rate == 5e-4


def test_spacing_of_each_axis(load):
    config = load(change=lambda values: values["data"]["grid"].update(spacing_mm=[1, 2.5, "3e0"]))
    assert config.data.grid.spacing_mm == (1.0, 2.5, 3.0)


def test_categories_listed_or_with_what_else_stands_for_them(load):
    named = load("covariates=[{name: sex, kind: categorical, categories: {F: [female, 2], M: 1, X: null}}]")
    assert named.covariates[0].categories == {"F": ("female", "2"), "M": ("1",), "X": ()}
    assert named.schema()["sex"].aliases == {"F": ("female", "2"), "M": ("1",)}
    assert named.covariates[0].model_dump(mode="json")["categories"] == {"F": ["female", "2"], "M": ["1"], "X": []}
    assert Config.model_validate(named.model_dump(mode="json")) == named


def test_what_is_not_used_is_written_as_before(load):
    """Prepared folders compare what they were made with."""
    written = load().covariates[1].model_dump(mode="json")
    assert written == {
        **{"name": "sex", "column": None, "kind": "categorical", "unit": "", "range": None, "categories": ["F", "M"]},
    }


@pytest.mark.parametrize(
    "covariate, message",
    [
        ("{name: x, kind: categorical, categories: [F, F]}", "'F' is there twice"),
        ("{name: x, kind: categorical, categories: {F: [2], M: [1, 2]}}", "'2' stands for 'F' and 'M'; list it once"),
        ("{name: x, kind: categorical, categories: {F: [m], M: []}}", "'m' stands for 'M' and 'F'"),
        (
            "{name: x, kind: categorical, categories: [no, mild]}",
            "false is not text: YAML reads yes, no, on, off so",
        ),
        ("{name: x, kind: categorical, categories: [n/a, mild]}", "'n/a' is how tables write a missing value"),
        ("{name: x, kind: categorical, categories: [[F], M]}", r"\['F'\] is neither text nor a number"),
        ("{name: x, kind: categorical, categories: [F, M], missing: [M, 9]}", "'M' is a category and stands for a missing"),
        ("{name: x, kind: continuous, missing: [[1]]}", r"covariates.0.missing.* is neither text nor a number"),
    ],
)
def test_words_that_cannot_be(error, covariate, message):
    assert re.search(message, error(f"covariates=[{covariate}]"))


def test_missing_is_one_word_or_several(load):
    config = load("covariates=[{name: x, kind: continuous, missing: -9999}]", "data.missing=[-1, unknown, 9.5]")
    assert config.covariates[0].missing == ("-9999",) and config.data.missing == ("-1", "unknown", "9.5")


def test_participants_go_with_bids(load, error):
    assert load("data.participants=people.csv").data.participants == Path("people.csv")
    assert "`participants` goes with `bids`" in error("data.participants=a.csv", "data.bids=null", "data.table=b.csv")


# Names of covariates


@pytest.mark.parametrize(
    "name", ["group", "session", "key", "split", "seed", "path", "subject", "steps", "num", "table", "out", "rows", "ask"]
)
def test_names_that_are_taken(error, name):
    message = error(f"covariates=[{{name: {name}, kind: continuous}}]")
    assert f"covariates.0.name: '{name}' is the name of" in message
    assert f"write `name: patient_{name}, column: {name}`" in message


def test_models_of_before_keep_the_names_that_they_have(load):
    values = load().model_dump(mode="json")
    values["covariates"][0]["name"] = "group"
    assert Config.model_validate(values, context={"saved": True}).covariates[0].name == "group"


def test_names_are_taken_for_what_they_are_elsewhere(tmp_path):
    """Options of the command that takes covariates as options, arguments of the call that does, columns beside them."""
    command = typer.main.get_command(cli.app).commands["generate"]
    options = [option for option in command.params if option.param_type_name == "option"]
    names = {"--help"}.union(*([*option.opts, *option.secondary_opts] for option in options))
    arguments = set(inspect.signature(Pipeline.__call__).parameters) - {"covariates"}
    (tmp_path / "t.csv").write_text("participant_id,path\n1,a.nii\n")
    columns = set(read_scans(DataConfig(table=tmp_path / "t.csv", grid={"shape": (8, 8, 8), "spacing_mm": 2}), []))
    taken = {text.removeprefix("--").replace("-", "_") for text in names} | arguments | columns
    assert taken | {"key", "split", "participant_id", "session_id"} == RESERVED_NAMES


def test_codes_of_categories_become_strings(load):
    config = load(change=lambda values: values["covariates"][1].update(categories=[0, 1]))
    assert config.schema()["sex"].categories == ("0", "1")


def test_config_cannot_be_changed_after_reading(load):
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 1


def test_config_survives_json(load):
    """What a checkpoint and a model folder keep of it."""
    config = load()
    assert Config.model_validate_json(config.model_dump_json()) == config


# Overrides


def test_override_replaces_and_adds(load):
    before, after = load(), load("seed=7", "data.splits.test=0.3", "autoencoder.training.accumulation=2")
    assert (after.seed, after.data.splits.test, after.autoencoder.training.accumulation) == (7, 0.3, 2)
    assert after.data.splits.validation == before.data.splits.validation == 0.05
    assert after.diffusion == before.diffusion


def test_override_without_its_section_is_the_stage_s_own(error, load):
    before = load()
    autoencoder = load("training.steps=500", section="autoencoder")
    diffusion = load("training.steps=500", section="diffusion")
    assert (autoencoder.autoencoder.training.steps, autoencoder.diffusion) == (500, before.diffusion)
    assert (diffusion.diffusion.training.steps, diffusion.autoencoder) == (500, before.autoencoder)
    # A key that the top has is the top's, and a full name works in both
    both = load("seed=3", "autoencoder.training.steps=9", section="autoencoder")
    assert (both.seed, both.autoencoder.training.steps) == (3, 9)
    assert "unknown key 'training'" in error("training.steps=500")


def test_override_opens_an_optional_section(load):
    overrides = ["adversarial={weight: 5e-3, start: 100}", "perceptual.weight=1", "perceptual.weights=w"]
    config = load(*overrides, section="autoencoder")
    assert (config.autoencoder.adversarial.weight, config.autoencoder.adversarial.start) == (0.005, 100)
    assert config.autoencoder.perceptual.weights == Path("w")


def test_later_override_wins(load):
    assert load("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("override", ["seed", "=3", ""])
def test_override_without_key_or_value(error, override):
    assert f"--set {override!r}: write --set key.subkey=value" in error(override)


def test_override_that_is_no_yaml(error):
    assert "'[1' is not a YAML value" in error("seed=[1")


# Mistakes


@pytest.mark.parametrize(
    "override, key, meant",
    [
        ("sede=1", "sede", "seed"),
        ("data.tabel=x.csv", "data.tabel", "table"),
        ("data.grid.spacing=1", "data.grid.spacing", "spacing_mm"),
        ("data.splits.validaton=0.2", "data.splits.validaton", "validation"),
        ("autoencoder.training.batchsize=4", "autoencoder.training.batchsize", "batch_size"),
        ("diffusion.network.tokens_per_covarate=2", "diffusion.network.tokens_per_covarate", "tokens_per_covariate"),
        ("covariates=[{name: age, kind: continuous, ragne: [0, 1]}]", "covariates.0.ragne", "range"),
        ("autoencoder.adversarial={weight: 1, start: 2, layer: 2}", "autoencoder.adversarial.layer", "layers"),
        ("autoencoder.perceptual={weight: 1, weights: w, weihgt: 2}", "autoencoder.perceptual.weihgt", "weight"),
        ("generation.guidence=2", "generation.guidence", "guidance"),
    ],
)
def test_unknown_key_names_the_nearest(error, override, key, meant):
    message = error(override)
    assert f"unknown key {key!r}; did you mean {meant!r}?" in message


def test_unknown_key_like_none_lists_the_valid_ones(error):
    message = error("covariates=[{name: a, kind: continuous}, {name: b, kind: continuous, qqqq: 1}]")
    assert "unknown key 'covariates.1.qqqq'; valid keys here: name, column, kind, unit, range, categories, missing" in message
    assert "valid keys here: name, output, seed, data" in error("qqqq=1")


MONAI_AUTOENCODER = "autoencoder.network={kind: monai, latent_channels: 3, channels: [32, 64, 64]}"
MONAI_UNET = "diffusion.network={kind: monai-generative, channels: [32, 64], attention: [no, yes]}"


def test_kinds_of_networks(load):
    assert (load().autoencoder.network.kind, load().diffusion.network.kind) == ("ldm3d", "ldm3d")
    config = load(MONAI_AUTOENCODER)
    assert (config.autoencoder.network.kind, config.diffusion.network.kind) == ("monai", "ldm3d")
    assert config.autoencoder.network.downsampling == 4
    assert Config.model_validate_json(config.model_dump_json()) == config
    config = load(MONAI_UNET, "diffusion.network.head_channels=16")
    assert (config.autoencoder.network.kind, config.diffusion.network.kind) == ("ldm3d", "monai-generative")
    assert config.diffusion.network.head_channels == (16,)
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["autoencoder.network.kind=monay"], "autoencoder.network.kind is 'monay': use one of ldm3d, monai, monai-generative"),
        (
            ["autoencoder.network.norm_num_groups=1"],
            "unknown key 'autoencoder.network.norm_num_groups'; valid keys here: kind",
        ),
        ([MONAI_AUTOENCODER, "autoencoder.network.linear_path=yes"], "unknown key 'autoencoder.network.linear_path'"),
        (
            [MONAI_AUTOENCODER, "autoencoder.network.atention=[no]"],
            "'autoencoder.network.atention'; did you mean 'attention'?",
        ),
        ([MONAI_AUTOENCODER, "autoencoder.network.channels=many"], "autoencoder.network.channels is 'many'"),
        ([MONAI_AUTOENCODER, "autoencoder.network.channels=[48]"], "norm_num_groups 32 must divide every width"),
        ([MONAI_AUTOENCODER, "autoencoder.network.attention=[no]"], "one flag for each of the channels (32, 64, 64), or none"),
        ([MONAI_AUTOENCODER, "data.grid.shape=[42, 48, 40]"], "downsampling 4; crop to (40, 48, 40)"),
        ([MONAI_UNET, "diffusion.network.head_channel=8"], "'diffusion.network.head_channel'; did you mean 'head_channels'?"),
        ([MONAI_UNET, "diffusion.network.head_channels=[32, 48]"], "head_channels 48 must divide the 64 channels"),
        ([MONAI_UNET, "diffusion.network.head_channels=[8, 8, 8]"], "must be one number, or one for each of (32, 64)"),
        ([MONAI_UNET, "diffusion.network.attention=[yes]"], "one flag for each"),
        ([MONAI_UNET, "diffusion.network.kind=monai", "diffusion.network.upcast_attention=yes"], "half precision"),
        (["generation.spacing=leading"], "diffusion.process.kind flow has none"),
    ],
)
def test_mistakes_in_sections_of_a_kind(error, overrides, told):
    assert told in error(*overrides)


def test_all_mistakes_are_told_at_once(error):
    message = error("sede=1", "autoencoder.training.steps=0", "data.grid.shape=[40, 48]")
    assert "'sede'" in message
    assert "autoencoder.training.steps is 0" in message
    assert "data.grid.shape" in message


@pytest.mark.parametrize(
    "override, where",
    [
        ("autoencoder.training.steps=many", "autoencoder.training.steps is 'many'"),
        ("autoencoder.training.steps=2.5", "autoencoder.training.steps is 2.5"),
        ("autoencoder.training.learning_rate=fast", "autoencoder.training.learning_rate is 'fast'"),
        ("autoencoder.training.learning_rate=.nan", "autoencoder.training.learning_rate is nan"),
        ("autoencoder.training.learning_rate=-1e-3", "autoencoder.training.learning_rate is '-1e-3'"),
        ("autoencoder.training.optimizer=sgd", "autoencoder.training.optimizer is 'sgd': Input should be 'adamw' or 'muon'"),
        ("autoencoder.network.channels=32", "autoencoder.network.channels is 32"),
        ("autoencoder.training.ema=1", "autoencoder.training.ema is 1"),
        ("data=3", "data is 3"),
        ("data.grid.shape=[40, 48, 0]", "data.grid.shape.2 is 0"),
        ("data.grid.spacing_mm=0", "data.grid.spacing_mm.0 is 0"),
        ("covariates=[age]", "covariates.0 is 'age'"),
        ("covariates=[{name: a}]", "covariates.0.kind: Field required"),
        ("covariates=[{name: Brain volume, kind: continuous}]", "covariates.0.name is 'Brain volume'"),
        ("diffusion.network.attention=[no, perhaps]", "diffusion.network.attention.1 is 'perhaps'"),
        ("diffusion.process.kind=cosine", "diffusion.process.kind is 'cosine': Input should be 'flow', 'vp-cosine'"),
        ("generation.guidance_rescale=1.5", "generation.guidance_rescale is 1.5"),
    ],
)
def test_wrong_value_says_where_and_which(error, override, where):
    assert where in error(override)


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["data.grid.shape=[41, 48, 43]"], ["(41, 48, 43)", "downsampling 4", "crop to (40, 48, 40)", "pad to (44, 48, 44)"]),
        (["data.table=scans.csv"], ["either `bids: FOLDER` or `table: FILE.csv`"]),
        (["data.bids=null"], ["either `bids: FOLDER` or `table: FILE.csv`"]),
        (["data.splits.validation=0.6", "data.splits.test=0.4"], ["0.6", "0.4", "no subject to train on"]),
        (["autoencoder.training.accumulation=3"], ["autoencoder.training", "batch_size 8", "multiple of accumulation 3"]),
        (["data.percentiles=[99, 1]"], ["(99.0, 1.0)", "must rise"]),
        (["diffusion.network.attention=[no, no, yes]"], ["one flag for each", "(48, 96)"]),
    ],
)
def test_contradictions(error, overrides, told):
    message = error(*overrides)
    assert all(part in message for part in told), message


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["covariates=[{name: age, kind: continuous}, {name: age, kind: continuous}]"], "different names"),
        (["covariates=[{name: sex, kind: categorical}]"], "categories"),
        (["covariates=[{name: age, kind: continuous, categories: [young, old]}]"], "categories"),
        (["autoencoder.network.channels=[32]"], "channels"),
        (["diffusion.network.head_channels=36"], "36"),
        (["generation.sampler=hoin"], "heun"),
    ],
)
def test_contradictions_do_not_wait_for_stage_2(error, overrides, told):
    """A setting that no network or sampler can be built from is told when the file is read, not after hours of training."""
    assert told in error(*overrides)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=re.escape(f"no config file {tmp_path / 'none.yaml'}")):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="no config file"):
        load_config(tmp_path)


def test_configs_that_come_with_ldm3d_have_names(tmp_path, monkeypatch, capsys, fails):
    """They are copied to be edited, and never over what was edited; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    assert load_config("toy") == load_config(CONFIGS / "toy.yaml")
    command_line("config")
    assert "toy " in capsys.readouterr().out
    command_line("config", "age-and-sex", "--out", "mine.yaml")
    assert Path("mine.yaml").read_bytes() == (CONFIGS / "age-and-sex.yaml").read_bytes()
    assert "there already" in fails("config", "toy", "--out", "mine.yaml")
    assert "did you mean 'toy'" in fails("config", "toyy")
    Path("mine.yaml").rename("toy")
    assert load_config("toy") == load_config(CONFIGS / "age-and-sex.yaml")


@pytest.mark.parametrize("content", [b"name: [1", b"a: b: c", b"\x00\x01", b"name: \xff\xfe", b"\ttabs: 1"])
def test_not_yaml(tmp_path, content):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.yaml is not YAML"):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("content", ["", "just words", "- a\n- b"])
def test_yaml_without_settings(tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(InputError, match="holds no settings"):
        load_config(tmp_path / "bad.yaml")


def test_required_settings_are_asked_for(load):
    with pytest.raises(InputError, match=r"output: Field required.*diffusion\.network: Field required"):
        load(change=lambda values: (values.pop("output"), values["diffusion"].pop("network")))


def test_float16_is_refused_with_a_way_out(load):
    with pytest.raises(InputError, match=r"training\.mixed_precision: float16 is no longer trained in; use bf16.* or no"):
        load("diffusion.training.mixed_precision=fp16")


def test_what_a_stage_hands_on(load):
    assert load().autoencoder.training.keep == "last"
    assert load("diffusion.training.keep=best").diffusion.training.keep == "best"
    with pytest.raises(InputError, match=r"training\.keep is 'first'"):
        load("diffusion.training.keep=first")
