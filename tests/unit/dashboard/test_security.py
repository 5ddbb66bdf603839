"""Who is let in: the operator's browser, from the page itself, and nobody else of all that can reach the port."""

import asyncio
import re
from collections import Counter

import pytest

from shelora.dashboard.app import MAX_FIELDS, MAX_STREAMS, AuthorityCalls, Page
from shelora.dashboard.security import POLICY, Secrets
from shelora.dashboard.watching import Watch
from shelora.errors import DomainError, Reason
from shelora.v1 import coordinator_pb2 as pb
from tests.unit.dashboard.asgi import ask
from tests.unit.test_render import federation

HOST = "127.0.0.1:8000"
HOSTILE = "<script>alert(1)</script>\"'"


class Coordinator:
    """Answers as `Operator` does, and notes what it was asked to do."""

    def __init__(self):
        self.done = []
        self.federation = federation()
        self.federation.phase = pb.PHASE_RUNNING

    async def get(self, name, known=()):
        if name != self.federation.federation_id:
            raise DomainError(Reason.FEDERATION_UNKNOWN, f"there is no federation {name}")
        return self.federation

    async def list(self):
        return [self.federation]

    async def start(self, name):
        self.done.append(("start", name))

    async def rotate(self, name):
        self.done.append(("rotate", name))

    async def stop(self, name):
        self.done.append(("stop", name))

    async def extend(self, name, rounds):
        self.done.append(("extend", name, rounds))

    async def delete(self, name):
        self.done.append(("delete", name))

    async def create(self, spec):
        self.done.append(("create", spec.name))


class Site:
    """The page, and a browser that was let in."""

    def __init__(self):
        self.coordinator, self.secrets, self.tokens, self.revoked = Coordinator(), Secrets(), [], []
        self.watch = Watch(self.coordinator, {})

        async def token(*of):
            self.tokens.append(of)
            return "the-token"

        async def revoke(holder):
            self.revoked.append(holder)

        authority = AuthorityCalls(enrolment="127.0.0.1:7099", token=token, revoke=revoke)
        self.app = Page(self.coordinator, self.watch, authority, self.secrets, [HOST]).app
        self.name = self.coordinator.federation.federation_id

    async def get(self, path, **headers):
        given = {"host": HOST, "cookie": f"shelora_page={self.secrets.cookie}", **headers}
        return await ask(self.app, "GET", f"/{self.secrets.path}{path}", given)

    async def post(self, path, form=None, **headers):
        given = {"host": HOST, "origin": f"http://{HOST}", "cookie": f"shelora_page={self.secrets.cookie}"}
        sent = {"form": self.secrets.form, **(form or {})}
        return await ask(self.app, "POST", f"/{self.secrets.path}{path}", {**given, **headers}, sent)


@pytest.fixture
def site():
    return Site()


async def test_the_token_is_exchanged_for_a_cookie_of_this_path_and_site(site):
    answer = await ask(site.app, "GET", f"/{site.secrets.path}/?token={site.secrets.token}", {"host": HOST})
    assert (answer.status, answer.headers["location"]) == (303, f"/{site.secrets.path}/")
    cookie = answer.headers["set-cookie"]
    assert f"Path=/{site.secrets.path}/" in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert site.secrets.token not in cookie
    assert (await site.get("/")).status == 200


@pytest.mark.parametrize("query", ["", "?token=", "?token=wrong", "?token=%00", "?other=1"])
async def test_without_token_or_cookie_the_page_is_closed(site, query):
    answer = await ask(site.app, "GET", f"/{site.secrets.path}/{query}", {"host": HOST})
    assert answer.status == 403
    assert site.name not in answer.text


@pytest.mark.parametrize(
    "cookie",
    ["", "shelora_page=", "shelora_page=wrong", "shelora_page={right}; shelora_page=other", "page={right}"],
)
async def test_another_cookie_opens_nothing(site, cookie):
    given = cookie.format(right=site.secrets.cookie)
    assert (await site.get("/", cookie=given)).status == 403


async def test_nothing_is_found_without_the_secret_path(site):
    given = {"host": HOST, "cookie": f"shelora_page={site.secrets.cookie}"}
    for path in ("/", "/static/page.js", f"/f/{site.name}", "/" + "x" * 43 + "/"):
        assert (await ask(site.app, "GET", path, given)).status == 404


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "127.0.0.1", "127.0.0.1:8001", "localhost.evil:8000", ""]
)
async def test_a_name_that_was_rebound_to_this_machine_is_refused(site, host):
    assert (await site.get("/", host=host)).status == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", f"https://{HOST}", ""]
)
async def test_a_form_of_another_origin_does_nothing(site, origin):
    assert (await site.post(f"/f/{site.name}/stop", origin=origin)).status == 403
    assert site.coordinator.done == []


