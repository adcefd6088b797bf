"""Write which room of ldm3d imports which, as a table in docs/architecture.md, from the top down.

    python docs/arrows.py

Imports are read from the source. Those that follow from others (a imports b, b imports c, a imports c) are left out, and
so is `errors`, which all import.
"""

import ast
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "ldm3d"
PAGE, BEGIN, END = HERE / "architecture.md", "<!-- arrows: made by docs/arrows.py -->\n", "<!-- end of arrows -->"
LEFT_OUT = {"errors", "__init__", "__main__", "applied"}  # the last: methods of the pipeline, which look up applications


def room(module: str) -> str:
    return module.split(".")[0]


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Room -> the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        own = room(".".join(path.relative_to(package).with_suffix("").parts))
        used = found.setdefault(own, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "ldm3d":
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldm3d."):
                used.add(room(node.module.removeprefix("ldm3d.")))
    return {own: (used & found.keys()) - {own} - LEFT_OUT for own, used in found.items() if own not in LEFT_OUT}


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that a room imports, through others, too."""
    found, waiting = set(), list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def height(graph: dict[str, set[str]], own: str) -> int:
    """Length of the longest way down."""
    return max((1 + height(graph, used) for used in graph[own]), default=0)


def named(rooms: set[str]) -> str:
    return " ".join(f"`{name}`" for name in sorted(rooms))


def drawing() -> str:
    """The graph as a table: a room stands above all that it imports."""
    graph = imports()
    lines = ["| module | imports |", "|---|---|"]
    for own in sorted(filter(graph.get, graph), key=lambda own: (-height(graph, own), own)):
        indirect = set().union(*(reached(graph, used) for used in graph[own]))
        lines.append(f"| `{own}` | {named(graph[own] - indirect)} |")
    lines.append(f"| {named({own for own, used in graph.items() if not used})} | nothing |")
    return "\n".join([*lines, ""])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + drawing() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
