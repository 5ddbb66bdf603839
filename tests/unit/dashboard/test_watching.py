"""The page keeps looking, whatever the servers answer, and says when what it shows is old."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from shelora.dashboard import servers, watching
from shelora.dashboard.servers import sampled
from shelora.dashboard.watching import Watch
from shelora.errors import DomainError, Reason
from tests.unit.dashboard.test_model import running

HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n"
GARBLED = b'a{x="1", ="2"} 1\n# TYPE= h\n'
"""The parser of metrics fails at this with an IndexError."""


@asynccontextmanager
async def answering(*parts, every_s=0.0, forever=b""):
    """A server of metrics that answers with these parts, and then with one byte after the other."""

    async def answer(reader, writer):
        try:
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
            while forever:
                writer.write(forever)
                await writer.drain()
                await asyncio.sleep(every_s)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}"
    finally:
        server.close()


async def sample_of(address):
    return (await sampled({"server": address}, 1.0))["server"]


async def test_the_metrics_of_a_server_are_read():
    """The control of the tests below."""
    async with answering(HEAD, b"process_open_fds 3\n", b"process_max_fds NaN\n") as address:
        assert (await sample_of(address)).values == {"process_open_fds": 3.0}


@pytest.mark.parametrize(
    "parts",
    [
        (b"",),
        (b"nonsense",),
        (b"HTTP/1.0 500 Broken\r\n\r\nprocess_open_fds 3\n",),
        (HEAD, b"\xff\xfe"),
        (HEAD, b"x" * (servers.MAX_BYTES + 1)),
        (HEAD, GARBLED),
    ],
    ids=["nothing", "nonsense", "error", "no text", "too long", "garbled"],
)
async def test_what_are_no_metrics_is_no_answer(parts):
    async with answering(*parts) as address:
        assert await sample_of(address) is None


async def test_a_server_does_not_send_the_page_elsewhere():
    """A server could have the operator's machine ask any address that only this machine reaches."""
    async with answering(HEAD, b"process_open_fds 3\n") as other:
        moved = b"HTTP/1.0 302 Found\r\nLocation: http://" + other.encode() + b"/metrics\r\n\r\n"
        async with answering(moved) as address:
            assert await sample_of(address) is None


@pytest.mark.parametrize("head", [b"", HEAD])
async def test_a_server_that_never_ends_its_answer_does_not_stop_the_page(head, monkeypatch):
    """Each byte came in time, so the page waited for good, and went on to say that it was live."""
    monkeypatch.setattr(servers, "TIMEOUT_S", 0.3)
    async with answering(head, every_s=0.05, forever=b"a") as address:
        assert await sample_of(address) is None


class Coordinator:
    """Lists one federation, or waits, or fails as it is told to."""

    def __init__(self):
        self.answers, self.failure = asyncio.Event(), None
        self.answers.set()

    async def list(self):
        await self.answers.wait()
        if self.failure is not None:
            raise self.failure
        return [await self.get("f")]

    async def get(self, _name, _known=()):
        return running()


async def until(watch, says):
    async for _ in watch.changes():
        if says(watch.problem):
            return


@pytest.fixture
def coordinator(monkeypatch):
    monkeypatch.setattr(watching, "REFRESH_S", 0.01)
    monkeypatch.setattr(watching, "METRICS_S", 0.01)
    return Coordinator()


@pytest.mark.parametrize(
    "failure", [OverflowError("unforeseen"), DomainError(Reason.STORE_UNAVAILABLE, "gone")]
)
async def test_no_answer_stops_the_page_from_looking(coordinator, failure):
    """What nobody foresaw ended the loop: the page stayed as it was, and live."""
    watch = Watch(coordinator, {})
    async with watch.running():
        assert watch.problem == ""
        coordinator.failure = failure
        await until(watch, lambda problem: problem)
        assert str(failure) not in watch.problem or isinstance(failure, DomainError)
        coordinator.failure = None
        await until(watch, lambda problem: not problem)
        assert [f.federation_id for f in watch.federations] == ["f"]


async def test_a_coordinator_that_is_late_is_said_while_the_page_waits(coordinator, monkeypatch):
    monkeypatch.setattr(watching, "LATE_S", 0.05)
    coordinator.answers.clear()
    watch = Watch(coordinator, {})
    async with watch.running():  # begins though nothing was answered yet
        assert "the coordinator has not answered" in watch.problem
        coordinator.answers.set()
        await until(watch, lambda problem: not problem)
        assert watch.federations


async def test_servers_are_watched_while_the_coordinator_is_silent(coordinator, monkeypatch):
    """When something is wrong an operator looks at the servers, of which the page told nothing then."""
    monkeypatch.setattr(watching, "LATE_S", 0.05)
    coordinator.answers.clear()
    async with answering(HEAD, b"process_open_fds 3\n") as address:
        watch = Watch(coordinator, {"aggregation": address})
        async with watch.running():
            async for _ in watch.changes():
                if watch.servers:
                    break
            assert watch.servers[0].up
            assert watch.problem
