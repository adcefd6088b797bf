"""`ldm3d serve` over HTTP: the same volumes as in Python, in turn, within limits, for those who may."""

import gzip
import http.client
import io
import json
import socket
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import psutil
import pytest
import torch
from serving import Page, served
from torture.generation import make_pipeline

from ldm3d.covariates import CovariateSchema
from ldm3d.data.nifti import from_image, unpack_volume, write_volume
from ldm3d.pipeline import Pipeline
from ldm3d.serve.asked import Limits
from ldm3d.serve.plausibility import remarks
from ldm3d.serve.run import is_loopback
from ldm3d.serve.studio import Studio
from ldm3d.start import GaussianStart


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Pipeline:
    folder, pipeline = tmp_path_factory.mktemp("model"), make_pipeline()
    age = replace(pipeline.schema["age"], range=(0, 120), seen=(20, 80))
    pipeline.schema = CovariateSchema((age, pipeline.schema["sex"]))
    pipeline.save_pretrained(folder)
    return Pipeline.from_pretrained(folder, "cpu", torch.float32)


@pytest.fixture
def page(pipeline):
    with served(Studio(pipeline, "tiny", Limits(body=2000, reading=0.5, kept=10**6))) as page:
        yield page


class Slow(Studio):
    """Each step waits, until it is let go."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.go, self.begun, self.ended = threading.Event(), [], []

    def _make(self, asked, job):
        self.begun.append(asked.sampling.seed)
        step = job.step

        def slow(done):
            if done:
                self.go.wait(10)
            step(done)

        job.step = slow
        try:
            return super()._make(asked, job)
        finally:
            self.ended.append(asked.sampling.seed)


@pytest.fixture
def slow(pipeline):
    studio = Slow(pipeline, "tiny", Limits(waiting=3))
    with served(studio) as page:
        yield page
        studio.go.set()


def opened(page: Page, **request) -> socket.socket:
    """A request whose answer nobody has read yet."""
    body = json.dumps(request).encode()
    connection = socket.create_connection(("127.0.0.1", page.port), timeout=30)
    connection.sendall(b"POST /volume HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    return connection


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("channels", [4, 32])
def test_a_volume_is_the_one_of_a_call_to_the_last_bit(channels):
    """With 32 channels kernels choose their way by batch size, so the batch has to be the call's, too."""
    pipeline, asked = make_pipeline(channels), {"age": 60.0, "sex": "F"}
    with served(Studio(pipeline, "tiny")) as page:
        lines, content = page.volume(covariates=asked, seed=7, steps=3, sampler="heun")
        other = page.volume(covariates=asked, seed=8, steps=3, sampler="heun")[1]
    expected = pipeline(**asked, seed=7, steps=3, sampler="heun")
    assert np.array_equal(unpack_volume(content), from_image(expected.images[0]))
    assert lines[-1] == {"bytes": len(content), "coarse": False, "steps": 3, "remarks": []}
    assert b"SYNTHETIC" in gzip.decompress(content)[:352]
    assert not np.array_equal(unpack_volume(other), unpack_volume(content))


def test_a_preview_has_few_steps_and_the_same_noise(page, pipeline):
    lines, content = page.volume(covariates={"age": 60}, seed=7, steps=30, coarse=True)
    assert lines[-1]["coarse"] and lines[-1]["steps"] == page.studio.preview_steps
    expected = from_image(pipeline(age=60, seed=7, steps=page.studio.preview_steps).images[0])
    np.testing.assert_allclose(unpack_volume(content), expected, atol=1e-4)


def test_downloads(page, pipeline):
    request = {"covariates": {"age": 41, "sex": "M"}, "seed": 3, "steps": 2}
    expected = from_image(pipeline(age=41, sex="M", seed=3, steps=2).images[0])
    status, headers, content = page.download("nifti", **request)
    assert status == 200 and "synthetic_seed-3" in headers["content-disposition"]
    assert np.array_equal(unpack_volume(content), expected)
    status, _, content = page.download("bids", **request)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".nii.gz")]
        assert "desc-synthetic" in name and np.array_equal(unpack_volume(archive.read(name)), expected)
        sidecar = json.loads(archive.read(name.replace(".nii.gz", ".json")))
        assert sidecar["synthetic"] and sidecar["covariates"] == {"age": 41.0, "sex": "M"}
        assert any(n.endswith("dataset_description.json") for n in archive.namelist())
    status, headers, content = page.download("dicom", **request)
    assert status == 200 and headers["content-disposition"].endswith('.dcm"') and content[128:132] == b"DICM"
    assert page.download("exe", **request)[0] == 400


