import asyncio
import os
import sys
from functools import partial
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc

from services.common.server import running_server
from shelora.errors import DomainError, Reason
from shelora.transport import channel as channels
from shelora.transport.address import HostPort, check_plaintext, is_local
from shelora.transport.channel import call, call_with_stream, is_transient, open_channel, retrying
from shelora.transport.proxy import channel_options
from shelora.transport.status import MAX_DETAILS, RETRY_AFTER_METADATA, translated
from shelora.v1 import aggregation_pb2, aggregation_pb2_grpc
from shelora.v1 import key_authority_pb2 as pb
from shelora.v1 import key_authority_pb2_grpc as pb_grpc
from tests.identities import COORDINATOR, OPERATOR, TestAuthority

SERVICE = "shelora.v1.KeyAuthority"
LOCAL = ["127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1", "unix:/run/x.sock"]
REMOTE = [
    "10.0.0.1:1",
    "0.0.0.0:1",
    "[::]:1",
    "example.org:1",
    "localhost.example.org:1",
    "127.0.0.1.nip.io:1",
]


async def no_sleep(_seconds):
    pass


def rpc_error(code):
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "")


class Flaky(pb_grpc.KeyAuthorityServicer):
    """Fails with each of the given errors in turn, then answers."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.metadata = None

    async def OpenEpoch(self, request, context):
        self.metadata = dict(context.invocation_metadata())
        async with translated(context):
            if self.errors:
                raise self.errors.pop(0)
            return pb.OpenEpochResponse(key_id=request.federation_id.encode())


def serving(servicer):
    return running_server(
        [SERVICE], lambda server: pb_grpc.add_KeyAuthorityServicer_to_server(servicer, server)
    )


@pytest.mark.parametrize("address", LOCAL)
async def test_plaintext_on_this_machine_is_allowed(address):
    assert is_local(address)
    check_plaintext(address)
    await open_channel(address).close()


@pytest.mark.parametrize("address", REMOTE)
async def test_plaintext_beyond_this_machine_is_refused(address):
    for action in (lambda: open_channel(address), lambda: check_plaintext(address)):
        with pytest.raises(DomainError, match="give an identity") as caught:
            action()
        assert caught.value.reason is Reason.CONFIGURATION_INVALID


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x", "host:70000", "host:-1", "host:¹"])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(DomainError) as caught:
        is_local(address)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


@pytest.mark.parametrize("address", ["[::1]:7", "a.b:10", "127.0.0.1:65535"])
def test_an_address_prints_as_it_was_read(address):
    assert str(HostPort.parse(address)) == address


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_only_statuses_that_pass_are_transient(code):
    passing = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED", "CANCELLED"}
    assert is_transient(rpc_error(code)) == (code.name in passing)


def test_our_own_cancellation_and_mistakes_are_not_transient():
    assert not is_transient(asyncio.CancelledError())
    assert not is_transient(ValueError())


async def test_a_call_is_tried_again_until_the_reason_has_passed():
    errors = [DomainError(Reason.STORE_UNAVAILABLE, ""), DomainError(Reason.WORKER_FAILED, "")]
    async with serving(Flaky(*errors)) as address, open_channel(address) as channel:
        stub = pb_grpc.KeyAuthorityStub(channel)
        response = await call(stub.OpenEpoch, pb.OpenEpochRequest(federation_id="f"))
    assert response.key_id == b"f"


async def test_a_refusal_is_final_and_carries_the_reason_of_the_server():
    servicer = Flaky(DomainError(Reason.FEDERATION_UNKNOWN, "no such federation: ö"))
    async with serving(servicer) as address, open_channel(address) as channel:
        with pytest.raises(DomainError) as caught:
            await call(pb_grpc.KeyAuthorityStub(channel).OpenEpoch, pb.OpenEpochRequest())
    assert (caught.value.reason, caught.value.message) == (Reason.FEDERATION_UNKNOWN, "no such federation: ö")


@pytest.mark.parametrize("character", ["x", "ö", "\U0001f511"])
async def test_a_message_too_long_for_trailers_is_cut_and_keeps_its_reason(character):
    servicer = Flaky(DomainError(Reason.PLAN_UNKNOWN, character * 100_000))
    async with serving(servicer) as address, open_channel(address) as channel:
        with pytest.raises(DomainError) as caught:
            await call(pb_grpc.KeyAuthorityStub(channel).OpenEpoch, pb.OpenEpochRequest())
    assert caught.value.reason is Reason.PLAN_UNKNOWN
    assert caught.value.message == character * MAX_DETAILS


async def test_a_server_that_is_not_there_is_reported_as_unavailable():
    async with serving(Flaky()) as address:
        pass
    async with open_channel(address) as channel:
        with pytest.raises(DomainError) as caught:
            await call(pb_grpc.KeyAuthorityStub(channel).OpenEpoch, pb.OpenEpochRequest(), retry_s=0)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


class Refusing(aggregation_pb2_grpc.AggregationServicer):
    """Refuses a stream whose pieces it does not read."""

    async def PutShard(self, request_iterator, context):
        await anext(request_iterator)
        async with translated(context):
            raise DomainError(Reason.TRANSFER_OFFSET, "no")


async def test_why_a_stream_is_refused_arrives_though_the_client_still_sends():
    """grpc.aio overwrites one status in twenty with INTERNAL here (grpc/grpc#36066)."""
    pieces = [aggregation_pb2.PutShardRequest(piece=bytes(200_000))] * 40
    register = aggregation_pb2_grpc.add_AggregationServicer_to_server
    async with (
        running_server(["shelora.v1.Aggregation"], lambda server: register(Refusing(), server)) as address,
        open_channel(address) as channel,
    ):
        stub = aggregation_pb2_grpc.AggregationStub(channel)
        for _ in range(200):
            with pytest.raises(DomainError) as caught:
                await call_with_stream(stub.PutShard, lambda: iter(pieces))
            assert caught.value.reason is Reason.TRANSFER_OFFSET


async def test_metadata_travels_with_the_call():
    servicer = Flaky()
    async with serving(servicer) as address, open_channel(address) as channel:
        method = pb_grpc.KeyAuthorityStub(channel).OpenEpoch
        await call(method, pb.OpenEpochRequest(), metadata=[("authorization", "Bearer 00")])
    assert servicer.metadata["authorization"] == "Bearer 00"


async def attempts_made(**options):
    """Attempts at work that always fails for a reason that may pass."""
    made = 0
    with pytest.raises(DomainError) as caught:  # noqa: PT012 - the loop is the thing under test
        async for attempt in retrying(**options):
            with attempt:
                made += 1
                raise DomainError(Reason.STORE_UNAVAILABLE, str(made))
    assert caught.value.message == str(made)
    return made


async def test_retrying_gives_up_after_its_attempts_with_the_last_error():
    assert await attempts_made(attempts=3, sleep=no_sleep) == 3


async def test_retrying_makes_a_single_attempt_without_time_for_more():
    assert await attempts_made(retry_s=0, sleep=no_sleep) == 1


async def test_what_the_server_asks_to_wait_comes_on_top_up_to_a_bound():
    for asked_ms, least, most in ((1500, 1.5, 1.6), (10**9, 30.0, 30.1)):
        waits = []

        async def record(seconds, waits=waits):
            waits.append(seconds)

        trailing = grpc.aio.Metadata((RETRY_AFTER_METADATA, str(asked_ms)))
        error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), trailing, "")
        with pytest.raises(grpc.aio.AioRpcError):  # noqa: PT012 - the loop is the thing under test
            async for attempt in retrying(attempts=2, retry_s=1e9, sleep=record):
                with attempt:
                    raise error
        assert least <= waits[0] <= most


