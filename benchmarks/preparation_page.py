"""How large is the page of 2,000 prepared scans, and how soon does Chromium show it?

    python benchmarks/preparation_page.py SCAN [SCAN ...] [--num 2000] [--out FOLDER]

SCANs are stripped brains or whole heads. Each is brought to 160x224x160 voxels of 1 mm around its foreground, where pictures
are as large as they get. They are repeated until there are `--num`; each gets its own grain, so that no two pictures compress
alike. Sites, ages, cuts and failures are made up. Needs chromium and chromedriver (Debian: apt-get install chromium-driver).

    page_mb          size of report.html
    write_s          to judge all scans and write the page
    load_s           until Chromium has the whole page
    shown_s          until it has drawn the top
    to_the_last_s    from a click on the name of the last scan that a table links to, until its picture is drawn

`--out` keeps the page and pictures of its top and of that scan. They show the scans.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from ldm3d.config.read import load_config
from ldm3d.config.sections import Config
from ldm3d.data.nifti import read_volume
from ldm3d.data.placing import grid_of, to_grid
from ldm3d.data.preparing import Prepared
from ldm3d.data.quality import look_at, write_look
from ldm3d.report.preparation import write_preparation

GRID = "data.grid={shape: [160, 224, 160], spacing_mm: 1}"
DRAWN = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", type=Path)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        config = load_config("age-and-sex", [f"output={folder}", f"data.bids={temporary}", GRID])
        done = stand_ins(config, arguments.scans, arguments.num)
        start = time.perf_counter()
        page = write_preparation(config, done)
        found = {"page_mb": page.stat().st_size / 1e6, "write_s": time.perf_counter() - start}
        found |= opened(page, arguments.out)
    print("\n".join(f"{name}\t{value:.2f}" for name, value in found.items()))


def stand_ins(config: Config, scans: list[Path], num: int) -> Prepared:
    """What `prepare` would have left: a look for each scan, and a table."""
    random = np.random.default_rng(0)
    volumes = config.prepared_folder / "volumes"
    volumes.mkdir(parents=True, exist_ok=True)
    grid = grid_of(config.data.grid)
    looks = [look_at(to_grid(*read_volume(path), grid, config.data.percentiles)[0], grid.spacing_mm) for path in scans]
    for i in range(num):
        look = looks[i % len(looks)]
        grain = random.normal(0, 4, look["picture"].shape) * (look["picture"] > 20)
        picture = np.clip(look["picture"] + grain, 0, 255).astype(np.uint8)
        measures = look["measures"] * random.lognormal(0, 0.1, len(look["measures"]))
        write_look(volumes / f"{i:020x}.npz", look | {"picture": picture, "measures": measures})
    table = pd.DataFrame(
        {
            "subject": [f"{i:05d}" for i in range(num)],
            "session": "",
            "path": [f"sub-{i:05d}/anat/sub-{i:05d}_T1w.nii.gz" for i in range(num)],
            "key": [f"{i:020x}" for i in range(num)],
            "split": random.choice(["train", "validation", "test"], num, p=[0.7, 0.1, 0.2]),
            "age": random.uniform(20, 90, num).round(),
            "sex": random.choice(["F", "M"], num),
        }
    )
    told = [{"cut_mm": round(max(random.normal(-4, 4), 0), 1), "correlation": random.uniform(0.9, 0.97)} for _ in range(num)]
    failed = table.iloc[:20, :3].assign(path=table["path"][:20], reason="the file is cut short")
    return Prepared(table, told, [], num, 0, failed, 1.0)


def opened(page: Path, out: Path | None) -> dict[str, float]:
    """Seconds in a fresh Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        driver.set_window_size(1300, 1000)
        driver.get(page.resolve().as_uri())
        shown = driver.execute_async_script(DRAWN)
        load = driver.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
        if out:
            driver.save_screenshot(str(out / "top.png"))
        before = driver.execute_script("return performance.now()")
        name = driver.execute_script(
            "const all = [...document.querySelectorAll('td a')]; const rank = a => +a.hash.split('-')[1];"
            "const last = all.reduce((a, b) => rank(b) > rank(a) ? b : a); last.click(); return last.hash.slice(1)"
        )
        picture = "document.getElementById(arguments[0]).querySelector('img')"
        driver.execute_script(f"return {picture}.decode()", name)
        after = driver.execute_async_script(DRAWN)
        seen = driver.execute_script(f"const b = {picture}.getBoundingClientRect(); return [b.top, b.height]", name)
        if not (0 <= seen[0] < 1000 and seen[1] > 20):
            raise RuntimeError(f"the link did not lead to the picture of {name}: it lies at {seen}")
        if out:
            driver.save_screenshot(str(out / "linked.png"))
        return {"load_s": load / 1000, "shown_s": shown / 1000, "to_the_last_s": (after - before) / 1000}
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
