"""Untrusted YAML as plain Python values; what would exhaust the memory, repeats a key or is no YAML is refused."""

import unicodedata
from pathlib import Path
from typing import Any

import yaml

from ldm3d.errors import InputError, shown

MAX_FILE_BYTES = 2**16  # of a config: thirty times the longest that is shipped
MAX_VALUES = 10_000  # in a config, every alias written out


def read_yaml(path: Path) -> Any:
    """A file of settings as plain Python values; see `parse_yaml`."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes; a file of settings has at most {MAX_FILE_BYTES:,}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """YAML as plain Python values.

    Args:
        text: one document.
        source: its name in messages.

    Raises:
        InputError: no YAML; nested too deeply; more than MAX_VALUES values once aliases are written out (a few lines of them
            can stand for billions); a key twice in one mapping, of which PyYAML would silently take the last; control
            characters.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, source, {}) > MAX_VALUES:
            raise InputError(f"{source} stands for more than {MAX_VALUES:,} values; write without aliases what is meant")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{source} is nested too deeply for settings") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # Raised by PyYAML itself for dates like 2024-99-99, numbers of 5,000 digits and tags such as !!bool 7
        raise InputError(f"{source} is not YAML: one of its values cannot be read ({error})") from None


def _count(node: yaml.Node, source: str, counts: dict[int, int]) -> int:
    """Values below a node of the YAML tree, itself included, every alias written out; `counts` holds those of other nodes."""
    if id(node) in counts:
        if not counts[id(node)]:
            raise InputError(f"{source} line {node.start_mark.line + 1}: the alias stands within what it stands for")
        return counts[id(node)]
    counts[id(node)] = 0  # not known yet: an alias that meets it now lies inside it
    children = []
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise InputError(f"{source} line {key.start_mark.line + 1}: {shown(key.value)} is there twice; keep one")
            names.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            children += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n" for letter in node.value):
        raise InputError(f"{source} line {node.start_mark.line + 1}: {shown(node.value)} holds a control character")
    counts[id(node)] = 1 + sum(_count(child, source, counts) for child in children)
    return counts[id(node)]
