"""What the documentation's site adds to the pages of docs/, as a hook of MkDocs (mkdocs.yml).

The pages of docs/ are written for a code host: links lead to files of the repository. The site takes in what they lead to
outside of docs/ (README, model cards, configs, ...), and turns the links. Its pages of the Python API are made here, too, one
for each part of the package.
"""

import ast
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)

# File of the repository -> page of the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "benchmarks.md",
    "models/README.md": "models/index.md",
    "configs": "configs.md",
}
# Page of the API -> what it is about, modules or folders of ldm3d
API = {
    "pipeline": ("Pipeline", ["pipeline", "networks", "applied", "generation/run", "export", "hub"]),
    "applications": ("Given scans", ["applications"]),
    "data": ("Data", ["geometry", "covariates", "data/placing", "data/nifti", "data/labels", "data/derivative", "dicom"]),
    "models": ("Networks", ["models"]),
    "diffusion": ("Diffusion", ["diffusion", "start"]),
    "training": ("Training", ["training/task", "training/loop", "training/autoencoder", "training/diffusion"]),
    "measures": ("Measures", ["metrics", "rulers", "statistics"]),
    "privacy": ("Privacy", ["privacy"]),
    "foundations": ("Foundations", ["randomness", "precision", "errors", "config/read"]),
}


def on_files(files: Files, config: Any) -> Files:
    for source, page in pages().items():
        files.append(File.generated(config, page, content=text_of(source)))
    for name, (title, parts) in API.items():
        files.append(File.generated(config, f"api/{name}.md", content=api_page(title, parts)))
    for name in linked_files():
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with links to places of the site."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    source = next((name for name, there in pages().items() if there == page.file.src_uri), f"docs/{page.file.src_uri}")
    return turned(markdown, source, page.file.src_uri)


def pages() -> dict[str, str]:
    """`PAGES` and the cards of all models."""
    cards = sorted(ROOT.glob("models/*/README.md"))
    return PAGES | {card.relative_to(ROOT).as_posix(): f"models/{card.parent.name}.md" for card in cards}


def page_of(source: str) -> str | None:
    """The page of a file or folder outside of docs/; all configs are on one."""
    return pages()["configs"] if source.startswith("configs/") else pages().get(source)


def text_of(source: str) -> str:
    path = ROOT / source
    if path.is_file():
        return path.read_text(encoding="utf-8")
    files = sorted(path.rglob("*.yaml"))
    shown = [f"## {file.relative_to(path).as_posix()}\n\n```yaml\n{file.read_text(encoding='utf-8')}```\n" for file in files]
    return (
        "# Configs that work\n\nThe files of the folder `configs/`. [Every key](docs/config.md) is explained.\n\n"
        + "\n".join(shown)
    )


def turned(markdown: str, source: str, page: str) -> str:
    """Links of a file of the repository, as its page of the site needs them; those in code blocks stay."""

    def turn(link: re.Match) -> str:
        target = link[2]
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        folder = "" if source == "configs" else PurePosixPath(source).parent.as_posix()
        there = os.path.normpath(os.path.join(folder, target)).replace(os.sep, "/")
        on_site = page_of(there) or (there.removeprefix("docs/") if there.startswith("docs/") else f"files/{there}")
        return f"{link[1]}{os.path.relpath(on_site, PurePosixPath(page).parent)}{link[3] or ''}{link[4]}"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(turn, part) for part in parts)


def linked_files() -> set[str]:
    """Files outside of docs/ that pages link to and that are no pages of the site."""
    found = set()
    for source in [*pages(), *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]:
        if (ROOT / source).is_dir():
            continue
        for _, target, *_ in LINK.findall(FENCE.sub("", text_of(source))):
            there = os.path.normpath(os.path.join(PurePosixPath(source).parent, target))
            if "://" not in target and not page_of(there) and not there.startswith("docs/") and (ROOT / there).is_file():
                found.add(there)
    return found


def api_page(title: str, parts: list[str]) -> str:
    """A section for each module, made by mkdocstrings from its docstrings."""
    modules = [module for part in parts for module in modules_of(part)]
    return f"# {title}\n\n" + "\n".join(f"::: ldm3d.{module.replace('/', '.')}\n" for module in modules)


def modules_of(part: str) -> list[str]:
    """A module, or those of a folder that document anything."""
    folder = ROOT / "ldm3d" / part
    if not folder.is_dir():
        return [part]
    files = [file for file in sorted(folder.glob("*.py")) if file.name != "__init__.py"]
    return [f"{part}/{file.stem}" for file in files if documents(file)]


def documents(file: Path) -> bool:
    """Whether a class or function that others may use has a docstring."""
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    public = [node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"]
    return any(ast.get_docstring(node) for node in public)
