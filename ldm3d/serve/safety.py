"""Who may use the page: checks before a request is looked at, and headers of every answer."""

import re
import secrets
from collections.abc import Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "ldm3d"
# NiiVue compiles nothing and loads nothing from elsewhere; its fonts and colours are data: URIs
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; worker-src blob:; "
    "connect-src 'self' data: blob:; font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",  # the URL may hold a token
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Guarded:
    """An ASGI application behind checks of the token, of the host's name and of where a request comes from.

    Args:
        app: what is guarded.
        hosts: names under which a browser may reach it; None for any. It keeps other sites from using a browser on this
            machine, by a name of theirs that leads here (DNS rebinding).
        token: must be in the URL once, as ?token=, and then in a cookie; None for none.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None, token: str | None):
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=20).get("token", [""])[0]
        reason = self._refusal(headers, given)
        cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/" if self.token and given else None

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = {**HEADERS, **({"set-cookie": cookie} if cookie and not reason else {})}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in more.items())]
            await send(message)

        app = PlainTextResponse(reason, 403) if reason else self.app
        await app(scope, receive, answer)

    def _refusal(self, headers: Mapping[str, str], given: str) -> str | None:
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            return f"This page is for {', '.join(self.hosts)}."
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "This page answers its own requests only, not those of other sites."
        if self.token and not any(
            secrets.compare_digest(known.encode(), self.token.encode()) for known in (given, _cookie(headers))
        ):
            return "The address lacks the token, or has a wrong one; use the one that `ldm3d serve` printed."
        return None


def _cookie(headers: Mapping[str, str]) -> str:
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""
