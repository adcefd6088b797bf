"""How requests are answered: read within limits, dropped when the one who asked goes away, told of what happens meanwhile."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ldm3d.errors import InputError
from ldm3d.serve.asked import Limits
from ldm3d.serve.studio import Cancelled
from ldm3d.serve.turns import Full

Tell = Callable[[dict[str, Any]], Awaitable[None]]


class TooLarge(Exception):
    """The body of a request."""


class Answer:
    """A request that is dropped, with what was begun for it, when the one who asked goes away.

    Starlette's streams end only when they next write. Who waits in a queue or for a network writes nothing.
    """

    def __init__(self, limits: Limits):
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        try:
            body = await self.receive(request, receive)
        except (TooLarge, TimeoutError):
            text = "the request is larger than it may be, or arrived too slowly"
            return await JSONResponse({"error": text}, 413)(scope, receive, send)
        except InputError as error:
            return await JSONResponse({"error": str(error)}, 400)(scope, receive, send)
        except Full as error:
            return await JSONResponse({"error": str(error)}, 503, {"retry-after": "5"})(scope, receive, send)
        if body is None:
            return None
        work = asyncio.ensure_future(self._checked(request, receive, body, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
        with suppress(asyncio.CancelledError, Cancelled):
            await work

    async def receive(self, request: Request, receive: Receive) -> Any:
        """The body, which `answer` is given; None where the one who asked went away."""
        content = b""
        async with asyncio.timeout(self.limits.reading):
            async for part in parts(receive, self.limits.body):
                if part is None:
                    return None
                content += part
        return content

    async def _checked(self, request: Request, receive: Receive, body: Any, send: Send) -> None:
        try:
            await self.answer(request, body, send)
        except InputError as error:
            await JSONResponse({"error": str(error)}, 400)(request.scope, receive, send)
        except Full as error:
            await JSONResponse({"error": str(error)}, 503, {"retry-after": "5"})(request.scope, receive, send)

    async def answer(self, request: Request, body: Any, send: Send) -> None:
        raise NotImplementedError


class Lines:
    """An answer of lines of JSON, begun with the first one, and bytes at its end."""

    def __init__(self, send: Send):
        self._send, self._begun = send, False

    async def tell(self, line: dict[str, Any], more: bool = True) -> None:
        await self._write(json.dumps(line).encode() + b"\n", more)

    async def end(self, making: Awaitable[bytes], **about: Any) -> None:
        """Wait for the bytes; write them after a line about them, or a line with the error."""
        try:
            content = await making
        except InputError as error:
            return await self.tell({"error": str(error)}, more=False)
        await self.tell({"bytes": len(content), **about})
        await self._write(content, more=False)

    async def _write(self, body: bytes, more: bool) -> None:
        if not self._begun:
            self._begun = True
            headers = [(b"content-type", b"application/octet-stream")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def after(first: dict[str, Any], lines: Lines) -> Tell:
    """Tells a line before all others."""
    told = False

    async def tell(line: dict[str, Any]) -> None:
        nonlocal told
        if not told:
            told = True
            await lines.tell(first)
        await lines.tell(line)

    return tell


async def parts(receive: Receive, most: int) -> AsyncIterator[bytes | None]:
    """The body of a request in parts; None where the one who asked went away. Raises TooLarge."""
    size = 0
    while (message := await receive())["type"] == "http.request":
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise TooLarge
        yield part
        if not message.get("more_body"):
            return
    yield None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
