"""No command and no setting in README and docs is stale: each is parsed by what would run it, and nothing is run."""

import functools
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from documented import PAGES, ROOT, blocks, commands, name_of
from torch.distributed.run import get_args_parser

from ldm3d.cli import app
from ldm3d.cli.generation import requested
from ldm3d.config.read import load_config
from ldm3d.config.recipe import over_recipe
from ldm3d.config.sections import Config
from ldm3d.pipeline import Pipeline

APP = typer.main.get_command(app)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODEL = "brains-4.5mm"
# Programs of others, whose options are not known here; and words of the shell
OTHERS = {"cp", "mkdir", "tar", "conda", ".", "export", "head", "[", "scontrol", "mri_synthseg", "pre-commit", "hf"}
BASE = over_recipe(yaml.safe_load((ROOT / "configs/age-and-sex.yaml").read_text(encoding="utf-8")))


def of_blocks(language: str) -> list:
    return [
        pytest.param(text, id=f"{name_of(page)}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks(page, language))
    ]


# Commands


def check(words: list[str]) -> None:
    """Raise unless what this command calls is there and takes these arguments."""
    program, *rest = words
    if program in OTHERS:
        return
    CHECKS[program](rest)


def ldm3d_takes(words: list[str]) -> None:
    name, *arguments = words
    assert name in APP.commands, f"ldm3d has no command {name}"
    command = APP.commands[name]
    context = command.make_context(name, list(arguments))  # unknown options, missing arguments and wrong values raise
    config = ROOT / str(context.params.get("config", ""))
    if context.params.get("override") and config.is_file():
        load_config(config, context.params["override"])
    if name == "generate":
        asked = requested(context.args, context.params["ask"])
        model = str(context.params["model"])
        if model == MODEL:
            shipped_model().parse([asked])
        assert all(re.fullmatch(r"[a-z]\w*", covariate) for covariate in asked)


@functools.cache
def shipped_model() -> Pipeline:
    return Pipeline.from_pretrained(MODEL, "cpu")


def module_takes(module: str, arguments: list[str]) -> None:
    """`python -m MODULE ARGUMENTS`, or by a launcher."""
    if module == "ldm3d":
        return ldm3d_takes(arguments)
    assert importlib.util.find_spec(module), f"there is no module {module}"
    if module.startswith("ldm3d.training."):
        config, *options = arguments
        assert options[::2] == ["--set"] * (len(options) // 2) and len(options) % 2 == 0, options
        path = ROOT / config if (ROOT / config).is_file() else ROOT / "configs/toy.yaml"
        load_config(path, options[1::2], module.rpartition(".")[2])


def python_takes(words: list[str]) -> None:
    if words[0] == "-m":
        return module_takes(words[1], words[2:])
    script = ROOT / words[0]
    assert script.is_file(), f"there is no {words[0]}"
    source = script.read_text(encoding="utf-8")
    if "from held_out import" in source:  # whose options many scripts take
        source += (script.parent / "held_out.py").read_text(encoding="utf-8")
    for option in (word for word in words[1:] if word.startswith("--")):
        assert f'"{option}"' in source, f"{words[0]} has no {option}"


def make_takes(words: list[str]) -> None:
    for word in words:
        name, setting, _ = word.partition("=")
        there = rf"^{name} \?=|\$\({name}\)|\$\(if \$\({name}\)" if setting else rf"^{re.escape(name)}:"
        assert re.search(there, MAKEFILE, re.MULTILINE), f"the Makefile has no {word}"


def pip_takes(words: list[str]) -> None:
    assert words[0] == "install", words
    for word in words[1:]:
        if found := re.fullmatch(r"(?:\.|ldm3d)\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= PROJECT["optional-dependencies"].keys(), word
        else:
            assert word in {".", "ldm3d", "uv"}, f"what is {word}?"


def uv_takes(words: list[str]) -> None:
    if words[0] != "venv":
        assert words[0] == "pip", words
        pip_takes(words[1:])


def launcher_takes(parser, words: list[str]) -> None:
    """Options of torchrun and accelerate by their own parsers; then the module."""
    arguments = parser.parse_args([word.replace("$SLURM_NNODES", "4") for word in words])
    assert arguments.module
    module_takes(arguments.training_script, arguments.training_script_args)


def accelerate_takes(words: list[str]) -> None:
    assert words[0] == "launch"
    launcher_takes(launch_command_parser(), words[1:])


def container_takes(words: list[str]) -> None:
    """Docker and Apptainer: what is run inside, or the recipe that is built."""
    image = next(word for word in words if word in {"ldm3d", "ldm3d.sif"})
    inside = words[words.index(image) + 1 :]
    if words[0] == "run":
        ldm3d_takes(inside)
    elif words[0] == "exec":
        check(inside)
    else:
        assert words[0] == "build" and all((ROOT / word).exists() for word in words if word.startswith("containers/"))


def srun_takes(words: list[str]) -> None:
    while words[0].startswith("--"):
        words = words[1:]
    if words[:2] != ["bash", "-c"]:
        return check(words)
    for command in commands(words[2]):
        check(command[1:] if command[0] == "exec" else command)


CHECKS = {
    "ldm3d": ldm3d_takes,
    "python": python_takes,
    "make": make_takes,
    "pip": pip_takes,
    "uv": uv_takes,
    "accelerate": accelerate_takes,
    "torchrun": lambda words: launcher_takes(get_args_parser(), words),
    "docker": container_takes,
    "apptainer": container_takes,
    "srun": srun_takes,
}


@pytest.mark.parametrize("text", of_blocks("bash"))
def test_commands_are_there(text):
    for command in commands(text):
        check(command)


@pytest.mark.parametrize(
    "stale, why",
    [
        ("ldm3d generat MODEL --out x", "no command generat"),
        ("ldm3d evaluate MODEL --data x --out y --voluems 3", "--voluems"),
        ("ldm3d evaluate MODEL --out y", "data"),
        ("ldm3d generate brains-4.5mm --hight 3 --out x", "hight"),
        ("ldm3d prepare configs/toy.yaml --set data.grid.spacings=3", "spacings"),
        ("FAST=1 make tests", "no tests"),
        ("make bench MODELS=x", "no MODELS"),
        ("python benchmarks/nothing.py", "no benchmarks/nothing.py"),
        ("python benchmarks/memory.py --quik", "has no --quik"),
        ("python -m ldm3d.nothing", "no module ldm3d.nothing"),
        ("accelerate launch -m ldm3d.training.diffusion configs/toy.yaml --set training.step=3", "training.step'"),
        ("torchrun --nproc_per_node 2 -m ldm3d generat MODEL --out x", "no command generat"),
        ("pip install 'ldm3d[everything]'", "everything"),
        ("docker run ldm3d generat x", "no command generat"),
        ("srun --ntasks=1 bash -c '\n  exec python -m ldm3d.training.diffusio CONFIG'", "diffusio"),
        ("curl something", "curl"),
    ],
)
def test_a_stale_command_is_found(stale, why):
    with pytest.raises(Exception) as caught:
        for command in commands(stale):
            check(command)
    assert why in f"{caught.value} {getattr(caught.value, 'message', '')} {getattr(caught.value, 'param', '')}"


def test_reading_a_block():
    text = "# a comment\nA=1 ldm3d x --y 'a b' \\\n    --z   # why\nmake a && make b; srun bash -c '\n  c d'\n"
    expected = [["ldm3d", "x", "--y", "a b", "--z"], ["make", "a"], ["make", "b"], ["srun", "bash", "-c", "\n  c d"]]
    assert commands(text) == expected


# Settings


def merged(base: dict, new: dict) -> dict:
    """The base with these settings; a network of another kind and other data replace what is there."""
    if "kind" in new:
        return new
    base = {key: value for key, value in base.items() if not ({"bids", "table"} <= {key, *new} and key not in new)}
    both = {key: merged(base[key], new[key]) for key in base.keys() & new.keys() if isinstance(new[key], dict) and base[key]}
    return {**base, **new, **both}


@pytest.mark.parametrize("text", of_blocks("yaml"))
def test_settings_are_valid(text):
    """Each block on top of a config that works; a list is one of covariates, and other files are known by their keys."""
    settings = yaml.safe_load(text)
    settings = {"covariates": settings} if isinstance(settings, list) else settings
    if settings.keys() == {"scale_factor", "ranges"}:  # of a published model, see docs/monai.md
        return
    base = {} if "recipe" in settings else BASE  # such a block is a whole config
    Config.model_validate(over_recipe(merged(base, settings)))


def test_a_stale_setting_is_found():
    with pytest.raises(ValueError, match="spacings_mm"):
        test_settings_are_valid("data: {grid: {shape: [56, 72, 56], spacings_mm: 3}}")


@pytest.mark.parametrize("text", of_blocks("python"))
def test_examples_in_python_compile(text):
    compile(text, "example", "exec")


def test_every_block_has_a_language():
    """So that none escapes these tests by a misspelt one; tables of text have none."""
    known = {"bash", "yaml", "python", ""}
    for page in PAGES:
        found = set(re.findall(r"^```(\w+)", Path(page).read_text(encoding="utf-8"), re.MULTILINE))
        assert found <= known, name_of(page)
        assert not [text for text in blocks(page, "") if "ldm3d " in text], name_of(page)
