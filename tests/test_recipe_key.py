"""`recipe: NAME`: what a config leaves out comes from one that comes with ldm3d, and from nowhere else."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import command_line

from ldm3d.config.read import load_config
from ldm3d.config.recipe import KEYS, SECTIONS, over_recipe, shipped_configs
from ldm3d.config.sections import Config
from ldm3d.errors import InputError

MINE = """
name: mine
output: runs/mine
recipe: brains-4.5mm
data: {bids: data/mine, skull_stripped: true, splits: {test: 0.3}}
covariates: [{name: sex, column: gender, kind: categorical, categories: [F, M]}]
"""


@pytest.fixture
def load(tmp_path):
    def load(more: str = "", *overrides: str, section: str | None = None) -> Config:
        (tmp_path / "mine.yaml").write_text(MINE + more)
        return load_config(tmp_path / "mine.yaml", overrides, section)

    return load


def test_what_is_left_out_is_the_recipe_s_and_the_rest_is_the_user_s(load):
    mine, recipe = load(), load_config("brains-4.5mm")
    assert all(getattr(mine, name) == getattr(recipe, name) for name in SECTIONS)
    assert (mine.data.grid, mine.data.registration) == (recipe.data.grid, recipe.data.registration)
    assert mine.data.splits.test == 0.3 and mine.data.splits.validation == recipe.data.splits.validation == 0.06
    assert (mine.name, mine.output, str(mine.data.bids)) == ("mine", Path("runs/mine"), "data/mine")
    assert mine.schema().names == ["sex"] and recipe.schema().names != ["sex"]


def test_keys_of_the_config_come_before_those_of_its_recipe(load):
    more = """
autoencoder: {l1: 0.5, training: {steps: 7}}
diffusion:
  start: null
  network: {channels: [16, 32], attention: [no, no]}
  time_sampling: {kind: uniform}
"""
    mine, recipe = load(more), load_config("brains-4.5mm")
    assert mine.autoencoder.training == recipe.autoencoder.training.model_copy(update={"steps": 7})
    assert mine.autoencoder.l1 == 0.5 and mine.autoencoder.l2 == recipe.autoencoder.l2 == 10
    assert mine.diffusion.start is None and recipe.diffusion.start
    assert mine.diffusion.network == recipe.diffusion.network.model_copy(
        update={"channels": (16, 32), "attention": (False, False)}
    )
    # Location and scale belong to the recipe's kind, not to this one
    assert (mine.diffusion.time_sampling.location, mine.diffusion.time_sampling.scale) == (0, 1)
    assert load(more, "autoencoder.training.steps=9").autoencoder.training.steps == 9  # --set is the user's word, too
    assert load("", "training.steps=9", section="diffusion").diffusion.training.steps == 9
    other = load("", "recipe=toy", section="autoencoder")
    assert other.data.grid == load_config("toy").data.grid and other.data.registration is None


def test_the_full_text_is_the_same_config(load, tmp_path, capsys):
    mine = load("diffusion: {network: {kind: ldm3d, channels: [16, 32], attention: [no, yes], context_dim: 32}}")
    command_line("config", tmp_path / "mine.yaml", "--set", "seed=5")
    text = capsys.readouterr().out
    (tmp_path / "full.yaml").write_text(text)
    assert "recipe" not in text and "warmup_steps" in text
    assert load_config(tmp_path / "full.yaml").model_dump() == mine.model_copy(update={"seed": 5}).model_dump()
    command_line("config", "age-and-sex", "--full")
    assert "autoencoder:" in capsys.readouterr().out


def test_a_shipped_config_is_short_and_stands_for_what_its_recipe_is():
    short, long = load_config("age-and-sex"), load_config("brains-3mm")
    assert short.diffusion == long.diffusion and short.autoencoder == long.autoencoder and short.generation == long.generation


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_can_be_a_recipe(name, load):
    recipe = load_config(name)
    values = yaml.safe_load(MINE) | {"recipe": name}
    taken = over_recipe(values)
    assert set(taken) >= {"autoencoder", "diffusion"} and set(taken["data"]) <= {*KEYS, "bids", "skull_stripped"}
    if not any(getattr(each, "tells", ()) for each in recipe.diffusion.conditions):  # of covariates that are missing here
        assert Config.model_validate(taken).diffusion == recipe.diffusion


@pytest.mark.parametrize(
    "override, said",
    [
        ("recipe=brains-3m", "did you mean 'brains-3mm'?"),
        ("recipe=[toy]", "give the name of a config"),
        ("recip=toy", "did you mean 'recipe'?"),
        ("diffusion.training.step=3", "did you mean 'steps'? (over recipe brains-4.5mm"),
        ("data.grid.shape=[41, 48, 40]", "(over recipe brains-4.5mm"),
        ("data=words", "(over recipe brains-4.5mm"),
        ("recipe=null", "`recipe: brains-3mm` takes it from"),
    ],
)
def test_what_is_wrong_is_said_with_both_names(load, tmp_path, override, said):
    with pytest.raises(InputError) as caught:
        load("", override)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: ") and said in str(caught.value)


def test_what_an_experiment_stores_needs_no_recipe(load):
    """So a later version, whose recipe is another, still evaluates a model as it was trained."""
    stored = json.loads(json.dumps(load().model_dump(mode="json", exclude_unset=True)))  # as `save_experiment` does
    assert "recipe" not in stored and Config.model_validate(stored) == load()
