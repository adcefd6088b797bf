"""The site of the documentation: all pages are in its navigation, links are turned rightly, it builds without a warning."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def from_docs(name: str):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site_pages = from_docs("site_pages")


class Loader(yaml.SafeLoader):
    """mkdocs.yml names functions of Python."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def navigation() -> set[str]:
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)]

    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    return set(pages(settings["nav"]))


def test_every_page_is_in_the_navigation():
    own = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    made = {*site_pages.pages().values(), *(f"api/{name}.md" for name in site_pages.API)}
    assert navigation() == own | made


@pytest.mark.parametrize(
    "source, page, link, expected",
    [
        ("README.md", "index.md", "docs/audit.md#how-to-read-it", "audit.md#how-to-read-it"),
        ("README.md", "index.md", "models/README.md", "models/index.md"),
        ("README.md", "index.md", "CITATION.cff", "files/CITATION.cff"),
        ("README.md", "index.md", "https://x.org/docs/a.md", "https://x.org/docs/a.md"),
        ("docs/config.md", "config.md", "../configs", "configs.md"),
        ("docs/config.md", "config.md", "../configs/conditions", "configs.md"),
        ("docs/config.md", "config.md", "#data", "#data"),
        ("docs/notes/brains.md", "notes/brains.md", "../../README.md", "../index.md"),
        ("docs/notes/brains.md", "notes/brains.md", "../images/a.png", "../images/a.png"),
        ("benchmarks/README.md", "benchmarks.md", "../docs/performance.md", "performance.md"),
        ("models/a/README.md", "models/a.md", "../README.md", "index.md"),
    ],
)
def test_links_are_turned(source, page, link, expected):
    assert site_pages.turned(f"see [this]({link})", source, page) == f"see [this]({expected})"


def test_links_in_code_stay():
    text = "```python\na[0](docs/audit.md)\n```\n"
    assert site_pages.turned(text, "README.md", "index.md") == text


def test_modules_of_the_api_are_there():
    for _, parts in site_pages.API.values():
        for part in parts:
            assert (ROOT / f"ldm3d/{part}").is_dir() or (ROOT / f"ldm3d/{part}.py").is_file(), part
            assert site_pages.modules_of(part), part


def test_the_table_of_sizes_has_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs/installation.md").read_text(encoding="utf-8")
    for text in project["dependencies"]:
        assert f"\n| {canonicalize_name(Requirement(text).name)} |" in page, f"{text}: run python docs/sizes.py"
    for extra in project["optional-dependencies"].keys() - {"test"}:
        assert f"| `{extra}` |" in page, extra


class Outside(HTMLParser):
    """Addresses on other hosts that a page loads by itself."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        loads = {"script": "src", "img": "src", "iframe": "src", "link": "href"}
        value = dict(attrs).get(loads.get(tag, ""), "") or ""
        if value.startswith(("http:", "https:", "//")):
            self.found.append(f"{tag} {value}")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(navigation())
    for page in pages:
        outside = Outside()
        outside.feed(page.read_text(encoding="utf-8"))
        assert not outside.found, page
    api = (tmp_path / "site/api/pipeline.html").read_text(encoding="utf-8")
    assert "Generate volumes that show the asked covariates" in re.sub(r"<[^>]+>", "", api)
