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
def browsing(downloads: Path) -> Iterator:
    """Selenium's driver, which downloads into a folder (`driver.downloads`) and has no WebGL."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument("--disable-3d-apis")  # no WebGL: the canvas takes over
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
