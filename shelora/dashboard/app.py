"""The page's addresses: parse, ask, render. All that acts is a POST with the page's form secret."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from shelora.dashboard.forms import checked, groups
from shelora.dashboard.model import FederationPage, federation_page, federation_row
from shelora.dashboard.rendering import STATIC, rendered, report
from shelora.dashboard.security import Gate, Secrets, same_form
from shelora.dashboard.watching import Watch
from shelora.errors import DomainError, Reason
from shelora.exporting import encoded, rounds_csv
from shelora.federation import MAX_ROUNDS
from shelora.levels import Level
from shelora.operator import Operator
from shelora.transport.enrolment import MAX_TOKEN_S
from shelora.transport.identity import Identity, Role
from shelora.v1 import coordinator_pb2 as pb
from shelora.version import VERSION

MAX_FORM_BYTES: Final = 64 * 1024
MAX_FIELDS: Final = 200
MAX_STREAMS: Final = 32
"""Tabs that are live at once; page.js keeps one for each that is in sight."""
_FORM: Final = "application/x-www-form-urlencoded"
_UNREACHABLE: Final = {Reason.STORE_UNAVAILABLE: 503, Reason.FEDERATION_UNKNOWN: 404}


@dataclass(frozen=True, kw_only=True)
class AuthorityCalls:
    """What the key authority does for the page; `shelora.operator` has the calls."""

    enrolment: str
    """Where devices exchange tokens, as its operator knows it; "" if it is not known."""
    token: Callable[[str, str, timedelta, Level | None], Awaitable[str]]
    """A token for federation, client ("": it names itself), lifetime, promise (None: what the federation has)."""
    revoke: Callable[[Identity], Awaitable[Any]]
    """Revokes a client."""


class _Stream(StreamingResponse):
    """Server-sent events to one viewer, who counts before anything is awaited: many may come at once."""

    def __init__(self, parts: AsyncIterator[str], viewing: AbstractContextManager[None]) -> None:
        super().__init__(parts, media_type="text/event-stream")
        self._viewing = viewing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._viewing:
            await super().__call__(scope, receive, send)


class Page:
    """The page of one operator.

    Args:
        operator: Connected to the coordinator.
        watch: What is shown.
        authority: None without a key authority: no tokens, no revocation.
        secrets_: This process's.
        hosts: What browsers may call this machine, `host:port` each.
    """

    def __init__(
        self,
        operator: Operator,
        watch: Watch,
        authority: AuthorityCalls | None,
        secrets_: Secrets,
        hosts: Sequence[str],
    ) -> None:
        self._operator = operator
        self._watch = watch
        self._authority = authority
        self._secrets = secrets_
        self._root = f"/{secrets_.path}"
        self.app = Gate(self._routes(), secrets_, hosts)

    async def end(self) -> None:
        """Ends all streams."""
        await self._watch.end()

    def _routes(self) -> Starlette:
        named = "/f/{name}"
        routes = [
            Route("/", self._index),
            Route("/new", self._new, methods=["GET", "POST"]),
            Route("/events", self._events),
            Route(named, self._federation),
            Route(named + "/export.json", self._export),
            Route(named + "/rounds.csv", self._csv),
            Route(named + "/report.html", self._report),
            Route(named + "/token", self._token, methods=["GET", "POST"]),
            Route(named + "/revoke", self._revoke, methods=["GET", "POST"]),
            Route(named + "/{action}", self._act, methods=["GET", "POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            async with self._watch.running():
                yield

        return Starlette(
            routes=[Mount(self._root, routes=routes)],
            lifespan=lifespan,
            exception_handlers={
                DomainError: self._refused,
                HTTPException: self._failed,
                Exception: self._broken,
            },
        )

    async def _index(self, _: Request) -> Response:
        return self._html("index.html", **self._overview(""))

    async def _federation(self, request: Request) -> Response:
        name = request.path_params["name"]
        page = self._shown(await self._watch.fresh(name))
        return self._html("federation.html", page=page, **self._overview(name))

    async def _events(self, request: Request) -> Response:
        """Parts of the page whenever they change, as server-sent events."""
        if self._watch.viewers >= MAX_STREAMS:
            raise HTTPException(503, f"{MAX_STREAMS} tabs show this page already: close some.")
        name = request.query_params.get("federation", "")
        return _Stream(self._parts(name), self._watch.viewing(name))

    async def _parts(self, name: str) -> AsyncIterator[str]:
        told: dict[str, str] = {}
        async for _ in self._watch.changes():
            for part, html in self._live(name).items():
                if told.get(part) != html:
                    told[part] = html
                    yield f"event: part\ndata: {json.dumps({'id': part, 'html': html})}\n\n"
            yield ": alive\n\n"

    def _live(self, name: str) -> dict[str, str]:
        """HTML of each live part by its id."""
        values = self._overview(name)
        parts = {
            part: rendered(f"_{part}.html", **values)
            for part in ("problem", "federations", "start", "alerts", "servers")
        }
        federation = self._watch.federation(name)
        if federation is not None:
            page = self._shown(federation)
            parts["federation"] = rendered("_federation.html", page=page, **values)
        elif name:
            parts["federation"] = rendered("_gone.html", **values)
        return parts

    async def _new(self, request: Request) -> Response:
        if request.method == "GET":
            return self._html("new.html", groups=groups(), refusal="", **self._overview(""))
        sent = await self._sent(request)
        begin = sent.pop("start", "") == "yes"
        spec, errors = checked(sent)
        if spec is None:
            form = groups(sent, errors)
            return self._html("new.html", 422, groups=form, refusal="", **self._overview(""))
        try:
            await self._operator.create(spec.to_proto())
            if begin:
                await self._operator.start(spec.name)
        except DomainError as error:
            refusal = f"{error.reason}: {error.message}"
            return self._html("new.html", 409, groups=groups(sent), refusal=refusal, **self._overview(""))
        return self._to(f"/f/{spec.name}")

    async def _act(self, request: Request) -> Response:
        """Start, stop, extend, rotate, delete: a GET asks, a POST does."""
        name, action = request.path_params["name"], request.path_params["action"]
        if action not in {"start", "stop", "extend", "rotate", "delete"}:
            raise HTTPException(404, "Nothing is here.")
        if request.method == "GET":
            row = federation_row(await self._watch.fresh(name))
            return self._html("confirm.html", action=action, row=row, client="", **self._overview(name))
        sent = await self._sent(request)
        if action == "delete":
            if sent.get("typed") != name:
                raise DomainError(
                    Reason.INVALID_ARGUMENT, f"type the federation's name, {name}, to delete it"
                )
            await self._operator.delete(name)
            await self._watch.look()
            return self._to("/")
        if action == "extend":
            await self._operator.extend(name, _count(sent.get("rounds", ""), MAX_ROUNDS))
        else:
            simple = {
                "start": self._operator.start,
                "stop": self._operator.stop,
                "rotate": self._operator.rotate,
            }
            await simple[action](name)
        return self._to(f"/f/{name}")

    async def _revoke(self, request: Request) -> Response:
        name, authority = request.path_params["name"], self._require_authority()
        if request.method == "GET":
            row = federation_row(await self._watch.fresh(name))
            client = request.query_params.get("client", "")
            return self._html("confirm.html", action="revoke", row=row, client=client, **self._overview(name))
        client = (await self._sent(request)).get("client", "")
        await authority.revoke(Identity(Role.CLIENT, name, client))
        return self._to(f"/f/{name}")

    async def _token(self, request: Request) -> Response:
        name, authority = request.path_params["name"], self._require_authority()
        values: dict[str, Any] = {"name": name, "levels": list(Level), "authority": authority.enrolment}
        if request.method == "GET":
            return self._html("token.html", token="", client="", **values, **self._overview(name))
        sent = await self._sent(request)
        client = sent.get("client", "").strip()
        hours = _count(sent.get("hours", ""), MAX_TOKEN_S // 3600)
        token = await authority.token(name, client, timedelta(hours=hours), _promise(sent.get("promise", "")))
        return self._html("token.html", token=token, client=client, **values, **self._overview(name))

    async def _export(self, request: Request) -> Response:
        return await self._file(request, encoded, "json", "application/json")

    async def _csv(self, request: Request) -> Response:
        return await self._file(request, rounds_csv, "csv", "text/csv")

    async def _report(self, request: Request) -> Response:
        return await self._file(request, report, "html", "text/html")

    async def _file(
        self, request: Request, content: Callable[[Any], str], suffix: str, kind: str
    ) -> Response:
        """A file to keep, never shown as a page of ours."""
        name = request.path_params["name"]
        federation = await self._operator.get(name)
        headers = {"Content-Disposition": f'attachment; filename="{federation.federation_id}.{suffix}"'}
        return Response(content(federation), media_type=kind, headers=headers)

    async def _sent(self, request: Request) -> dict[str, str]:
        """The fields of a form of this page. Raises: HTTPException."""
        if request.headers.get("content-type", "").partition(";")[0] != _FORM:
            raise HTTPException(415, "Send a form.")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_FORM_BYTES:
                raise HTTPException(413, "The form is too large.")
        try:
            fields = parse_qsl(
                body.decode(errors="replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS
            )
        except ValueError:
            raise HTTPException(400, f"The form has more than {MAX_FIELDS} fields.") from None
        sent = dict(fields)
        if not same_form(sent.pop("form", ""), self._secrets):
            raise HTTPException(403, "The form is of another page: load it again.")
        return sent

    def _shown(self, federation: pb.Federation) -> FederationPage:
        return federation_page(federation, self._watch.memory, self._watch.now_s)

    def _require_authority(self) -> AuthorityCalls:
        if self._authority is None:
            raise DomainError(Reason.CONFIGURATION_INVALID, "start the page with --key-authority host:port")
        return self._authority

    def _overview(self, chosen: str) -> dict[str, Any]:
        """What every template gets."""
        watch = self._watch
        return {
            "root": self._root,
            "form_secret": self._secrets.form,
            "chosen": chosen,
            "problem": watch.problem,
            "federations": [federation_row(f) for f in watch.federations],
            "alerts": watch.alerts,
            "servers": watch.servers,
            "tokens": self._authority is not None,
            "version": VERSION,
        }

    def _html(self, template: str, status: int = 200, **values: Any) -> Response:  # noqa: ANN401 - a template's
        return HTMLResponse(rendered(template, **values), status_code=status)

    def _to(self, path: str) -> Response:
        return RedirectResponse(self._root + path, status_code=303)

    async def _refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, DomainError)
        status = _UNREACHABLE.get(error.reason, 409)
        return self._error(status, str(error.reason), error.message)

    async def _failed(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return self._error(error.status_code, str(error.status_code), error.detail)

    async def _broken(self, _: Request, error: Exception) -> Response:
        """What nobody foresaw; the server logs it when this has been sent."""
        message = (
            f"{type(error).__name__}: the page cannot show this; its own output, where it runs, says more"
        )
        return self._error(500, str(Reason.INTERNAL), message)

    def _error(self, status: int, reason: str, message: str) -> Response:
        values: Mapping[str, Any] = self._overview("")
        return self._html("error.html", status, reason=reason, message=message, **values)


def _count(text: str, most: int) -> int:
    """A whole number from 1. Raises: INVALID_ARGUMENT."""
    if not re.fullmatch("[0-9]{1,9}", text, re.ASCII) or not 1 <= int(text) <= most:
        raise DomainError(Reason.INVALID_ARGUMENT, f"write a whole number from 1 to {most}")
    return int(text)


def _promise(text: str) -> Level | None:
    """None for what the federation has. Raises: INVALID_ARGUMENT: a promise that is not understood is not weakened."""
    if text and text not in set(Level):
        raise DomainError(
            Reason.INVALID_ARGUMENT, f"the promise is one of {', '.join(Level)}, or what the federation has"
        )
    return Level(text) if text else None
