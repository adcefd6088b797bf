"""The web application: the page, and volumes while they are made.

GET  /                    the page
GET  /model               what can be asked of the model, as JSON
POST /volume              a volume. The answer is lines of JSON: {"remarks": [...]}, then {"place": n} for each place in the
                          queue, then {"step": k, "of": n}, and at last {"bytes": n, ...}, after which the n bytes of a
                          .nii.gz follow; or {"error": message}
GET  /download/FORMAT     ?request=JSON: the same volume as file: nifti, bids, dicom

Nothing is kept between requests but the last volumes. What is asked for follows from the request alone.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ldm3d.errors import InputError, choose
from ldm3d.serve.asked import Asked, read_asked
from ldm3d.serve.formats import formats, packed
from ldm3d.serve.plausibility import remarks
from ldm3d.serve.studio import Cancelled, Job, Studio
from ldm3d.serve.turns import Full, Turns

STATIC = resources.files("ldm3d.serve") / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}
EVERY = 0.25  # seconds between two lines on the progress
Tell = Callable[[dict[str, Any]], Awaitable[None]]


class TooLarge(Exception):
    """The body of a request."""


def application(studio: Studio) -> Starlette:
    """The page of a studio, without `ldm3d.serve.safety` around it."""
    site = _Site(studio)

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        yield
        studio.close()

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
        Route("/download/{format}", _Download(site), methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=life)


class _Site:
    """What requests share."""

    def __init__(self, studio: Studio):
        self.studio, self.turns = studio, Turns(studio.limits.waiting)

    def read(self, text: bytes | str) -> Asked:
        return read_asked(text, self.studio.pipeline, self.studio.limits, self.studio.preview_steps)

    async def make(self, asked: Asked, tell: Tell) -> bytes:
        """The volume, when it is its turn; who is cancelled while waiting leaves the queue, while computing stops it."""
        if (kept := self.studio.kept(asked)) is not None:
            return kept
        job = Job(self.studio.limits.seconds)
        with self.turns.enter() as turn:
            while place := turn.place:
                await tell({"place": place})
                await turn.moved()
            turn.keep()
            made = self.studio.submit(asked, job)
        loop = asyncio.get_running_loop()
        made.add_done_callback(lambda _: loop.call_soon_threadsafe(turn.leave))
        return await self._watch(made, job, asked, tell)

    async def _watch(self, made: "Future[bytes]", job: Job, asked: Asked, tell: Tell) -> bytes:
        waiting = asyncio.wrap_future(made)
        try:
            while not (await asyncio.wait({waiting}, timeout=EVERY))[0]:
                await tell({"step": job.steps, "of": asked.sampling.steps})
            return waiting.result()
        finally:
            job.cancel()


class _Answer:
    """A request that is dropped, with what was begun for it, when the one who asked goes away.

    Starlette's streams end only when they next write. Who waits in a queue or for a network writes nothing.
    """

    def __init__(self, site: _Site):
        self.site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.site.studio.limits.reading):
                body = await _body(receive, self.site.studio.limits.body)
        except (TooLarge, TimeoutError):
            text = f"the request is larger than {self.site.studio.limits.body:,} bytes, or arrived too slowly"
            return await JSONResponse({"error": text}, 413)(scope, receive, send)
        if body is None:
            return None
        work = asyncio.ensure_future(self._checked(scope, receive, body, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
        with suppress(asyncio.CancelledError, Cancelled):
            await work

    async def _checked(self, scope: Scope, receive: Receive, body: bytes, send: Send) -> None:
        try:
            await self.answer(Request(scope), body, send)
        except InputError as error:
            await JSONResponse({"error": str(error)}, 400)(scope, receive, send)
        except Full as error:
            await JSONResponse({"error": str(error)}, 503, {"retry-after": "5"})(scope, receive, send)

    async def answer(self, request: Request, body: bytes, send: Send) -> None:
        raise NotImplementedError


class _Volume(_Answer):
    async def answer(self, request: Request, body: bytes, send: Send) -> None:
        asked = self.site.read(body)
        begun = False

        async def tell(line: dict[str, Any], more: bool = True) -> None:
            nonlocal begun
            if not begun:
                headers = [(b"content-type", b"application/octet-stream")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                begun = True
                await tell({"remarks": remarks(self.site.studio.pipeline, asked.row)})
            await _write(send, json.dumps(line).encode() + b"\n", more)

        try:
            content = await self.site.make(asked, tell)
        except InputError as error:
            await tell({"error": str(error)}, more=False)
            return
        await tell({"bytes": len(content), "coarse": asked.coarse, "steps": asked.sampling.steps})
        await _write(send, content, more=False)


class _Download(_Answer):
    async def answer(self, request: Request, body: bytes, send: Send) -> None:
        kind = choose("format", request.path_params["format"], formats())
        asked = self.site.read(request.query_params.get("request", "{}"))

        async def silent(_: dict[str, Any]) -> None:
            return None

        content = await self.site.make(asked, silent)
        pipeline = self.site.studio.pipeline
        name, media, content = await asyncio.to_thread(packed, kind, content, pipeline, asked)
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        await Response(content, media_type=media, headers=headers)(request.scope, request.receive, send)


async def _write(send: Send, body: bytes, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _body(receive: Receive, most: int) -> bytes | None:
    """The body of a request; None where the one who asked went away."""
    content = b""
    while (message := await receive())["type"] == "http.request":
        content += message.get("body", b"")
        if len(content) > most:
            raise TooLarge
        if not message.get("more_body"):
            return content
    return None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
