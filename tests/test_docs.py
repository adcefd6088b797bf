"""The documentation is up to date: links, anchors, named files, imports of examples, the reference of config keys.

Commands and settings: tests/test_commands.py; examples that run: tests/test_examples.py; the site: tests/test_site.py.
"""

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks/README.md"]
INSTALLED = "ldm3d/weights/"  # in a wheel alone
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"`((?:ldm3d|tests|benchmarks|docs|configs|containers)/(?:[\w./-]+(?:\.\w+|/))?)`")
CODE = re.compile(r"```.*?```", re.DOTALL)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Of all headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_config_reference_is_todays():
    done = subprocess.run(
        [sys.executable, "-c", "import config_reference; print(config_reference.page(), end='')"],
        cwd=ROOT / "docs",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs/config.md").read_text(encoding="utf-8"), "run python docs/config_reference.py"


@every_page
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists() and there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


@every_page
def test_blocks_open_and_close_on_lines_of_their_own(page):
    """Else they are prose to readers, and to the tests of commands."""
    fences = [line for line in page.read_text(encoding="utf-8").splitlines() if "```" in line]
    assert [line for line in fences if not re.fullmatch(r"```\w*", line)] == []
    assert len(fences) % 2 == 0 and not any(line != "```" for line in fences[1::2])


@every_page
def test_named_files_exist(page):
    for name in NAMED.findall(page.read_text(encoding="utf-8")):
        assert name == INSTALLED or (ROOT / name).exists(), name


@every_page
def test_imports_of_examples_work(page):
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        for module, names in re.findall(r"^from (ldm3d[\w.]*) import (.+)$", block, re.MULTILINE):
            for name in names.split(", "):
                found = hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")
                assert found, (module, name)


def test_every_page_is_found_from_the_readme():
    found, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        found.add(page)
        names = {target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8"))}
        pages = {(page.parent / name).resolve() for name in names if name.endswith(".md")}
        waiting += pages - found - set(waiting)
    assert set((ROOT / "docs").rglob("*.md")) <= found


def test_each_extra_is_told_with_its_size():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    page = (ROOT / "docs/installation.md").read_text(encoding="utf-8")
    for extra in extras:
        assert len(re.findall(rf"^\| `{extra}` \|", page, re.MULTILINE)) == 2, f"{extra}: what for, and how large"


@every_page
def test_lines_of_prose_are_short(page):
    if page.parent.name == "benchmarks":
        return
    for line in CODE.sub("", page.read_text(encoding="utf-8")).splitlines():
        assert len(line) <= 120 or line.startswith(("|", "!")), line