@pytest.mark.parametrize(
    "body, word",
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"covariates": []}', "object"),
        ('{"stepz": 1}', "did you mean 'steps'"),
        ('{"covariates": {"aeg": 1}}', "did you mean 'age'"),
        ('{"covariates": {"age": 1000}}', "range"),
        ('{"covariates": {"age": {"a": 1}}}', "number"),
        ('{"covariates": {"sex": "X"}}', "not one of"),
        ('{"steps": 100000}', "from 1 to 200"),
        ('{"steps": 2.5}', "whole"),
        ('{"steps": true}', "whole"),
        ('{"seed": -1}', "from 0"),
        ('{"guidance": NaN}', "from 0 to 100"),
        ('{"sampler": "magic"}', "unknown sampler"),
        ('{"sampler": []}', "name"),
        ('{"coarse": 1}', "true or false"),
        ("[" * 1500, "JSON"),
        ('{"seed": ' + "9" * 1500 + "}", "from 0"),
    ],
)
def test_bad_requests_get_one_clear_message(page, body, word):
    status, _, content = page.ask("POST", "/volume", body)
    assert status == 400 and word in json.loads(content)["error"]


def test_a_body_is_limited_in_size_and_time(page):
    assert page.ask("POST", "/volume", b"x" * 2001)[0] == 413
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as connection:
        connection.sendall(b"POST /volume HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nslow")
        assert b"413" in connection.recv(100)


def test_time_is_limited(pipeline):
    with served(Studio(pipeline, "tiny", Limits(seconds=0))) as page:
        lines, content = page.volume(steps=5)
        assert "stopped after 0 seconds" in lines[-1]["error"] and not content
        assert page.download("nifti", steps=5)[0] == 400


def test_others_wait_see_their_place_and_more_are_refused(slow):
    first, second, third = (opened(slow, seed=seed, steps=2) for seed in range(3))
    until(lambda: slow.studio.begun == [0])
    until(lambda: b'"place": 2' in third.recv(4096))
    assert slow.ask("POST", "/volume", "{}")[0] == 503
    second.close()  # leaves the queue, so that the third moves up
    until(lambda: b'"place": 1' in third.recv(4096))
    slow.studio.go.set()
    until(lambda: slow.studio.ended == [0, 2])  # the second was never begun
    first.close(), third.close()


def test_closing_the_page_cancels(slow):
    gone = opened(slow, seed=5, steps=50)
    until(lambda: slow.studio.begun == [5])
    gone.close()
    time.sleep(0.1)
    slow.studio.go.set()
    until(lambda: slow.studio.ended == [5])
    assert slow.volume(seed=6, steps=1)[0][-1]["bytes"]  # and the next one has its turn
    assert len(slow.studio._kept) == 1  # nothing was made of the first


def test_200_requests_at_once_none_lost_and_memory_flat(page, pipeline):
    expected = {seed: from_image(pipeline(seed=seed, steps=1).images[0]) for seed in (0, 57, 199)}

    def one(seed):
        content = page.volume(seed=seed, steps=1)[1]
        return (seed in expected and not np.array_equal(unpack_volume(content), expected[seed])) or len(content) < 1000

    def rush():
        with ThreadPoolExecutor(200) as pool:
            assert not any(pool.map(one, range(200)))
        return psutil.Process().memory_info().rss

    before = rush()
    assert rush() - before < 40e6
    assert sum(map(len, page.studio._kept.values())) <= page.studio.limits.kept