async def test_a_form_without_an_origin_does_nothing(site):
    given = {"host": HOST, "cookie": f"shelora_page={site.secrets.cookie}"}
    path = f"/{site.secrets.path}/f/{site.name}/stop"
    assert (await ask(site.app, "POST", path, given, {"form": site.secrets.form})).status == 403
    assert site.coordinator.done == []


@pytest.mark.parametrize("secret", ["", "wrong"])
async def test_a_form_without_the_pages_secret_does_nothing(site, secret):
    assert (await site.post(f"/f/{site.name}/stop", {"form": secret})).status == 403
    assert site.coordinator.done == []


async def test_the_pages_own_form_acts(site):
    """The control of the tests above."""
    answer = await site.post(f"/f/{site.name}/stop")
    assert (answer.status, site.coordinator.done) == (303, [("stop", site.name)])


@pytest.mark.parametrize("action", ["stop", "delete", "extend", "start", "rotate"])
async def test_looking_changes_nothing(site, action):
    assert (await site.get(f"/f/{site.name}/{action}")).status == 200
    assert site.coordinator.done == []


async def test_a_deletion_names_what_it_deletes(site):
    assert (await site.post(f"/f/{site.name}/delete", {"typed": "another"})).status == 409
    assert site.coordinator.done == []
    assert (await site.post(f"/f/{site.name}/delete", {"typed": site.name})).status == 303
    assert site.coordinator.done == [("delete", site.name)]


@pytest.mark.parametrize("rounds", ["", "0", "-1", "1.5", "1e3", "９", "9" * 30])
async def test_rounds_are_whole_numbers(site, rounds):
    assert (await site.post(f"/f/{site.name}/extend", {"rounds": rounds})).status == 409
    assert site.coordinator.done == []


async def test_reads_started_by_another_site_are_refused(site):
    foreign = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert (await site.get("/static/page.js", **foreign)).status == 403
    assert (await site.get("/static/page.js", **{**foreign, "sec-fetch-site": "same-site"})).status == 403
    assert (await site.get("/static/page.js", **{"sec-fetch-site": "same-origin"})).status == 200


async def test_every_answer_has_the_policy_and_is_stored_nowhere(site):
    answers = [
        await site.get("/"),
        await site.get("/static/style.css"),
        await site.get("/f/unknown"),
        await site.get("/", host="evil"),
        await site.get(f"/f/{site.name}/export.json"),
    ]
    for answer in answers:
        assert answer.headers["content-security-policy"] == POLICY
        assert "unsafe" not in POLICY
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


async def test_pages_use_nothing_that_the_policy_forbids(site):
    await site.watch.look()
    for path in ("/", "/new", f"/f/{site.name}", f"/f/{site.name}/token", f"/f/{site.name}/delete"):
        text = (await site.get(path)).text
        assert not re.search(r"<[^>]+\son\w+=|<[^>]+\sstyle=|<style|<script(?! src=)", text), path
        assert all(url.startswith((f"/{site.secrets.path}/", "#")) for url in _addresses(text)), path


def _addresses(text):
    return re.findall(r'(?:href|src|action|data-events)="([^"]+)"', text)


async def test_markup_in_what_members_and_servers_say_is_text(site):
    said = site.coordinator.federation
    said.failure = said.members[0].why = said.spec.training.base_model = HOSTILE
    said.members[0].reason = said.members[0].stage = HOSTILE
    said.members.add(client_id=HOSTILE, idle_ms=5)
    said.history[0].dropped.add(client_id=HOSTILE, reason=HOSTILE, why=HOSTILE)
    said.current.reason = HOSTILE
    await site.watch.look()
    pages = [(await site.get(path)).text for path in ("/", f"/f/{site.name}", f"/f/{site.name}/report.html")]
    pages += Page(site.coordinator, site.watch, None, site.secrets, [HOST])._live(site.name).values()
    assert all("<script>alert" not in page and "\"'>" not in page for page in pages)
    assert sum("&lt;script&gt;alert(1)" in page for page in pages) >= 3


