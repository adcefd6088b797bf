"""What a BIDS dataset says of itself: name, licence, DOI and how it wants to be cited, from its dataset_description.json."""

import json
from pathlib import Path
from typing import Any

DESCRIPTION = "dataset_description.json"
_LONGEST = 1000  # letters of a text, entries of a list: the file is somebody else's


def source_of(dataset: Path | None) -> dict[str, Any]:
    """Name, licence, authors, doi, cite and links of a dataset, as far as its description has them.

    Args:
        dataset: BIDS folder; None: there is none.

    Returns:
        Texts in one line, `authors` and `links` lists of them. Empty where there is no description that can be read.
    """
    try:
        values = json.loads((dataset / DESCRIPTION).read_text(encoding="utf-8")) if dataset else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    texts = {
        key: _line(values.get(name)) for key, name in (("name", "Name"), ("licence", "License"), ("cite", "HowToAcknowledge"))
    }
    texts["doi"] = _line(values.get("DatasetDOI")).removeprefix("doi:").removeprefix("https://doi.org/")
    lists = {key: _lines(values.get(name)) for key, name in (("authors", "Authors"), ("links", "ReferencesAndLinks"))}
    return {key: value for key, value in {**texts, **lists}.items() if value}


def _line(text: Any) -> str:
    return " ".join(text.split())[:_LONGEST] if isinstance(text, str) else ""


def _lines(texts: Any) -> list[str]:
    return [line for text in (texts if isinstance(texts, list) else [texts])[:_LONGEST] if (line := _line(text))]