def test_who_may_ask(pipeline, page):
    assert page.ask("GET", "/")[0] == 200 and b"SYNTHETIC" in page.ask("GET", "/")[2]
    assert page.ask("GET", "/", Host="evil.example")[0] == 403  # a name that leads here
    assert page.ask("POST", "/volume", "{}", Sec_Fetch_Site="cross-site")[0] == 403
    assert page.ask("GET", "/static/..%2fstudio.py")[0] == 404
    headers = page.ask("GET", "/")[1]
    assert "default-src 'none'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"
    with served(Studio(pipeline, "tiny"), "0.0.0.0") as open_page:
        assert len(open_page.token) > 20
        assert open_page.ask("GET", "/")[0] == open_page.ask("GET", "/?token=wrong")[0] == 403
        assert open_page.ask("POST", "/volume", "{}", Cookie="ldm3d=wrong")[0] == 403
        status, headers, _ = open_page.ask("GET", f"/?token={open_page.token}", Host="any.example")
        assert status == 200 and "HttpOnly" in headers["set-cookie"] and "SameSite=Strict" in headers["set-cookie"]
        assert open_page.ask("GET", "/model", Cookie=headers["set-cookie"].split(";")[0])[0] == 200


@pytest.mark.parametrize(
    "host, within", [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("my.pc", False)]
)
def test_loopback_is_told_from_other_addresses(host, within):
    assert is_loopback(host) == within


def test_the_model_is_described(page, pipeline):
    model = json.loads(page.ask("GET", "/model")[2])
    age, sex = model["covariates"]
    assert age["low"] < age["seen"][0] < age["middle"] < age["seen"][1] < age["high"]
    assert sex["categories"] == ["F", "M"] and {"nifti", "bids"} <= set(model["formats"])
    assert model["shape"] == list(pipeline.output_grid.shape) and model["sampling"]["sampler"] in model["samplers"]


def test_what_is_said_of_a_request(pipeline):
    assert remarks(pipeline, pipeline.schema.parse({"age": 50})) == []
    low, high = pipeline.schema["age"].seen
    (said,) = remarks(pipeline, pipeline.schema.parse({"age": high + 1}))
    assert f"training saw {low:g} to {high:g}" in said


def test_values_that_are_unusual_together_are_told():
    """Two covariates with correlation 0.9: 2 and -2 deviations together have a distance of 80, far beyond any subject."""
    shipped = Pipeline.from_pretrained("brains-4.5mm", "cpu", torch.float32)
    ventricles, age = shipped.schema["ventricular_volume_ml"], shipped.schema["age"]
    assert remarks(shipped, shipped.schema.parse({"age": age.mean, ventricles.name: ventricles.mean})) == []
    correlation = torch.eye(len(shipped.start.centre))
    correlation[0, 2] = correlation[2, 0] = 0.9
    shipped.start = GaussianStart(shipped.start.shape, shipped.start.num_categories, 1, 0.5)
    shipped.start.covariance.copy_(correlation)
    together = {"age": age.mean + 1.5 * age.std, ventricles.name: ventricles.mean + 1.5 * ventricles.std}
    assert remarks(shipped, shipped.schema.parse(together)) == []
    apart = {"age": age.mean + 1.5 * age.std, ventricles.name: ventricles.mean - 1.2 * ventricles.std}
    (said,) = remarks(shipped, shipped.schema.parse(apart))
    assert "together are unusual" in said


def test_a_bad_address_is_one_message(fails):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        message = fails("serve", "brains-4.5mm", "--port", taken.getsockname()[1])
    assert "choose another --port" in message


def test_http_1_0_and_head_do_no_harm(page):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    connection.request("PUT", "/volume", "{}")
    assert connection.getresponse().status == 405


