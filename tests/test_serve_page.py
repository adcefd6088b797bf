"""The page of `ldm3d serve` in headless Chromium: load, slide, wait for the new brain, download, compare."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import NEEDED, browsing
from serving import served
from torture.generation import make_pipeline

from ldm3d.data.nifti import from_image, unpack_volume, write_volume
from ldm3d.pipeline import Pipeline
from ldm3d.serve.studio import Studio

pytestmark = NEEDED


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return Pipeline.from_pretrained(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("downloads")) as driver:
        yield driver


def until(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def settled(browser) -> dict:
    """Wait for the full volume; the request that it was made for."""
    until(lambda: browser.execute_script("return document.body.dataset.state") in ("full", "failed"))
    assert browser.execute_script("return document.body.dataset.state") == "full", text(browser, "status")
    return json.loads(browser.execute_script("return document.body.dataset.shown"))


def text(browser, element: str) -> str:
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", element)


def slide(browser, value: float) -> None:
    """Move the first slider, as a hand does."""
    browser.execute_script(
        "const s = document.querySelector('.covariate input[type=range]'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))",
        value,
    )


def set_value(browser, element: str, value) -> None:
    browser.execute_script("document.getElementById(arguments[0]).value = arguments[1]", element, value)


def choose(browser, element: str, value: str) -> None:
    set_value(browser, element, value)
    browser.execute_script("document.getElementById(arguments[0]).dispatchEvent(new Event('change'))", element)


def picture(browser, name: str = "current") -> str:
    return browser.execute_script(f"return document.querySelector('figure[data-name={name}] canvas').toDataURL()")


def downloaded(folder: Path, pattern: str) -> bytes:
    (path,) = until(lambda: list(folder.glob(pattern)))
    content = path.read_bytes()
    path.unlink()
    return content


def test_slide_download_compare_film(browser, pipeline):
    with served(Studio(pipeline, "tiny", preview_steps=1)) as page:
        browser.get(f"http://127.0.0.1:{page.port}/")
        first = settled(browser)
        assert first["covariates"] == {"age": 50, "sex": "F"} and first["seed"] == 0
        before = picture(browser)

        slide(browser, 80)
        assert settled(browser)["covariates"]["age"] == 80
        assert picture(browser) != before and "age 80 years" in browser.page_source
        browser.execute_script("document.querySelector('#downloads button').click()")
        content = downloaded(browser.downloads, "*.nii.gz")
        expected = from_image(pipeline(age=80, sex="F", seed=0).images[0])
        assert np.array_equal(unpack_volume(content), expected)

        browser.execute_script("document.getElementById('keep').click(); document.getElementById('another').click()")
        other = settled(browser)
        assert other["seed"] != 0 and other["covariates"] == {"age": 80, "sex": "F"}
        names = "return [...document.querySelectorAll('figure')].map((f) => f.dataset.name).sort()"
        until(lambda: browser.execute_script(names) == ["current", "difference", "kept"])
        assert picture(browser, "kept") != picture(browser)

        browser.execute_script("document.getElementById('frames').value = 3; document.getElementById('make').click()")
        until(lambda: "done" in text(browser, "status"))
        assert browser.execute_script("return document.getElementById('frame').max") == "2"
        assert browser.execute_script(
            "return [...document.querySelectorAll('figcaption')].every((c) => c.textContent.includes('synthetic'))"
        )
        assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_an_open_covariate_and_an_error_are_shown(browser, pipeline):
    with served(Studio(pipeline, "tiny", preview_steps=1)) as page:
        browser.get(f"http://127.0.0.1:{page.port}/")
        settled(browser)
        browser.execute_script("document.getElementById('open-age').click()")
        assert settled(browser)["covariates"] == {"sex": "F"}
        browser.execute_script(
            "const s = document.getElementById('steps'); s.value = 5000; s.dispatchEvent(new Event('change'))"
        )
        until(lambda: browser.execute_script("return document.body.dataset.state") == "failed")
        assert "from 1 to 200" in text(browser, "status")


def test_a_scan_follows_the_sliders(browser, pipeline, tmp_path):
    ball = np.exp(-3 * sum(np.meshgrid(*[np.linspace(-1, 1, 20) ** 2] * 3))).astype(np.float32)
    affine = np.diag([8.0, 8, 8, 1])
    affine[:3, 3] = -80
    write_volume(tmp_path / "scan.nii.gz", 500 * ball[None], affine)
    with served(Studio(pipeline, "tiny", preview_steps=1)) as page:
        browser.get(f"http://127.0.0.1:{page.port}/")
        settled(browser)
        browser.find_element("id", "file").send_keys(str(tmp_path / "scan.nii.gz"))
        until(lambda: "own covariates" in text(browser, "status"))
        captions = "return [...document.querySelectorAll('figcaption')].map((c) => c.textContent)"
        assert any("your scan; scan.nii.gz" in caption for caption in browser.execute_script(captions))
        browser.execute_script("document.getElementById('own').click()")
        assert settled(browser)["source"] == {"age": 50, "sex": "F"}
        slide(browser, 80)
        request = settled(browser)
        assert request["covariates"]["age"] == 80 and "derived from your scan" in "".join(browser.execute_script(captions))
        browser.execute_script("document.getElementById('edited').click()")
        found = unpack_volume(downloaded(browser.downloads, "*.nii.gz"))
        expected = pipeline.edit(tmp_path / "scan.nii.gz", {"age": 50, "sex": "F"}, {"age": 80}).back()
        np.testing.assert_allclose(found, expected, atol=0.1)  # of 500
        assert np.abs(found - 500 * ball[None]).max() > 1

        choose(browser, "work", "restore")  # another work: nothing is made before the button is pressed
        choose(browser, "happened", "missing")
        set_value(browser, "slices", "8-11")
        set_value(browser, "samples", 2)
        browser.execute_script("document.getElementById('begin').click()")
        request = settled(browser)
        assert request["operator"] == "missing=z:8-11" and "mean of 2 draws" in "".join(browser.execute_script(captions))
        assert "how far draws differ" in "".join(browser.execute_script(captions))
        browser.execute_script("document.getElementById('edited').click()")
        found = unpack_volume(downloaded(browser.downloads, "derived_restore.nii.gz"))
        changed = found != (500 * ball[None]).astype(np.float32)
        assert changed[..., 8:12].any() and not changed[..., :8].any() and not changed[..., 12:].any()
        browser.execute_script("document.getElementById('unsure').click()")
        assert unpack_volume(downloaded(browser.downloads, "derived_restore_deviation.nii.gz"))[..., 8:12].any()

        choose(browser, "happened", "hole")
        browser.execute_script("document.getElementById('begin').click()")
        until(lambda: json.loads(browser.execute_script("return document.body.dataset.shown"))["operator"] == "hole")
        assert settled(browser)["centre"] == [8, 8, 8]
        choose(browser, "work", "counterpart")
        browser.execute_script("document.getElementById('begin').click()")
        until(lambda: json.loads(browser.execute_script("return document.body.dataset.shown"))["work"] == "counterpart")
        assert "its healthy counterpart" in "".join(browser.execute_script(captions))
        browser.execute_script("document.getElementById('drop').click()")
        assert "scan" not in settled(browser)


@pytest.mark.parametrize("works", [[], ["counterpart", "restore"]])
def test_what_the_model_cannot_do_is_not_shown(browser, works):
    pipeline = make_pipeline()
    with served(Studio(pipeline, "tiny", preview_steps=1)) as page:
        page.studio.description = lambda: {**Studio.description(page.studio), "works": works}
        browser.get(f"http://127.0.0.1:{page.port}/")
        settled(browser)
        offered = browser.execute_script("return [...document.getElementById('work').options].map((o) => o.value)")
        hidden = browser.execute_script("return document.getElementById('scan').hidden")
        assert (offered, hidden) == (works, not works)


@pytest.mark.parametrize("width", [1300, 800, 400])
def test_nothing_sticks_out_of_the_page(browser, pipeline, width):
    with served(Studio(pipeline, "tiny", preview_steps=1)) as page:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(f"http://127.0.0.1:{page.port}/")
        settled(browser)
        browser.execute_script("document.getElementById('keep').click()")
        until(lambda: browser.execute_script("return document.querySelectorAll('figure canvas').length") == 3)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
