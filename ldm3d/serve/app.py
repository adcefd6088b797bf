"""The web application: the page, and volumes while they are made.

GET  /                    the page
GET  /model               what can be asked of the model, as JSON
POST /volume              a volume. The answer is lines of JSON: {"remarks": [...]}, then {"place": n} for each place in the
                          queue, then {"step": k, "of": n}, and at last {"bytes": n, ...}, after which the n bytes of a
                          .nii.gz follow; or {"error": message}
GET  /download/FORMAT     ?request=JSON: the same volume as file: nifti, bids, dicom
POST /scan                ?kind=.nii.gz: a scan of the user's; answers like /volume, with its name
POST /made                what `ldm3d.serve.works` makes of that scan, on the model's grid; answers like /volume.
                          ?part=spread: how far to trust it
GET  /download/made       ?request=JSON: the same on the scan's own voxels; &part=deviation: how far to trust it

Nothing is kept between requests but the last volumes. What is asked for follows from the request alone.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Send

from ldm3d.errors import choose
from ldm3d.serve.answering import Answer, Lines, Tell, after, parts
from ldm3d.serve.asked import Asked, read_asked
from ldm3d.serve.formats import formats, packed
from ldm3d.serve.plausibility import remarks
from ldm3d.serve.scans import Scans
from ldm3d.serve.studio import Job, Studio
from ldm3d.serve.turns import Full, Turns
from ldm3d.serve.works import Work, read_work

STATIC = resources.files("ldm3d.serve") / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}
EVERY = 0.25  # seconds between two lines on the progress


def application(studio: Studio) -> Starlette:
    """The page of a studio, without `ldm3d.serve.safety` around it."""
    site = _Site(studio)

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        yield
        studio.close()
        site.scans.close()

    files = {name: STATIC / name for name in sorted(path.name for path in STATIC.iterdir())}

    async def file(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in files:
            return JSONResponse({"error": "no such file"}, 404)
        return FileResponse(str(files[name]), media_type=TYPES["." + name.rpartition(".")[2]])

    async def model(_: Request) -> Response:
        return JSONResponse({**studio.description(), "formats": formats()})

    routes = [
        Route("/", file),
        Route("/static/{name}", file),
        Route("/model", model),
        Route("/volume", _Volume(site), methods=["POST"]),
        Route("/download/made", _OwnVoxels(site), methods=["GET"]),
        Route("/download/{format}", _Download(site), methods=["GET"]),
        Route("/scan", _Upload(site), methods=["POST"]),
        Route("/made", _Made(site), methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=life)
    app.state.scans = site.scans
    return app


class _Site:
    """What requests share."""

    def __init__(self, studio: Studio):
        self.studio, self.turns = studio, Turns(studio.limits.waiting)
        self.scans, self.arriving = Scans(studio.pipeline, studio.limits), 0

    def read(self, text: bytes | str) -> Asked:
        return read_asked(text, self.studio.pipeline, self.studio.limits, self.studio.preview_steps)

    async def make(self, asked: Asked, tell: Tell) -> bytes:
        """A volume, see `in_turn`."""
        return await self.in_turn(asked, lambda job: self.studio.submit(asked, job), tell, asked.sampling.steps)

    async def in_turn(self, key: Hashable, begin: Callable[[Job], "Future[bytes]"], tell: Tell, steps: int = 1) -> bytes:
        """What `begin` makes, when it is its turn; who is cancelled leaves the queue, or stops what is computed.

        Args:
            key: under which the studio may have kept it.
            begin: starts it in the studio's thread.
            tell: is told of places in the queue and of steps.
            steps: that there will be, unless the job says otherwise.
        """
        if (kept := self.studio.kept(key)) is not None:
            return kept
        job = Job(self.studio.limits.seconds, steps)
        with self.turns.enter() as turn:
            while place := turn.place:
                await tell({"place": place})
                await turn.moved()
            turn.keep()
            made = begin(job)
        loop = asyncio.get_running_loop()
        made.add_done_callback(lambda _: loop.call_soon_threadsafe(turn.leave))
        return await self._watch(made, job, tell)

    def read_work(self, text: bytes | str) -> Work:
        """What is asked of a scan that is still here."""
        work = read_work(text, self.studio.pipeline, self.studio.limits, self.studio.preview_steps)
        self.scans.get(work.scan)
        return work

    async def work(self, asked: Work, part: str, tell: Tell) -> bytes:
        """A part of what becomes of a scan, see `Scans.make` and `in_turn`."""
        key = (asked, part)
        begin = lambda job: self.studio.run(key, lambda: self.scans.make(asked, part, job))  # noqa: E731
        return await self.in_turn(key, begin, tell)

    async def _watch(self, made: "Future[bytes]", job: Job, tell: Tell) -> bytes:
        waiting = asyncio.wrap_future(made)
        try:
            while not (await asyncio.wait({waiting}, timeout=EVERY))[0]:
                await tell({"step": job.steps, "of": job.total})
            return waiting.result()
        finally:
            job.cancel()


class _OfSite(Answer):
    def __init__(self, site: _Site):
        super().__init__(site.studio.limits)
        self.site = site


class _Volume(_OfSite):
    async def answer(self, request: Request, body: bytes, send: Send) -> None:
        asked = self.site.read(body)
        lines = Lines(send)
        said = {"remarks": remarks(self.site.studio.pipeline, asked.row)}
        making = self.site.make(asked, after(said, lines))
        await lines.end(making, coarse=asked.coarse, steps=asked.sampling.steps, **said)


class _Upload(_OfSite):
    async def receive(self, request: Request, receive: Receive) -> Path | None:
        """The scan as a file in the temporary folder; memory holds one part of it at a time."""
        path = self.site.scans.path(request.query_params.get("kind", ""))
        if self.site.arriving >= self.limits.uploads:
            raise Full("other scans are just arriving; try again in a moment")
        self.site.arriving += 1
        whole = False
        try:
            async with asyncio.timeout(10 * self.limits.reading):
                with path.open("wb") as file:
                    async for part in parts(receive, self.limits.scan):
                        if part is None:
                            return None
                        file.write(part)
            whole = True
            return path
        finally:
            self.site.arriving -= 1
            if not whole:
                path.unlink(missing_ok=True)

    async def answer(self, request: Request, body: Path, send: Send) -> None:
        lines, names = Lines(send), []

        def add(job: Job) -> bytes:
            name, content = self.site.scans.add(body, job)
            names.append(name)
            return content

        try:
            making = self.site.in_turn(None, lambda job: self.site.studio.run(None, lambda: add(job)), lines.tell)
            content = await making
            await lines.end(_ready(content), scan=names[0])
        finally:
            body.unlink(missing_ok=True)


class _Made(_OfSite):
    async def answer(self, request: Request, body: bytes, send: Send) -> None:
        part = choose("part", request.query_params.get("part", "grid"), ("grid", "spread"))
        asked = self.site.read_work(body)
        lines, said = Lines(send), {"remarks": remarks(self.site.studio.pipeline, asked.row)}
        await lines.end(self.site.work(asked, part, after(said, lines)), coarse=asked.coarse, **said)


class _Download(_OfSite):
    async def answer(self, request: Request, body: bytes, send: Send) -> None:
        kind = choose("format", request.path_params["format"], formats())
        asked = self.site.read(request.query_params.get("request", "{}"))
        content = await self.site.make(asked, _silent)
        file = await asyncio.to_thread(packed, kind, content, self.site.studio.pipeline, asked)
        await _file(*file)(request.scope, request.receive, send)


class _OwnVoxels(_OfSite):
    async def answer(self, request: Request, body: bytes, send: Send) -> None:
        part = choose("part", request.query_params.get("part", "own"), ("own", "deviation"))
        asked = self.site.read_work(request.query_params.get("request", "{}"))
        content = await self.site.work(asked, part, _silent)
        name = f"derived_{asked.name}{'_deviation' if part == 'deviation' else ''}.nii.gz"
        await _file(name, "application/gzip", content)(request.scope, request.receive, send)


def _file(name: str, media: str, content: bytes) -> Response:
    return Response(content, media_type=media, headers={"content-disposition": f'attachment; filename="{name}"'})


async def _silent(_: dict[str, Any]) -> None:
    return None


async def _ready(content: bytes) -> bytes:
    return content