async def test_a_mistaken_form_comes_back_with_errors_beside_its_fields(site):
    answer = await site.post(
        "/new", {"name": "Bad Name", "training.base_model": HOSTILE, "round.rounds": "many"}
    )
    assert answer.status == 422
    assert 'id="name-error"' in answer.text
    assert 'id="round.rounds-error">write a whole number' in answer.text
    assert "<script>alert" not in answer.text
    assert site.coordinator.done == []


async def test_forms_that_are_none_or_too_large_are_refused(site):
    assert (await site.post("/new", {"name": "x" * 70_000})).status == 413
    assert (await site.post("/new", **{"content-type": "text/plain"})).status == 415


async def test_a_form_of_too_many_fields_is_refused(site):
    answer = await site.post("/new", {f"field{i}": "x" for i in range(MAX_FIELDS + 1)})
    assert answer.status == 400
    assert f"more than {MAX_FIELDS} fields" in answer.text


@pytest.mark.parametrize("hours", ["", "0", "-1", "1.5", "nan", "721", "999999999", "9" * 30])
async def test_a_token_lives_as_long_as_the_key_authority_allows(site, hours):
    answer = await site.post(f"/f/{site.name}/token", {"client": "clinic", "hours": hours})
    assert (answer.status, site.tokens) == (409, [])
    assert "a whole number from 1 to 720" in answer.text
    assert (await site.post(f"/f/{site.name}/token", {"client": "clinic", "hours": "720"})).status == 200


async def test_a_promise_that_is_not_understood_gives_no_token(site):
    """It gave one that promised what the federation has."""
    form = {"client": "clinic", "hours": "2", "promise": "completely"}
    assert (await site.post(f"/f/{site.name}/token", form)).status == 409
    assert site.tokens == []


async def test_what_nobody_foresaw_is_a_page_with_a_way_back(site):
    async def broken(_name, _known=()):
        raise OverflowError(HOSTILE)

    site.coordinator.get = broken
    sent = []
    given = {"host": HOST, "cookie": f"shelora_page={site.secrets.cookie}"}
    with pytest.raises(OverflowError):  # so that the server logs it, after the answer
        await ask(site.app, "GET", f"/{site.secrets.path}/f/{site.name}", given, answered=sent)
    text = b"".join(m.get("body", b"") for m in sent).decode()
    assert sent[0]["status"] == 500
    assert "INTERNAL" in text
    assert "Overview" in text
    assert "alert(1)" not in text


async def test_streams_are_bounded(site):
    """Also if all are opened at once: a browser that starts again opens all its tabs."""
    given = {"host": HOST, "cookie": f"shelora_page={site.secrets.cookie}"}
    path = f"/{site.secrets.path}/events?federation={site.name}"
    sent = [[] for _ in range(MAX_STREAMS + 5)]
    tabs = [asyncio.create_task(ask(site.app, "GET", path, given, answered=one)) for one in sent]
    while not all(sent):  # noqa: ASYNC110 - what an application sends is no event
        await asyncio.sleep(0.01)
    assert Counter(one[0]["status"] for one in sent) == {200: MAX_STREAMS, 503: 5}
    await site.watch.end()
    await asyncio.gather(*tabs)
    assert site.watch.viewers == 0


async def test_a_token_is_shown_once_with_the_command_to_paste(site):
    answer = await site.post(
        f"/f/{site.name}/token", {"client": "clinic", "hours": "2", "promise": "selective"}
    )
    assert "client-agent enroll --authority 127.0.0.1:7099 --state-dir state --token the-token" in answer.text
    assert site.tokens[0][:2] == (site.name, "clinic")
    assert "the-token" not in (await site.get(f"/f/{site.name}/token")).text


async def test_a_client_is_revoked_by_its_name(site):
    question = await site.get(f"/f/{site.name}/revoke?client=a.b")
    assert 'value="a.b"' in question.text
    assert not site.revoked
    await site.post(f"/f/{site.name}/revoke", {"client": "a.b"})
    assert [(h.federation_id, h.client_id) for h in site.revoked] == [(site.name, "a.b")]


async def test_secrets_are_drawn_anew_and_not_shown():
    one, other = Secrets(), Secrets()
    for name in ("path", "token", "cookie", "form"):
        assert getattr(one, name) != getattr(other, name)
        assert len(getattr(one, name)) == 43
        assert getattr(one, name) not in repr(one)
