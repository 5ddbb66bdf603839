"""What the guard admits, and what a refused call may cost: no request of it is read."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common import guard, server
from services.common.repeats import Repeats
from services.common.server import running_server
from services.common.settings import ServerSettings
from shelora.errors import DomainError, Reason
from shelora.transport.channel import call, open_channel
from shelora.transport.permissions import LARGEST_REQUESTS, PERMISSIONS, SMALL_REQUEST_BYTES
from shelora.transport.status import REASON_METADATA
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import coordinator_pb2_grpc as pb_grpc
from tests.identities import COORDINATOR, TestAuthority, client

SERVICE = "shelora.v1.Coordinator"
BEAT = pb.HeartbeatRequest(federation_id="fed", client_id="a", stage="idle")
FOREIGN = pb.HeartbeatRequest(federation_id="fed", client_id="b", stage="idle")


class Town(pb_grpc.CoordinatorServicer):
    async def Heartbeat(self, request, context):
        return pb.HeartbeatResponse()

    async def CommitUpdate(self, request, context):
        return pb.CommitUpdateResponse()

    def register(self, server):
        pb_grpc.add_CoordinatorServicer_to_server(self, server)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return TestAuthority(tmp_path_factory.mktemp("authority"))


@asynccontextmanager
async def connected(authority, **limits) -> AsyncIterator[grpc.aio.Channel]:
    settings = ServerSettings(listen="127.0.0.1:0", shutdown_grace_s=0.0, **limits)
    async with (
        running_server(
            [SERVICE], Town().register, settings, credentials=authority.credentials(COORDINATOR)
        ) as address,
        open_channel(address, authority.credentials(client("a", "fed"))) as channel,
    ):
        yield channel


async def refusal(attempt) -> Reason:
    with pytest.raises(DomainError) as caught:
        await attempt
    return caught.value.reason


async def test_a_refused_call_counts_like_any_other(authority):
    async with connected(authority, calls_per_s=1.0) as channel:
        stub = pb_grpc.CoordinatorStub(channel)
        denied = [await refusal(call(stub.Heartbeat, FOREIGN, retry_s=0)) for _ in range(15)]
    assert set(denied[:10]) == {Reason.PERMISSION_DENIED}
    assert denied[-1] is Reason.RATE_LIMITED


async def silent(channel: grpc.aio.Channel, path: str) -> Any:
    """Begins a call and never sends a request. Returns the reason of its end."""
    begun = channel.stream_unary(path)()
    return dict(await begun.trailing_metadata())[REASON_METADATA]


async def test_who_may_not_call_is_told_so_before_a_request_is_read(authority):
    async with connected(authority) as channel:
        assert await silent(channel, "/shelora.v1.Coordinator/CreateFederation") == Reason.PERMISSION_DENIED


async def test_a_call_without_a_request_is_ended(authority, monkeypatch):
    monkeypatch.setattr(guard.Guard.__init__, "__defaults__", (*guard.Guard.__init__.__defaults__[:-1], 0.1))
    async with connected(authority) as channel:
        assert await silent(channel, "/shelora.v1.Coordinator/CommitUpdate") == Reason.TRANSFER_TRUNCATED
        await call(pb_grpc.CoordinatorStub(channel).Heartbeat, BEAT, retry_s=0)


async def test_a_request_has_no_more_bytes_than_its_call_needs(authority):
    async with connected(authority) as channel:
        stub = pb_grpc.CoordinatorStub(channel)
        large = pb.HeartbeatRequest(federation_id="fed", client_id="a", stage="i" * SMALL_REQUEST_BYTES)
        assert await refusal(call(stub.Heartbeat, large, retry_s=0)) is Reason.TRANSFER_TOO_LARGE
        layout_digest = bytes(SMALL_REQUEST_BYTES)
        commit = pb.CommitUpdateRequest(
            federation_id="fed", round_id="fed.0.1", client_id="a", layout_digest=layout_digest
        )
        await call(stub.CommitUpdate, commit, retry_s=0)


async def test_what_is_no_message_is_refused(authority):
    async with connected(authority) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/shelora.v1.Coordinator/Heartbeat")(b"\xff" * 100)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bytes_of_calls_count_against_the_rate(authority):
    """At 64 KiB/s a commit of 32 KiB counts as one of 2 MiB; the burst of ten seconds holds less than one."""
    digest = bytes(2**15)
    commit = pb.CommitUpdateRequest(
        federation_id="fed", round_id="fed.0.1", client_id="a", layout_digest=digest
    )
    async with connected(authority, upload_bytes_per_s=2.0**16) as channel:
        stub = pb_grpc.CoordinatorStub(channel)
        await call(stub.CommitUpdate, commit, retry_s=0)
        with pytest.raises(DomainError):
            await call(stub.CommitUpdate, commit, retry_s=0, timeout_s=0.5)


def test_every_listed_size_is_of_a_call_that_exists():
    assert set(LARGEST_REQUESTS) <= set(PERMISSIONS)


async def test_a_refusal_that_comes_again_and_again_is_logged_once_and_counted(authority):
    with structlog.testing.capture_logs() as logs:
        async with connected(authority) as channel:
            stub = pb_grpc.CoordinatorStub(channel)
            for _ in range(5):
                await refusal(call(stub.Heartbeat, FOREIGN, retry_s=0))
    denied = [(log["event"], log.get("count")) for log in logs if log["event"].startswith("rpc_denied")]
    assert denied == [("rpc_denied", None), ("rpc_denied_again", 4)]


async def test_repeats_are_told_when_their_window_ends():
    told = []
    repeats = Repeats(lambda event, count: told.append((event, count)), window_s=0.05)
    assert [repeats.is_new(event) for event in "aabaa"] == [True, False, True, False, False]
    while not told:  # noqa: ASYNC110 - nothing tells of a timer's end
        await asyncio.sleep(0.01)
    assert told == [("a", 3)]
    assert repeats.is_new("a")


async def test_probes_are_answered_whatever_others_hold_open(authority, monkeypatch, tmp_path):
    """Sixteen streams once took all turns; a stream is not served there now, and a silent call is ended."""
    monkeypatch.setattr(server, "PROBES_AT_ONCE", 8)
    monkeypatch.setattr(server, "PROBE_S", 0.2)
    path = f"unix:{tmp_path}/probes"
    settings = ServerSettings(listen="127.0.0.1:0", health_listen=path, shutdown_grace_s=0.0)
    credentials = authority.credentials(COORDINATOR)

    async with running_server([SERVICE], Town().register, settings, credentials=credentials):
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(path, options=options) for _ in range(5)]
        stub = health_pb2_grpc.HealthStub(channels[0])
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert await watch.code() is grpc.StatusCode.UNIMPLEMENTED
        silents = [
            channel.stream_unary("/grpc.health.v1.Health/Check")()
            for channel in channels[1:]
            for _ in range(4)
        ]
        codes = {await silent.code() for silent in silents}
        assert grpc.StatusCode.DATA_LOSS in codes  # the control: they held turns until they were ended
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for channel in channels:
            await channel.close()
