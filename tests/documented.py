"""What the documentation tells users to type: blocks of its pages, and the commands in those of shell."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "models").rglob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ENDS = {";", "&&", "||", "|"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Content of all blocks of a language; "" for those without one."""
    return [text for found, text in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(text: str) -> list[list[str]]:
    """Words of each command of a shell block, without comments and leading NAME=VALUE; those in quotes are one word."""
    found, waiting = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        waiting += line + "\n"
        try:
            lexer = shlex.shlex(waiting, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words = list(lexer)
        except ValueError:  # a quotation that goes on
            continue
        waiting = ""
        command: list[str] = []
        for word in [*words, ";"]:
            if word in ENDS:
                found += [command] if command else []
                command = []
            elif command or not re.fullmatch(r"\w+=.*", word):
                command.append(word)
    if waiting.strip():
        raise ValueError(f"a quotation does not end: {waiting}")
    return found
