"""Asks an ASGI application one request, as a browser would, with any header."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str


async def ask(
    app,
    method: str,
    target: str,
    headers: Mapping[str, str],
    form: Mapping[str, str] | None = None,
    *,
    answered: list | None = None,
) -> Answer:
    """`answered` gets what was sent, also if the application fails afterwards."""
    path, _, query = target.partition("?")
    body = urlencode(form or {}).encode()
    if form is not None:
        headers = {"content-type": "application/x-www-form-urlencoded", **headers}
    sent = [] if answered is None else answered
    requests = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive():
        request = next(requests, None)
        if request is None:
            await asyncio.Event().wait()  # nobody disconnects
        return request

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
    }
    await app(scope, receive, send)
    start = sent[0]
    return Answer(
        start["status"],
        {name.decode(): value.decode() for name, value in start["headers"]},
        b"".join(m.get("body", b"") for m in sent[1:]).decode(),
    )
