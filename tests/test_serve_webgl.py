"""The page of `ldm3d serve` with WebGL2, drawn by software: NiiVue's planes, rendering, crosshair and sides."""

import io

import numpy as np
import pytest
import torch
from chromium import NEEDED, browsing
from PIL import Image
from selenium.webdriver import ActionChains
from serving import served
from test_serve_page import settled, slide, until
from torture.generation import make_pipeline

from ldm3d.pipeline import Pipeline
from ldm3d.serve.studio import Studio

pytestmark = [NEEDED, pytest.mark.slow]
CAPTION = "return document.querySelector('figure[data-name=current] figcaption').textContent"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    pipeline = Pipeline.from_pretrained(folder, "cpu", torch.float32)
    with served(Studio(pipeline, "tiny", preview_steps=1)) as page, browsing(folder, webgl=True) as browser:
        browser.get(f"http://127.0.0.1:{page.port}/")
        if not browser.execute_script("return !!document.createElement('canvas').getContext('webgl2')"):
            pytest.skip("this Chromium has no WebGL2 by software")
        settled(browser)
        yield browser


def seen(browser, name: str = "current") -> np.ndarray:
    """The picture as it is on the screen, (rows, columns, 3)."""
    element = browser.find_element("css selector", f"figure[data-name={name}] .picture")
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")).astype(int)


def quarters(picture: np.ndarray) -> list[np.ndarray]:
    half, middle = picture.shape[0] // 2, picture.shape[1] // 2
    return [picture[:half, :middle], picture[:half, middle:], picture[half:, :middle], picture[half:, middle:]]


def test_three_planes_and_a_rendering_are_drawn_and_follow_the_slider(page):
    assert not page.find_element("id", "planes").is_selected()
    until(lambda: seen(page).max() > 100)
    before = seen(page)
    for quarter in quarters(before):  # each has grey, not the blue of the crosshair alone
        grey = np.ptp(quarter, axis=2) < 12
        assert (grey & (quarter.mean(axis=2) > 40)).mean() > 0.02
    slide(page, 80)
    settled(page)
    until(lambda: not np.array_equal(seen(page), before))
    page.find_element("id", "another").click()
    settled(page)
    until(lambda: np.abs(seen(page) - before).mean() > 1)
    assert [line for line in page.get_log("browser") if line["level"] == "SEVERE"] == []


def test_sides_are_whole_and_stand_in_the_corners_of_planes(page):
    script = """
const box = document.querySelector('figure[data-name=current] .picture').getBoundingClientRect();
return [...document.querySelectorAll('figure[data-name=current] .side')].map((side) => {
  const place = side.getBoundingClientRect();
  const inside = place.left >= box.left && place.right <= box.right && place.top >= box.top && place.bottom <= box.bottom;
  return [side.textContent, inside];
});"""
    assert sorted(page.execute_script(script)) == [
        ["A", True],
        ["L", True],
        ["L", True],
        ["P", True],
        ["R", True],
        ["R", True],
    ]


def test_a_click_moves_the_crosshair_of_all_brains(page):
    page.find_element("id", "keep").click()
    until(lambda: len(page.find_elements("css selector", "figure")) == 3)
    until(lambda: seen(page, "difference").max() > 60)
    kept = seen(page, "kept")
    canvas = page.find_element("css selector", "figure[data-name=current] canvas")
    places = []
    for right in (-0.35, -0.2):
        offset = round(right * canvas.size["width"]), round(-0.25 * canvas.size["height"])
        ActionChains(page).move_to_element_with_offset(canvas, *offset).click().perform()
        until(lambda: "mm:" in page.execute_script(CAPTION) and page.execute_script(CAPTION) not in places)
        places.append(page.execute_script(CAPTION))
    x = [float(place.split("[")[1].split(",")[0]) for place in places]
    assert x[0] < x[1]  # the patient's left is on the left
    until(lambda: np.abs(seen(page, "kept") - kept).max() > 60)