def scan_file(pipeline, folder, name="scan.nii.gz"):
    """A scan that lies obliquely to the model's grid: a blob, brighter on one side."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (20, 24, 18)], indexing="ij")
    volume = (np.exp(-3 * (x**2 + y**2 + z**2)) * (1 + 0.4 * x) * 700).astype(np.float32)[None]
    affine = np.diag([7.0, 7, 8, 1])
    affine[:3, 3] = -np.array([20, 24, 18]) * [7, 7, 8] / 2
    write_volume(folder / name, volume, affine)
    return (folder / name).read_bytes(), volume, affine


def sent(page, content, kind=".nii.gz"):
    status, _, answer = page.ask("POST", f"/scan?kind={kind}", content)
    lines = []
    while answer and "bytes" not in (lines or [{}])[-1]:
        line, _, answer = answer.partition(b"\n")
        lines.append(json.loads(line))
    return status, lines, answer


def edited(page, **request) -> bytes:
    return downloaded(page, "own", request)


def downloaded(page, part, request) -> bytes:
    status, _, content = page.ask("GET", f"/download/made?request={quote(json.dumps(request))}&part={part}")
    assert status == 200, content
    return content


def made(page, request, part="grid") -> bytes:
    """What is shown on the page."""
    status, _, content = page.ask("POST", f"/made?part={part}", json.dumps(request))
    line, _, content = content.partition(b"\n")
    while "bytes" not in json.loads(line):
        line, _, content = content.partition(b"\n")
    assert status == 200
    return content


def test_a_scan_comes_back_edited_as_in_python(pipeline, tmp_path):
    content, volume, _ = scan_file(pipeline, tmp_path)
    with served(Studio(pipeline, "tiny")) as page:
        status, lines, on_grid = sent(page, content)
        assert status == 200 and unpack_volume(on_grid).shape[1:] == pipeline.output_grid.shape
        name, source = lines[-1]["scan"], {"age": 50, "sex": "F"}
        same = edited(page, scan=name, source=source, covariates=source)
        assert np.array_equal(unpack_volume(same), volume)  # nothing changed: the scan itself
        request = {"scan": name, "source": source, "covariates": {"age": 70}, "steps": 4}
        expected = pipeline.edit(tmp_path / "scan.nii.gz", source, {"age": 70}, steps=4)
        np.testing.assert_allclose(unpack_volume(edited(page, **request)), expected.back(), atol=1e-3)
        np.testing.assert_allclose(unpack_volume(made(page, request)), expected.volume()[0].numpy(), atol=1e-5)
        assert not list(Path(page.scans.folder).iterdir())  # the upload is gone


def test_a_counterpart_and_a_restored_scan_are_those_of_python(pipeline, tmp_path):
    content, volume, affine = scan_file(pipeline, tmp_path)
    path, source = tmp_path / "scan.nii.gz", {"age": 50}
    with served(Studio(pipeline, "tiny")) as page:
        about = {"scan": sent(page, content)[1][-1]["scan"], "source": source, "samples": 2}
        request = {"work": "counterpart", **about}
        expected = pipeline.counterpart(path, source, samples=2)
        np.testing.assert_allclose(unpack_volume(made(page, request)), expected.mean[0].numpy(), atol=1e-4)
        np.testing.assert_allclose(unpack_volume(downloaded(page, "own", request)), from_image(expected.image()), atol=0.1)

        request = {"work": "restore", **about, "operator": "missing=y:10-12", "noise": 0.02}
        expected = pipeline.restore(path, "missing=y:10-12", 0.02, covariates=source, samples=2)
        np.testing.assert_allclose(unpack_volume(made(page, request)), expected.mean[0].numpy(), atol=1e-4)
        np.testing.assert_allclose(unpack_volume(made(page, request, "spread")), expected.deviation[0].numpy(), atol=1e-4)
        whole, unsure = (unpack_volume(downloaded(page, part, request)) for part in ("own", "deviation"))
        np.testing.assert_allclose(whole, from_image(expected.image()), atol=0.1)
        np.testing.assert_allclose(unsure, from_image(expected.deviation_image()), atol=0.1)
        known = np.ones(volume.shape, bool)
        known[:, :, 10:13] = False
        assert np.array_equal(whole[known], volume[known]) and not unsure[known].any() and unsure[~known].any()

        # A hole is given by a voxel of what is shown; the scan's own voxels there, and no others, are drawn again
        request = {"work": "restore", **about, "operator": "hole", "centre": [8, 9, 7], "radius_mm": 25}
        whole = unpack_volume(downloaded(page, "own", request))
        places = np.stack(np.meshgrid(*map(np.arange, volume.shape[1:]), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
        found = pipeline.restore(path, "noise", samples=1).placed  # for the place of the grid in the scan's world
        middle = (np.array(found.info["grid_affine"]) @ [8, 9, 7, 1])[:3]
        distance = np.linalg.norm(places - middle, axis=-1)
        changed = (whole != volume)[0]
        assert changed[distance < 24].any() and not changed[distance > 25.1].any()


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        ({"work": "destroy"}, "restore"),
        ({"work": "restore", "operator": "hole=/etc/passwd"}, "centre"),
        ({"work": "restore", "operator": "mask=/etc/passwd"}, "unknown operator 'mask'"),
        ({"work": "restore", "operator": "bias=/etc/passwd"}, "unknown operator 'bias'"),
        ({"work": "restore", "operator": "hole", "centre": [1, 2, "x"]}, "three numbers"),
        ({"work": "restore", "operator": "hole", "centre": [900, 2, 3]}, "within the scan"),
        ({"work": "restore", "operator": "missing=z:400"}, "no slice"),
        ({"work": "restore", "operator": "blur=0"}, "above 0"),
        ({"work": "restore", "noise": 7}, "from 0.0001 to 1"),
        ({"work": "counterpart", "samples": 1000}, "from 1 to 16"),
        ({"work": "counterpart", "steps": 3}, "samples"),
    ],
)
def test_bad_works_get_one_clear_message(pipeline, tmp_path, request_, word):
    content, _, _ = scan_file(pipeline, tmp_path)
    with served(Studio(pipeline, "tiny")) as page:
        name = sent(page, content)[1][-1]["scan"]
        answer = page.ask("POST", "/made", json.dumps({"scan": name, **request_}))[2].splitlines()[-1]
        assert word in json.loads(answer)["error"] and "/etc" not in json.loads(answer)["error"]


def test_a_deviation_needs_several_draws(pipeline, tmp_path):
    content, _, _ = scan_file(pipeline, tmp_path)
    with served(Studio(pipeline, "tiny")) as page:
        request = {"work": "counterpart", "scan": sent(page, content)[1][-1]["scan"], "samples": 1}
        status, _, answer = page.ask("GET", f"/download/made?request={quote(json.dumps(request))}&part=deviation")
        assert status == 400 and "two samples" in json.loads(answer)["error"]


def test_uploads_are_limited_and_read_with_care(pipeline, tmp_path):
    content, _, _ = scan_file(pipeline, tmp_path)
    limits = Limits(scan=len(content), scan_voxels=9000, scans=1, reading=0.5)
    with served(Studio(pipeline, "tiny", limits)) as page:
        first = sent(page, content)[1][-1]["scan"]
        second = sent(page, content)[1][-1]["scan"]
        assert "no longer here" in json.loads(page.ask("POST", "/made", json.dumps({"scan": first}))[2])["error"]
        assert page.ask("POST", "/made", json.dumps({"scan": second}))[0] == 200
        assert sent(page, content + b"x")[0] == 413
        for kind in ("", ".exe", "/../../x.nii"):
            assert sent(page, content, kind)[0] == 400
        for bad in (b"", b"no NIfTI", content[:60]):
            message = sent(page, bad)[1][-1]["error"]
            assert "the scan" in message and "ldm3d-serve-" not in message
        assert not list(Path(page.scans.folder).iterdir())
    with served(Studio(pipeline, "tiny", Limits(scan_voxels=8000))) as page:
        assert "at most 8,000" in sent(page, content)[1][-1]["error"]


def test_uploads_end_with_the_page(pipeline):
    with served(Studio(pipeline, "tiny")) as page:
        folder = Path(page.scans.folder)
        connection = socket.create_connection(("127.0.0.1", page.port), timeout=10)
        connection.sendall(b"POST /scan?kind=.nii HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
        until(lambda: list(folder.iterdir()))
        connection.close()
        until(lambda: not list(folder.iterdir()))
    assert not folder.exists()
