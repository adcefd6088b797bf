"""Headless Chromium, for pages as people see them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
NEEDED = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver (Debian: apt-get install chromium-driver)"
)


@contextmanager
def browsing(downloads: Path, webgl: bool = False) -> Iterator:
    """Selenium's driver, which downloads into a folder (`driver.downloads`); with WebGL2 by software, or without any."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(argument)
    software = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
    for argument in software if webgl else ("--disable-gpu", "--disable-3d-apis"):  # without: the canvas takes over
        options.add_argument(argument)
    # Several downloads, one after another, without a question: clicks by a script are no user's
    prefs = {"profile.default_content_setting_values.automatic_downloads": 1, "download.default_directory": str(downloads)}
    options.add_experimental_option("prefs", prefs)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(120)
    driver.downloads = downloads
    try:
        yield driver
    finally:
        driver.quit()
