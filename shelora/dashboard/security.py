"""Who may ask the page for something: a browser of this machine that was opened with the token, from the page itself.

The page acts with an operator's rights, and every program on this machine, and every web site open in a browser of it,
can reach its port. In this order: the Host must be this machine's (no DNS rebinding); a request that another site
started is refused (Sec-Fetch-Site, Origin); the path must be the secret one, so that cookies, which know no ports,
go to no other server of this machine; then the cookie counts, which the token is exchanged for.
"""

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE: Final = "shelora_page"
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Nothing from elsewhere, nothing inline: markup that got in could run nothing and reach nobody."""
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",  # no-referrer would have browsers send forms with "Origin: null"
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
"""On every response."""
_READS: Final = frozenset({"GET", "HEAD"})


def _secret() -> str:
    return secrets.token_urlsafe(32)


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """Drawn anew by every process, 256 bits each."""

    path: str = field(default_factory=_secret, repr=False)
    """First segment of every path."""
    token: str = field(default_factory=_secret, repr=False)
    """In the URL that the terminal prints; exchanged for the cookie."""
    cookie: str = field(default_factory=_secret, repr=False)
    form: str = field(default_factory=_secret, repr=False)
    """In every form that acts."""


class Gate:
    """ASGI middleware: refuses all but the operator's browser, and adds the headers of security.

    Args:
        app: The page.
        secrets_: This process's.
        hosts: What the Host header may be, `host:port` each.
    """

    def __init__(self, app: ASGIApp, secrets_: Secrets, hosts: Sequence[str]) -> None:
        self._app = app
        self._secrets = secrets_
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._answer(scope)
        await (refusal or self._app)(scope, receive, guarded)

    def _answer(self, scope: Scope) -> Response | None:
        """What is answered in place of the page; None lets the request through."""
        headers, method = Headers(scope=scope), scope["method"]
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return _refused(421, "This page is for this machine: use the address that the terminal shows.")
        if self._foreign(headers, method, hosts[0]):
            return _refused(403, "Another site sent this request: open the page itself.")
        root = f"/{self._secrets.path}/"
        if not _same(scope["path"][: len(root)], root):
            return _refused(404, "Nothing is here: use the whole address that the terminal shows.")
        offered = _token(scope)
        if scope["path"] == root and method == "GET" and offered is not None:
            return self._opened(root) if _same(offered, self._secrets.token) else _refused(403, _CLOSED)
        return None if _same(_cookie(headers), self._secrets.cookie) else _refused(403, _CLOSED)

    @staticmethod
    def _foreign(headers: Headers, method: str, host: str) -> bool:
        """Whether another origin sent it. A browser says so in Origin, which it sends with all that acts."""
        origin = headers.get("origin")
        if method not in _READS:
            return origin != f"http://{host}"
        if origin is not None and origin != f"http://{host}":
            return True
        # A link elsewhere may open the page, and finds it closed: its cookie is for the same site.
        navigates = headers.get("sec-fetch-mode") == "navigate"
        return headers.get("sec-fetch-site", "none") not in {"none", "same-origin"} and not navigates

    def _opened(self, root: str) -> Response:
        response = RedirectResponse(root, status_code=303)
        response.set_cookie(COOKIE, self._secrets.cookie, path=root, httponly=True, samesite="strict")
        return response


_CLOSED: Final = "This page is closed to this browser: open the whole address that the terminal shows."


def _refused(status: int, words: str) -> Response:
    return PlainTextResponse(words + "\n", status_code=status)


def _same(offered: str, expected: str) -> bool:
    return hmac.compare_digest(offered.encode(), expected.encode())


def same_form(offered: str, secrets_: Secrets) -> bool:
    """Whether a form is one of this page."""
    return _same(offered, secrets_.form)


def _token(scope: Scope) -> str | None:
    """The token in the query, if that is all there is in it."""
    query = scope["query_string"].decode("latin-1")
    return query.removeprefix("token=") if query.startswith("token=") else None


def _cookie(headers: Headers) -> str:
    """The value of our cookie; of several, none counts."""
    pairs = [part.strip().partition("=") for line in headers.getlist("cookie") for part in line.split(";")]
    values = [value for name, _, value in pairs if name == COOKIE]
    return values[0] if len(values) == 1 else ""
