"""The results of all parts as Markdown."""

import json
from pathlib import Path

from gpu_parts.part import shortened

MOST_BYTES = 16e6  # of the folder of results


def write_summary(folder: Path, titles: dict[int, str]) -> Path:
    """Write FOLDER/summary.md from what the parts have left there."""
    lines = ["# What a GPU has shown", ""]
    for number, title in titles.items():
        path = folder / f"part-{number}-{title}.json"
        lines += [f"## Part {number}: {title}", ""]
        lines += of_part(json.loads(path.read_text())) if path.is_file() else ["Not run."]
        lines.append("")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        lines.append(f"The results take {size / 1e6:.0f} MB, more than the {MOST_BYTES / 1e6:.0f} MB that they should.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text("\n".join(lines) + "\n")
    return folder / "summary.md"


def of_part(state: dict) -> list[str]:
    """Machine, a table of the items, what failed and what was left out."""
    lines = [", ".join(f"{name} {value}" for name, value in state["machine"].items()), ""]
    lines += ["| item | result |", "|---|---|"]
    for name, result in state["items"].items():
        text = ", ".join(f"{key} {value}" for key, value in shortened(result).items())
        lines.append(f"| {name} | {text} |".replace("\n", " "))
    for key, heading in (("failed", "Failed"), ("left_out", "Left out")):
        if state[key]:
            lines += ["", f"{heading}:", ""]
            lines += [f"- {name}: {reason.strip().splitlines()[-1]}" for name, reason in state[key].items()]
    return [*lines, "", "Complete." if state["complete"] else "Not complete: run the same command to continue."]
