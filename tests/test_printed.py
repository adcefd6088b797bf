"""Pages of reports on paper, in headless Chromium: nothing is cut off at the right."""

from chromium import NEEDED, browsing

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
