"""The live page under the hand of its reader, in a real browser; the coordinator is one whose members always change.

New parts come every second. What they must not do is take a click, a selection or the keyboard's place away.
"""

import asyncio
import socket
import time
from contextlib import asynccontextmanager

import pytest
import uvicorn

from shelora.dashboard.app import AuthorityCalls, Page
from shelora.dashboard.security import Secrets
from shelora.dashboard.watching import Watch
from shelora.v1 import coordinator_pb2 as pb
from tests.dashboard.browser_page import CHROMIUM, DESK, FLAGS, PHONE, playwright
from tests.unit.dashboard.test_model import running

pytestmark = [
    pytest.mark.skipif(
        not CHROMIUM.exists(), reason="there is no /usr/bin/chromium: apt-get install chromium"
    ),
    pytest.mark.timeout(300),
]
CONNECTIONS = 6
"""Of a browser to one server, for all its tabs, by HTTP/1.1."""
LONG = "w" * 500


class Coordinator:
    """Says something else every time, of a federation of that name."""

    def __init__(self, name: str = "f") -> None:
        self.name = name

    async def list(self):
        return [await self.get(self.name)]

    async def get(self, _name, _known=()):
        said = running(mode="complete")
        said.federation_id, said.trained_rounds = self.name, 1
        for member in said.members:
            member.idle_ms = int(1000 * time.monotonic()) % 50_000
        return said


@asynccontextmanager
async def served(coordinator):
    """The page's root, and its whole address."""

    async def no_call(*_):
        raise AssertionError

    secrets = Secrets()
    config = uvicorn.Config(None, loop="asyncio", http="h11", ws="none", log_level="warning")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        watch = Watch(coordinator, {})
        authority = AuthorityCalls(enrolment="h:1", token=no_call, revoke=no_call)
        config.app = Page(coordinator, watch, authority, secrets, [host]).app
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        root = f"http://{host}/{secrets.path}/"
        yield root, f"{root}?token={secrets.token}"
        await watch.end()
        server.should_exit = True
        await task


class Wordy(Coordinator):
    """All that members choose is as long as it may be, in one word."""

    async def get(self, name, known=()):
        said = await super().get(name, known)
        said.failure = LONG
        said.members[0].client_id, said.members[0].reason, said.members[0].why = (
            LONG[:64],
            "DATA_INVALID",
            LONG,
        )
        ended = said.history.add(number=1, kind=pb.ROUND_KIND_TRAIN, state=pb.ROUND_STATE_PUBLISHED)
        ended.dropped.add(client_id=LONG[:64], reason="NORM_OUTLIER", why=LONG)
        said.applicants.add(client_id=LONG[:64], reason="DATA_INVALID", why=LONG)
        return said


@pytest.fixture
async def browser(tmp_path):
    async with playwright.async_playwright() as driver:
        context = await driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=str(CHROMIUM), args=FLAGS, viewport=DESK
        )
        context.set_default_timeout(60_000)
        yield context
        await context.close()


@pytest.fixture
async def root(browser):
    async with served(Coordinator()) as (root, address):
        await browser.pages[0].goto(address)
        yield root
        for tab in browser.pages:
            await tab.goto("about:blank")  # ends its stream


async def parts(tab, count: int = 2) -> None:
    """Waits for that many new versions of the federation."""
    await tab.evaluate(
        """count => new Promise(done => {
            const observer = new MutationObserver(() => { if (!--count) { observer.disconnect(); done(); } });
            const change = {subtree: true, childList: true, characterData: true};
            observer.observe(document.getElementById("federation"), change);
        })""",
        count,
    )


async def test_new_parts_take_no_click_away(browser, root):
    """The element under a pressed button was replaced, so that the click went nowhere: one of four that took 250 ms."""
    tab = browser.pages[0]
    await tab.goto(f"{root}f/f")
    await parts(tab)
    place = await tab.locator("#do-stop").bounding_box()
    await tab.mouse.move(place["x"] + 5, place["y"] + 5)
    await tab.mouse.down()
    await parts(tab)
    await tab.mouse.up()
    await tab.wait_for_url("**/f/f/stop")


async def test_new_parts_leave_the_selection_and_the_keyboard_where_they_are(browser, root):
    tab = browser.pages[0]
    await tab.goto(f"{root}f/f")
    await tab.locator("#do-delete").focus()
    await tab.evaluate("getSelection().selectAllChildren(document.querySelector('#adapter code'))")
    await parts(tab, 3)
    assert await tab.evaluate("String(getSelection())") == (
        "client-agent export --config agent.yaml --to my-adapter"
    )
    assert await tab.evaluate("document.activeElement.id") == "do-delete"


async def test_tabs_out_of_sight_do_not_keep_others_from_opening(browser, root):
    """The sixth tab waited for a connection for good: each one before it held a stream."""
    tabs = [browser.pages[0]]
    for _ in range(CONNECTIONS + 2):
        # The driver keeps all tabs in sight, so this one is told that it is not any more.
        await tabs[-1].evaluate("""() => {
            Object.defineProperty(document, "hidden", {get: () => true, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"));
        }""")
        tabs.append(await browser.new_page())
        await tabs[-1].goto(f"{root}f/f")
    await parts(tabs[-1])
    first = tabs[1]
    await first.evaluate(
        """() => { delete document.hidden; document.dispatchEvent(new Event("visibilitychange")); }"""
    )
    await parts(first)


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
async def test_what_members_say_does_not_widen_the_page(browser, size):
    """A reason of one long word made it 2888 pixels wide on a phone of 375."""
    name = LONG[:64]
    async with served(Wordy(name)) as (root, address):
        tab = browser.pages[0]
        await tab.set_viewport_size(size)
        await tab.goto(address)
        for path in ("", f"f/{name}", f"f/{name}/delete", f"f/{name}/revoke?client={name}"):
            await tab.goto(root + path)
            assert await tab.evaluate("document.documentElement.scrollWidth") <= size["width"], path
        await tab.goto("about:blank")
