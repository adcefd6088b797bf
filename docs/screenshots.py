"""Pictures of the page of `ldm3d serve`, taken in headless Chromium, for docs/serve.md; all brains in them are synthetic.

python docs/screenshots.py [MODEL]     # needs chromium and chromedriver, and Selenium of ldm3d[test]
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

import ldm3d

IMAGES = Path(__file__).parent / "images"


class Shown:
    """The page in a browser, with WebGL2 by software or without any."""

    def __init__(self, address: str, webgl: bool = False):
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        by_software = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
        common = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars")
        for argument in (*common, *(by_software if webgl else ("--disable-3d-apis",))):
            options.add_argument(argument)
        self.driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
        self.driver.set_window_size(1300, 1000)
        self.driver.get(address)

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def set(self, element: str, value, event: str = "change") -> None:
        script = (
            "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event(arguments[2]))"
        )
        self.run(script, element, value, event)

    def click(self, element: str) -> None:
        self.run("document.getElementById(arguments[0]).click()", element)

    def until(self, holds: Callable[[dict], bool]) -> None:
        """Wait for a full volume whose request is such."""
        end = time.monotonic() + 1800
        while self.run("return document.body.dataset.state") != "full" or not holds(
            json.loads(self.run("return document.body.dataset.shown"))
        ):
            if self.run("return document.body.dataset.state") == "failed" or time.monotonic() > end:
                raise RuntimeError(self.run("return document.getElementById('status').textContent"))
            time.sleep(0.1)

    def shoot(self, name: str) -> None:
        time.sleep(0.5)
        self.driver.set_window_size(1300, self.run("return document.documentElement.scrollHeight") + 140)
        time.sleep(0.5)
        self.driver.save_screenshot(str(IMAGES / f"{name}.png"))


def two_ages(page: Shown, name: str) -> None:
    """A person of 53 and of 85 years beside each other."""
    page.until(lambda request: True)
    page.set("ask-age", 53)
    page.until(lambda request: request["covariates"]["age"] == 53)
    page.click("keep")
    page.set("ask-age", 85)
    page.until(lambda request: request["covariates"]["age"] == 85)
    time.sleep(5)  # until all three are drawn by software
    page.shoot(name)


def restored(page: Shown, scan: Path) -> None:
    """A scan that lacks slices."""
    page.click("drop")
    page.set("ask-age", 40)
    page.driver.find_element("id", "file").send_keys(str(scan))
    while page.run("return document.getElementById('own').hidden"):
        time.sleep(0.1)
    page.click("own")
    page.set("work", "restore")
    page.set("slices", "18-23")
    page.click("begin")
    page.until(lambda request: request.get("work") == "restore")
    page.shoot("serve-scan")


def main(model: str) -> None:
    """Two ages of a person by NiiVue and on a canvas; then a synthetic scan that lacks 27 mm, restored."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = ldm3d.Pipeline.from_pretrained(model)
        image = pipe(age=40, sex="F", seed=3).images[0]
        holed = image.get_fdata(dtype="float32")
        holed[:, :, 18:24] = 0
        scan = Path(folder) / "synthetic-40-years.nii.gz"
        image.__class__(holed, image.affine, image.header).to_filename(scan)
        command = [sys.executable, "-m", "ldm3d", "serve", model, "--port", "0", "--seconds", "1800", "--precision", "float32"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
            try:
                address = next(line.split()[0] for line in served.stdout or () if line.startswith("http"))
                for name, webgl in (("serve", True), ("serve-planes", False)):
                    page = Shown(address, webgl)
                    try:
                        two_ages(page, name)
                        if not webgl:
                            restored(page, scan)
                    finally:
                        page.driver.quit()
            finally:
                served.terminate()


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["brains-4.5mm"]))