async def test_waits_between_attempts_are_random_and_grow_to_a_bound():
    waits = []

    async def record(seconds):
        waits.append(seconds)

    assert await attempts_made(attempts=12, sleep=record, retry_s=1e9) == 12
    assert all(0 <= wait <= min(5.0, 0.1 * 2**number) for number, wait in enumerate(waits))
    assert len(set(waits)) == 11


def test_grpc_knows_every_option_that_is_set(monkeypatch):
    """It ignores names that it does not know. Once servers so ended every idle connection for its keepalive probes."""
    library = Path(cygrpc.__file__).read_bytes()
    monkeypatch.setenv("grpc_proxy", "http://p:1")
    routed, direct = channel_options(HostPort("fl.test", 1)), channel_options(HostPort("127.0.0.1", 1))
    assert len(routed) == 2
    for name, _ in (*channels.SERVER_OPTIONS, *channels._CHANNEL_OPTIONS, *routed, *direct):
        assert name.encode() in library, name


async def test_a_command_that_distrusts_a_server_says_one_line_and_grpc_none(tmp_path):
    ours, theirs = TestAuthority(tmp_path / "ours"), TestAuthority(tmp_path / "theirs")
    register = partial(pb_grpc.add_KeyAuthorityServicer_to_server, Flaky())
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    async with running_server([SERVICE], register, credentials=theirs.credentials(COORDINATOR)) as address:
        arguments = ["status", "--coordinator", address, "--identity", str(ours.enrolled(OPERATOR))]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shelora.cli.main", *arguments),
            env=environment,
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await process.communicate()
    assert process.returncode == 2
    assert len(said.splitlines()) == 1
    assert said.startswith(b"SERVER_UNTRUSTED the certificate of the server at")
