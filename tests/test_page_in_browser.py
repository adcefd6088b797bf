"""Pages of reports in headless Chromium: nothing is cut off on paper, and a figure is enlarged by a click."""

import base64
import io

import numpy as np
import pytest
from chromium import NEEDED, browsing
from matplotlib import image
from test_verdicts import written

from ldm3d.report.page import Goal, Section, write_page

pytestmark = NEEDED
PAPER = 794  # width of A4 at 96 dots an inch


def test_wide_tables_fit_the_paper(tmp_path):
    names = [f"figure of group {i}" for i in range(6)]
    row = ["ventricular volume (ml)", "reconstructed"] + ["1234.567\n(1234.567 to 1234.567)"] * 6
    section = Section("Wide", table={"columns": ["covariate", "volumes", *names], "rows": [row] * 3})
    goals = [Goal("Quality", 31.2, low=28, unit="dB", interval=(30.0, 32.0))]
    page = write_page(tmp_path, "A title", [section], {"model": "abc", "made": "2026-01-02T03:04"}, goals)
    size = {"width": PAPER, "height": 1123, "deviceScaleFactor": 1, "mobile": False}
    with browsing(tmp_path) as browser:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        tables = "[...document.querySelectorAll('table')]"
        width = f"return Math.max(...{tables}.map(table => table.getBoundingClientRect().right))"
        browser.get(page.as_uri())
        assert browser.execute_script(width) > PAPER  # on a screen it scrolls
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert browser.execute_script(width) <= PAPER


def test_a_click_enlarges_a_figure_and_another_one_brings_it_back(tmp_path):
    drawn = io.BytesIO()
    image.imsave(drawn, np.tile(np.linspace(0, 1, 3000), (400, 1)), format="png")
    source = f"data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    section = Section("Pictures", plots=[{"source": source, "caption": f"the {k}th"} for k in (5, 6)])
    page = write_page(tmp_path, "A title", [section], {"model": "abc", "made": "2026-01-02T03:04"})
    with browsing(tmp_path) as browser:
        browser.get(page.as_uri())
        shown = browser.find_element("tag name", "img")
        small = shown.size["width"]
        shown.click()
        assert shown.size["width"] == 3000 and small < 400  # every pixel of it
        assert browser.execute_script("return document.elementFromPoint(300, 5).className") == "scroll"  # it covers the page
        shown.click()
        assert shown.size["width"] == small


@pytest.mark.parametrize("width", [1300, 800, 400])
def test_an_evaluation_fits_every_width(tmp_path, width):
    page = written(tmp_path)
    with browsing(tmp_path) as browser:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.as_uri())
        browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return document.querySelector('nav').getBoundingClientRect().top") >= 0
        browser.execute_script("document.getElementById('made').scrollIntoView()")
        assert browser.execute_script("return document.querySelector('nav').getBoundingClientRect().top") == 0  # it stays
