"""Run the Python code of docs/gallery.md, which writes its pictures into docs/images.

python docs/gallery.py
"""

import os
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE, IMAGES = HERE / "gallery.md", HERE / "images"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def main() -> None:
    os.chdir(IMAGES)
    names: dict[str, object] = {}
    for block in PYTHON.findall(PAGE.read_text(encoding="utf-8")):
        exec(compile(block, PAGE.name, "exec"), names)


if __name__ == "__main__":
    main()
