"""Write docs/config.md, the reference of all config keys, from the models in ldm3d/config/.

    python docs/config_reference.py

Types, limits and defaults come from the models. What a key means is in config_reference.yaml, an entry for each key: a key
without an entry, or an entry without a key, is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm3d.config.sections import Config

HERE = Path(__file__).parent
PAGE, DESCRIPTIONS = HERE / "config.md", HERE / "config_reference.yaml"
WORDS = {"integer": "whole number", "number": "number", "boolean": "yes or no", "string": "text", "object": "mapping"}

HEAD = """\
# Config reference

All keys of an experiment's YAML file. This page is generated from the code (`python docs/config_reference.py`).

- Relative paths start at the current directory.
- An unknown key is an error, and the message names the nearest valid key.
- `--set key=value` overrides any key on the command line, for example `--set diffusion.training.steps=500`.
- Configs that work are in [`configs/`](../configs): `age-and-sex.yaml`, `brains-4.5mm.yaml`, `brains-3mm.yaml`,
  `brain-1mm.yaml` and `toy.yaml`.
- `recipe: brains-3mm` takes what a config leaves out from one of them: `autoencoder`, `diffusion`, `decoder`,
  `generation`, and `grid`, `registration` and `splits` of `data`. Keys that you write come first, one by one; `null`
  switches one off, and a section of another `kind` replaces the recipe's. The covariates, and where the data lie, are
  always your own. `ldm3d config FILE` prints the whole of both, with all defaults.
"""


def type_of(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words: "whole number > 0", "list of 3 numbers", "`adamw` or `muon`"."""
    if "anyOf" in schema:
        return " or ".join(type_of(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if "oneOf" in schema or "$ref" in schema:
        return "section"
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{value}`" for value in values[:-1]) + " or " * (len(values) > 1) + f"`{values[-1]}`"
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}: {type_of(schema['prefixItems'][0])}"
        return f"list of: {type_of(schema['items'])}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = " and ".join(f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema)
    return f"{'path' if schema.get('format') == 'path' else WORDS[schema['type']]} {limits}".rstrip()


def default_of(name: str, section: Mapping[str, Any]) -> str:
    """A key's default as YAML has it, or that it must be given."""
    schema = section["properties"][name]
    if name in section.get("required", ()):
        return "required"
    if "$ref" in schema:
        return "see below"
    value = schema.get("default", {})
    if isinstance(value, bool):
        return "`yes`" if value else "`no`"
    return "none" if value in (None, "", {}, []) else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def sections_in(schema: Mapping[str, Any]) -> list[str]:
    """Names of the sections that a key may hold."""
    if "$ref" in schema:
        return [schema["$ref"].rpartition("/")[2]]
    choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *([schema["items"]] if "items" in schema else [])]
    return [name for choice in choices for name in sections_in(choice)]


def owners(sections: Mapping[str, Any]) -> dict[str, list[str]]:
    """Section -> the keys that hold it, in the order of the file."""
    places: dict[str, list[str]] = {"Config": []}

    def walk(owner: str, prefix: str) -> None:
        for name, schema in sections[owner]["properties"].items():
            for inner in sections_in(schema):
                places.setdefault(inner, []).append(f"{prefix}{name}")
                walk(inner, f"{prefix}{name}.")

    walk("Config", "")
    return places


def library_of(section: Mapping[str, Any]) -> str:
    """Whose network, or which kind of condition, a section is of, for its heading; "" for other sections."""
    kind = section["properties"].get("kind", {})
    return ", MONAI" if "monai" in kind.get("enum", ()) else f", {kind['const']}" if "const" in kind else ""


def page() -> str:
    """The whole of docs/config.md."""
    root = Config.model_json_schema()
    sections = {"Config": root, **root["$defs"]}
    descriptions = yaml.safe_load(DESCRIPTIONS.read_text(encoding="utf-8"))
    keys = {f"{owner}.{name}" for owner in sections for name in sections[owner]["properties"]}
    described = {f"{owner}.{name}" for owner, texts in descriptions.items() for name in texts if name != "about"}
    if keys != described:
        raise SystemExit(f"{DESCRIPTIONS.name} lacks {sorted(keys - described)} and has unknown {sorted(described - keys)}")
    parts = [HEAD]
    for owner, places in owners(sections).items():
        section, texts = sections[owner], descriptions[owner]
        parts.append(f"\n## {', '.join(f'`{place}`' for place in places) or 'Top level'}{library_of(section)}\n\n")
        if "about" in texts:
            parts.append(f"{texts['about']}\n\n")
        parts.append("| key | type | default | meaning |\n|---|---|---|---|\n")
        for name, schema in section["properties"].items():
            parts.append(f"| `{name}` | {type_of(schema)} | {default_of(name, section)} | {texts[name]} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
