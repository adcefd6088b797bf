"""Servers in a thread of this process, for tests: a page of `ldm3d serve`, or any application."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

import uvicorn

from ldm3d.serve.run import guarded, listen
from ldm3d.serve.scans import Scans
from ldm3d.serve.studio import Studio


@dataclass
class Page:
    """Where it is, and what computes."""

    port: int
    studio: Studio
    token: str | None
    scans: Scans

    def ask(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, dict, bytes]:
        """(status, headers in lower case, body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def volume(self, **request) -> tuple[list[dict], bytes]:
        """Lines of the answer, and the bytes after them."""
        status, _, content = self.ask("POST", "/volume", json.dumps(request))
        assert status == 200, content
        lines = []
        while content and "bytes" not in (lines or [{}])[-1]:
            line, _, content = content.partition(b"\n")
            lines.append(json.loads(line))
        return lines, content

    def download(self, kind: str, **request) -> tuple[int, dict, bytes]:
        return self.ask("GET", f"/download/{kind}?request={quote(json.dumps(request))}")


@contextlib.contextmanager
def served(studio: Studio, host: str = "127.0.0.1", token: str | None = None) -> Iterator[Page]:
    """The page at a free port of loopback, guarded as if it listened at `host`."""
    app, token = guarded(studio, host, token)
    with running(app) as port:
        yield Page(port, studio, token, app.app.state.scans)


@contextlib.contextmanager
def running(app) -> Iterator[int]:
    """An ASGI application at a free port of loopback."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, ws="none", log_level="warning", access_log=False, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
