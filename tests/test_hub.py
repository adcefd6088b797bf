"""Models at a hub: pushed and fetched through huggingface_hub, against a small hub of the test's own."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line
from serving import running
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torture.generation import make_pipeline

from ldm3d import hub as client
from ldm3d.data.nifti import from_image
from ldm3d.errors import InputError
from ldm3d.pipeline import Pipeline
from ldm3d.shipped import model_folder

TOKEN = "hf_" + "x" * 34


class Hub:
    """As much of the Hub's interface as pushing and fetching a model need; commits are kept in memory.

    Attributes:
        commits: repository -> [(hash, {path: bytes})], the newest last.
        asked: paths of files that were fetched.
    """

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.asked: list[str] = []
        model = "/api/models/{user}/{name}"
        self.app = Starlette(
            routes=[
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/validate-yaml", self.validate, methods=["POST"]),
                Route(model, self.info),
                Route(model + "/revision/{revision}", self.info),
                Route(model + "/tree/{revision}", self.tree),
                Route(model + "/preupload/{revision}", self.preupload, methods=["POST"]),
                Route(model + "/commit/{revision}", self.commit, methods=["POST"]),
                Route("/{user}/{name}/resolve/{revision}/{path:path}", self.file),
            ]
        )

    async def create(self, request):
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": "Invalid username or password."}, 401)
        asked = await request.json()
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.commits:
            return JSONResponse({"error": "You already created this model repo", "url": f"{request.base_url}{name}"}, 409)
        self.commits[name] = [("0" * 40, {})]
        return JSONResponse({"url": f"{request.base_url}{name}", "name": name, "id": "1"})

    async def validate(self, _):
        return JSONResponse({"errors": [], "warnings": []})

    def found(self, request) -> tuple[str, dict[str, bytes]] | JSONResponse:
        parts = request.path_params
        commits = self.commits.get(f"{parts['user']}/{parts['name']}")
        if commits is None:
            return JSONResponse({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        revision = parts.get("revision", "main")
        fits = [commit for commit in commits if revision in ("main", commit[0])]
        return fits[-1] if fits else JSONResponse({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})

    async def info(self, request):
        found = self.found(request)
        if isinstance(found, Response):
            return found
        name = f"{request.path_params['user']}/{request.path_params['name']}"
        return JSONResponse(
            {"id": name, "sha": found[0], "siblings": [{"rfilename": path} for path in found[1]], "private": False}
        )

    async def tree(self, request):
        found = self.found(request)
        if isinstance(found, Response):
            return found
        return JSONResponse([{"type": "file", "path": p, "size": len(c), "oid": oid(c)} for p, c in found[1].items()])

    async def preupload(self, request):
        asked = (await request.json())["files"]
        return JSONResponse({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})

    async def commit(self, request):
        files = {}
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        name = f"{request.path_params['user']}/{request.path_params['name']}"
        commits = self.commits[name]
        number = hashlib.sha1(repr((len(commits), sorted(files))).encode()).hexdigest()
        commits.append((number, {**commits[-1][1], **files}))
        return JSONResponse({"success": True, "commitOid": number, "commitUrl": f"{request.base_url}{name}/commit/{number}"})

    async def file(self, request):
        found = self.found(request)
        path = request.path_params["path"]
        if isinstance(found, Response) or path not in found[1]:
            return found if isinstance(found, Response) else JSONResponse({}, 404, {"X-Error-Code": "EntryNotFound"})
        if request.method == "GET":
            self.asked.append(path)
        content = found[1][path]
        return Response(
            content, headers={"X-Repo-Commit": found[0], "ETag": f'"{oid(content)}"'}, media_type="application/octet-stream"
        )


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    hub = Hub()
    with running(hub.app) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"), raising=False)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def model(tmp_path) -> Path:
    """A model folder as training leaves it, with what identifies its scans, and what nobody should get."""
    folder = tmp_path / "run/model"
    make_pipeline().save_pretrained(folder)
    (folder / "experiment.json").write_text('{"seen": ["sub-01"]}')
    (folder / "notes.txt").write_text("private")
    (folder / "unet/pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder


def test_a_pushed_model_comes_back(hub, model, capsys):
    command_line("push", model, "ann/toys", "--precision", "float32")
    assert "pushed: http" in capsys.readouterr().out
    names = set(hub.commits["ann/toys"][-1][1])
    parts = {f"{part}/{file}" for part in ("autoencoder", "unet") for file in ("config.json", "model.safetensors")}
    assert names == {"README.md", "pipeline.json"} | parts  # no experiment.json, no notes, no pickle
    card = hub.commits["ann/toys"][-1][1]["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0") and 'from_pretrained("ann/toys")' in card

    fetched = Pipeline.from_pretrained("ann/toys", "cpu", torch.float32)
    kept = Pipeline.from_pretrained(model, "cpu", torch.float32)
    assert fetched.model_hash == kept.model_hash
    assert np.array_equal(*(from_image(pipe(age=60, seed=3, steps=1).images[0]) for pipe in (fetched, kept)))
    command_line("info", "ann/toys")
    assert "16 x 16 x 16 voxels" in capsys.readouterr().out


def test_of_a_folder_with_a_card_the_rest_stays_behind(hub, model):
    """It is pushed as it is, so only the list of files keeps experiment.json and pickles here."""
    (model / "README.md").write_text("---\nlicense: mit\n---\nmine")
    command_line("push", model, "ann/toys")
    files = hub.commits["ann/toys"][-1][1]
    assert files["README.md"].decode().endswith("mine") and set(files) < set(client.FILES)
    assert files["unet/model.safetensors"] == (model / "unet/model.safetensors").read_bytes()


def test_an_older_revision_can_be_had(hub, model):
    first = Pipeline.from_pretrained(model, "cpu", torch.float32)
    address = first.push_to_hub("ann/toys", precision="float32")
    assert address.rpartition("/")[2] == hub.commits["ann/toys"][-1][0]
    other = make_pipeline(channels=8)
    other.push_to_hub("ann/toys", precision="float32")
    old, new = hub.commits["ann/toys"][-2][0], hub.commits["ann/toys"][-1][0]
    assert Pipeline.from_pretrained("ann/toys", "cpu", torch.float32, revision=old).model_hash == first.model_hash
    assert Pipeline.from_pretrained("ann/toys", "cpu", torch.float32, revision=new).model_hash != first.model_hash
    with pytest.raises(InputError, match="no such revision"):
        Pipeline.from_pretrained("ann/toys", "cpu", revision="v9")


def test_nothing_but_weights_json_and_card_is_fetched(hub, model):
    Pipeline.from_pretrained(model, "cpu", torch.float32).push_to_hub("ann/toys")
    files = hub.commits["ann/toys"][-1][1]
    files |= {"unet/pytorch_model.bin": b"evil", "setup.py": b"evil", "autoencoder/code.py": b"evil"}
    folder = model_folder("ann/toys")
    assert not [path for path in hub.asked if path not in client.FILES]
    assert not [path.name for path in folder.rglob("*") if path.suffix in (".bin", ".py")]


def test_a_path_comes_before_a_hub(hub, model, tmp_path):
    assert model_folder("run/model") == Path("run/model")
    assert not client.is_name("run/other")  # mistyped: run/ is a folder here, so no hub is asked
    with pytest.raises(InputError, match="run/other holds no model: there is no such folder"):
        model_folder("run/other")
    assert not hub.asked


def test_what_goes_wrong_is_one_message(hub, model, fails, monkeypatch):
    assert "no such model at http" in fails("info", "ann/none")
    assert "no name of a model at a hub" in fails("push", model, "toys")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    assert "ann/toys:" in fails("push", model, "ann/toys")
    assert "ann/toys" not in hub.commits
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert "cannot be reached" in fails("info", "ann/other")
