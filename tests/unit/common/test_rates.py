import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import rates
from services.common.rates import Bucket, RateLimits, Rates
from services.common.server import running_server
from services.common.settings import ServerSettings
from shelora.errors import DomainError, Reason, RetryLaterError
from shelora.transport.channel import call, call_with_stream, open_channel
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import coordinator_pb2_grpc as pb_grpc
from tests.identities import COORDINATOR, TestAuthority, client

SERVICE = "shelora.v1.Coordinator"


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s

    async def sleep(self, seconds):
        self.now_s += seconds


def limited(limits):
    clock = Clock()
    return Rates(limits, clock, clock.sleep), clock


@given(
    rate=st.floats(0.1, 1e4),
    burst=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), max_size=60),
)
def test_never_more_than_the_burst_and_what_came_in_since(rate, burst, steps):
    bucket, now_s, taken = Bucket(rate, burst, 0.0), 0.0, 0
    for pause_s, tokens in steps:
        now_s += pause_s
        if tokens <= burst:
            now_s += 1.000001 * bucket.wait_s(tokens, now_s)
            assert bucket.wait_s(tokens, now_s) < 1e-3, "who has waited as told is let in"
            bucket.take(tokens)
            taken += tokens
            assert taken <= (burst + rate * now_s) * (1 + 1e-6) + 1e-3 * rate


def test_a_call_too_many_is_told_when_to_come_again_and_is_let_in_then():
    meter, clock = limited(RateLimits(calls_s=2, calls_burst=3))
    for _ in range(3):
        with meter.call("a"):
            pass
    with pytest.raises(
        RetryLaterError, match=r"more than 2 calls a second .* try again in 0\.500 s"
    ) as caught:
        meter.call("a").__enter__()
    assert caught.value.reason is Reason.RATE_LIMITED
    clock.now_s += caught.value.retry_after_s
    with meter.call("a"):
        pass


def test_one_callers_calls_are_no_others():
    meter, _ = limited(RateLimits(calls_s=1, calls_burst=1, concurrent=1))
    with (
        meter.call("a"),
        meter.call("b"),
        pytest.raises(RetryLaterError, match="1 calls of this caller are in progress"),
    ):
        meter.call("a").__enter__()


def test_a_call_that_ended_in_whatever_way_makes_room():
    meter, _ = limited(RateLimits(concurrent=1))
    for _ in range(3):
        with pytest.raises(ValueError), meter.call("a"):
            raise ValueError


def test_without_limits_nothing_is_refused():
    meter, _ = limited(RateLimits())
    with meter.call("a"), meter.call("a"):
        assert [meter.call("a").__enter__() for _ in range(1000)]


async def test_bytes_are_read_at_the_rate_and_never_refused():
    meter, clock = limited(RateLimits(bytes_s=100, bytes_burst=1000))
    start_s = clock.now_s
    with meter.call("a") as caller:
        for _ in range(50):
            await meter.receive(caller, 100)
    assert clock.now_s - start_s == pytest.approx((50 * 100 - 1000) / 100, abs=1)


def test_memory_is_bounded_by_the_latest_callers(monkeypatch):
    monkeypatch.setattr(rates, "MAX_CALLERS", 2)
    meter, _ = limited(RateLimits(calls_s=1, calls_burst=1))
    for name in "abcdef":
        with meter.call(name):
            pass
    assert list(meter._callers) == ["e", "f"]


class Town(pb_grpc.CoordinatorServicer):
    """Answers heartbeats, reads plans, watches for ever."""

    def __init__(self):
        self.beats = 0

    async def Heartbeat(self, request, context):
        self.beats += 1
        return pb.HeartbeatResponse()

    async def GetFederation(self, request, context):
        return pb.Federation()

    async def Watch(self, request, context):
        yield pb.Assignment(assignment_id="first")
        await asyncio.Event().wait()

    async def PublishPlan(self, request_iterator, context):
        async for _ in request_iterator:
            pass
        return pb.PublishPlanResponse()

    def register(self, server):
        pb_grpc.add_CoordinatorServicer_to_server(self, server)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return TestAuthority(tmp_path_factory.mktemp("authority"))


def serving(town, authority, **limits):
    settings = ServerSettings(listen="127.0.0.1:0", shutdown_grace_s=0.0, **limits)
    return running_server([SERVICE], town.register, settings, credentials=authority.credentials(COORDINATOR))


BEAT = pb.HeartbeatRequest(federation_id="fed", client_id="a", stage="idle")
ANSWER = pb.HeartbeatResponse()


async def test_our_channels_wait_as_long_as_the_server_says(authority):
    town = Town()
    async with (
        serving(town, authority, calls_per_s=2.0) as address,
        open_channel(address, authority.credentials(client("a", "fed"))) as channel,
    ):
        stub = pb_grpc.CoordinatorStub(channel)
        impatient = [call(stub.Heartbeat, BEAT, retry_s=0) for _ in range(60)]
        refused = [e for e in await asyncio.gather(*impatient, return_exceptions=True) if e != ANSWER]
        assert {error.reason for error in refused} == {Reason.RATE_LIMITED}
        assert len(refused) == 60 - town.beats
        await asyncio.gather(*(call(stub.Heartbeat, BEAT) for _ in range(3)))
    assert town.beats == 60 - len(refused) + 3


async def test_streams_in_progress_are_bounded_by_identity(authority):
    watch = pb.WatchRequest(federation_id="fed", client_id="a")
    async with (
        serving(Town(), authority, concurrent_calls=2) as address,
        open_channel(address, authority.credentials(client("a", "fed"))) as mine,
        open_channel(address, authority.credentials(client("b", "fed"))) as another,
    ):
        stub = pb_grpc.CoordinatorStub(mine)
        streams = [stub.Watch(watch) for _ in range(2)]
        for stream in streams:
            await stream.read()
        with pytest.raises(DomainError, match="2 calls of this caller are in progress"):
            await call(stub.Heartbeat, BEAT, retry_s=0)
        their = pb.HeartbeatRequest(federation_id="fed", client_id="b", stage="idle")
        await call(pb_grpc.CoordinatorStub(another).Heartbeat, their)
        streams[0].cancel()
        await call(stub.Heartbeat, BEAT)  # once the cancellation has arrived


async def test_a_stream_over_the_rate_arrives_whole(authority):
    pieces = [pb.PublishPlanRequest(header=pb.PublishPlanHeader(federation_id="fed", client_id="a"))]
    pieces += [pb.PublishPlanRequest(piece=bytes(10_000))] * 22
    async with (
        serving(Town(), authority, upload_bytes_per_s=20_000.0) as address,
        open_channel(address, authority.credentials(client("a", "fed"))) as channel,
    ):
        await call_with_stream(pb_grpc.CoordinatorStub(channel).PublishPlan, lambda: iter(pieces), retry_s=0)
