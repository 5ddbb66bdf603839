import asyncio
import os
import signal
from contextlib import AsyncExitStack

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.common.observation import RPC_SECONDS, RPC_TOTAL
from services.common.process import run_process
from services.common.revocations import Revocations
from services.common.server import STRANGERS_CALLS, Ready, Service, StrangersPort, running_server, serve
from services.common.settings import ServerSettings
from shelora.errors import DomainError, Reason
from shelora.exits import EXIT_FAILED, EXIT_REFUSED
from shelora.transport.channel import open_channel
from shelora.transport.status import translated
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.v1 import coordinator_pb2 as pb
from shelora.v1 import coordinator_pb2_grpc as pb_grpc
from shelora.v1.enrolment_pb2 import EnrollRequest, EnrollResponse
from shelora.v1.enrolment_pb2_grpc import EnrolmentServicer, EnrolmentStub, add_EnrolmentServicer_to_server
from tests.identities import COORDINATOR, KEY_AUTHORITY, Stranger, TestAuthority, client

SERVICE = "shelora.v1.Coordinator"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Town(pb_grpc.CoordinatorServicer):
    """Heartbeats answer, fail or wait by their stage; Watch streams until the drain."""

    def __init__(self):
        self.draining = asyncio.Event()
        self.entered = asyncio.Event()
        self.released = asyncio.Event()

    async def Heartbeat(self, request, context):
        async with translated(context):
            if request.stage == "refuse":
                raise DomainError(Reason.CLIENT_UNKNOWN, "")
            if request.stage == "wait":
                self.entered.set()
                await self.released.wait()
            return pb.HeartbeatResponse()

    async def GetFederation(self, request, context):
        raise ValueError

    async def Watch(self, request, context):
        async with translated(context):
            yield pb.Assignment(assignment_id="first")
            await self.draining.wait()
            yield pb.Assignment(assignment_id="last")

    async def PublishPlan(self, request_iterator, context):
        async for _request in request_iterator:
            pass
        return pb.PublishPlanResponse()

    def register(self, server):
        pb_grpc.add_CoordinatorServicer_to_server(self, server)


class Desk(EnrolmentServicer):
    """Certifies nobody."""

    async def Enroll(self, request, context):
        return EnrollResponse()


class Process:
    """A `serve` running in a task."""

    def __init__(self, tmp_path, town, identity, *, listen="127.0.0.1:0", **options):
        self.path = tmp_path / "ready.json"
        settings = ServerSettings(listen=listen, ready_file=self.path, metrics_port=-1, shutdown_grace_s=30.0)
        self.task = asyncio.create_task(
            serve(
                settings,
                Service(names=[SERVICE], register=town.register, **options),
                credentials=identity,
                revocations=Revocations(known=True),
            )
        )

    async def ready(self):
        while (ready := Ready.read(self.path)) is None:
            if self.task.done():
                await self.task
            await asyncio.sleep(0.01)
        return ready

    async def stopped(self):
        os.kill(os.getpid(), signal.SIGTERM)
        await self.task


@pytest.fixture
def town():
    return Town()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return TestAuthority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def identity(authority):
    return authority.credentials(COORDINATOR)


@pytest.fixture
def caller(authority):
    return authority.credentials(client("a", "fed"))


def mine(**fields):
    """A heartbeat of the caller."""
    return pb.HeartbeatRequest(federation_id="fed", client_id="a", **fields)


def counted(method, status):
    return RPC_TOTAL.labels(SERVICE, method, status)._value.get()


def timed(method):
    return sum(bucket.get() for bucket in RPC_SECONDS.labels(SERVICE, method)._buckets)


async def health_of(channel, service):
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_health_and_reflection_speak_of_the_service(town):
    async with running_server([SERVICE], town.register) as address, open_channel(address) as channel:
        assert await health_of(channel, "") == SERVING
        assert await health_of(channel, SERVICE) == SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        async for response in stub.ServerReflectionInfo(iter(requests)):
            names = {service.name for service in response.list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@pytest.mark.parametrize(
    ("method", "request_", "status"),
    [
        ("Heartbeat", pb.HeartbeatRequest(), "OK"),
        ("Heartbeat", pb.HeartbeatRequest(stage="refuse"), "NOT_FOUND"),
        ("GetFederation", pb.GetFederationRequest(), "UNKNOWN"),
    ],
)
async def test_a_unary_call_is_counted_and_timed_by_its_status(town, method, request_, status):
    before, timed_before = counted(method, status), timed(method)
    async with running_server([SERVICE], town.register) as address, open_channel(address) as channel:
        rpc = getattr(pb_grpc.CoordinatorStub(channel), method)(request_)
        assert (await rpc.code()).name == status
    assert counted(method, status) == before + 1
    assert timed(method) == timed_before + 1


async def test_streams_are_counted_when_they_end(town):
    town.draining.set()
    before = counted("Watch", "OK"), counted("PublishPlan", "OK")
    async with running_server([SERVICE], town.register) as address, open_channel(address) as channel:
        stub = pb_grpc.CoordinatorStub(channel)
        assert [a.assignment_id async for a in stub.Watch(pb.WatchRequest())] == ["first", "last"]
        await stub.PublishPlan(iter([pb.PublishPlanRequest(piece=b"x")]))
    assert (counted("Watch", "OK"), counted("PublishPlan", "OK")) == (before[0] + 1, before[1] + 1)


async def test_a_stream_that_the_client_leaves_is_counted_as_cancelled(town):
    before = counted("Watch", "CANCELLED")
    async with running_server([SERVICE], town.register) as address, open_channel(address) as channel:
        watch = pb_grpc.CoordinatorStub(channel).Watch(pb.WatchRequest())
        await watch.read()
        watch.cancel()
        while counted("Watch", "CANCELLED") == before:  # noqa: ASYNC110 - the metric has no event
            await asyncio.sleep(0.01)
    assert counted("Watch", "CANCELLED") == before + 1


async def test_every_method_has_its_series_before_the_first_call(town):
    async with running_server([SERVICE], town.register):
        series = {sample.labels["method"] for sample in RPC_TOTAL.collect()[0].samples}
    assert {method.name for method in pb.DESCRIPTOR.services_by_name["Coordinator"].methods} <= series


@pytest.mark.parametrize(
    ("host", "near"), [("0.0.0.0", "127.0.0.1"), ("[::]", "[::1]"), ("127.0.0.1", "127.0.0.1")]
)
async def test_the_log_says_what_a_server_is_bound_to_and_by_what_names_it_may_be_called(
    town, tmp_path, identity, host, near
):
    with structlog.testing.capture_logs() as logs:
        process = Process(tmp_path, town, identity, listen=f"{host}:0")
        ready = await process.ready()  # as callers on this machine reach it
        await process.stopped()
    (serving,) = (record for record in logs if record["event"] == "serving")
    port = ready.address.rpartition(":")[2]
    assert ready.address == f"{near}:{port}"
    assert serving["listen"] == f"{host}:{port}"
    assert serving["certificate_names"] == list(identity.held.facts.names)
    assert "127.0.0.1" in serving["certificate_names"]


async def test_the_drain_lets_calls_in_progress_finish_and_refuses_new_ones(town, tmp_path, identity, caller):
    process = Process(tmp_path, town, identity)
    ready = await process.ready()
    assert ready.pid == os.getpid()
    assert ready.metrics_port == -1
    async with open_channel(ready.address, caller) as channel:
        stub = pb_grpc.CoordinatorStub(channel)
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await health.read()).status == SERVING
        waiting = stub.Heartbeat(mine(stage="wait"))
        await town.entered.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await health.read()).status == NOT_SERVING
        os.kill(os.getpid(), signal.SIGTERM)  # a second signal does not cut the drain short
        health.cancel()
        assert Ready.read(process.path) is None
        while await stub.Heartbeat(mine()).code() is grpc.StatusCode.OK:
            pass
        town.released.set()
        await waiting
        await process.task


async def test_endless_streams_end_themselves_when_told_of_the_drain(town, tmp_path, identity, caller):
    process = Process(tmp_path, town, identity, on_drain=[town.draining.set])
    ready = await process.ready()
    async with open_channel(ready.address, caller) as channel:
        request = pb.WatchRequest(federation_id="fed", client_id="a")
        watch = pb_grpc.CoordinatorStub(channel).Watch(request)
        assert (await watch.read()).assignment_id == "first"
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await watch.read()).assignment_id == "last"
        assert await watch.read() is grpc.aio.EOF
        await process.task


async def test_background_work_is_cancelled_before_resources_are_closed(town, tmp_path, identity):
    events = []

    async def tick():
        try:
            await asyncio.Event().wait()
        finally:
            events.append("background ended")

    async def close(name):
        events.append(name)

    process = Process(
        tmp_path,
        town,
        identity,
        background=[tick],
        on_stop=[lambda: close("workers"), lambda: close("store")],
    )
    await process.ready()
    await process.stopped()
    assert events == ["background ended", "workers", "store"]


async def test_background_work_that_returns_stops_nothing(town, tmp_path, identity):
    returned = asyncio.Event()

    async def once():
        returned.set()

    process = Process(tmp_path, town, identity, background=[once])
    await process.ready()
    await returned.wait()
    await asyncio.sleep(0)
    assert not process.task.done()
    await process.stopped()


async def test_a_crash_of_background_work_stops_the_server_and_is_raised(town, tmp_path, identity):
    begin = asyncio.Event()
    closed = []

    async def crash():
        await begin.wait()
        raise ZeroDivisionError

    async def close():
        closed.append(True)

    process = Process(tmp_path, town, identity, background=[crash], on_stop=[close])
    await process.ready()
    begin.set()
    with pytest.raises(ZeroDivisionError):
        await process.task
    assert closed == [True]
    assert Ready.read(process.path) is None


async def test_a_ready_file_of_a_successor_is_left_alone(town, tmp_path, identity):
    process = Process(tmp_path, town, identity)
    await process.ready()
    successor = b'{"address": "127.0.0.1:1", "metrics_port": 1, "pid": 1}'
    process.path.write_bytes(successor)
    await process.stopped()
    assert process.path.read_bytes() == successor


async def test_a_server_open_to_the_network_in_plaintext_is_refused(town):
    settings = ServerSettings(listen="0.0.0.0:0", metrics_port=-1)
    with pytest.raises(DomainError, match="give an identity"):
        async with running_server([SERVICE], town.register, settings):
            pass


async def test_a_wildcard_address_is_announced_as_loopback(town, identity):
    settings = ServerSettings(listen="0.0.0.0:0", shutdown_grace_s=0.0)
    async with running_server([SERVICE], town.register, settings, credentials=identity) as address:
        assert address.startswith("127.0.0.1:")


async def test_probes_learn_without_a_certificate_whether_it_serves_and_nothing_else(
    town, tmp_path, identity, caller
):
    probes = f"unix:{tmp_path}/probes"
    settings = ServerSettings(listen="127.0.0.1:0", health_listen=probes, shutdown_grace_s=30.0)
    async with AsyncExitStack() as draining:
        running = running_server([SERVICE], town.register, settings, credentials=identity)
        address = await draining.enter_async_context(running)
        async with open_channel(probes) as channel, open_channel(address, caller) as secured:
            assert await health_of(channel, SERVICE) == SERVING
            for call in (
                pb_grpc.CoordinatorStub(channel).Heartbeat(mine()),
                reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(())).read(),
                health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            waiting = asyncio.ensure_future(pb_grpc.CoordinatorStub(secured).Heartbeat(mine(stage="wait")))
            await town.entered.wait()
            drained = asyncio.create_task(draining.aclose())
            while await health_of(channel, SERVICE) == SERVING:
                pass
            assert await health_of(channel, "") == NOT_SERVING
            town.released.set()
            await waiting
            await drained


async def test_strangers_have_a_port_with_small_messages_and_few_calls_of_each(
    town, tmp_path, identity, caller, authority
):
    keeper = IdentityFolder(authority.enrolled(KEY_AUTHORITY))
    port = StrangersPort(
        "127.0.0.1:0",
        TlsCredentials(keeper, anonymous_clients=True),
        lambda server: add_EnrolmentServicer_to_server(Desk(), server),
    )
    process = Process(tmp_path, town, identity, enrolment=port)
    ready = await process.ready()
    async with (
        open_channel(ready.enrolment_address, Stranger(authority)) as strange,
        open_channel(ready.address, caller) as known,
    ):
        enroll = EnrolmentStub(strange).Enroll

        async def end_of(request: EnrollRequest, **options) -> grpc.StatusCode:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await enroll(request, **options)
            return caught.value.code()

        await enroll(EnrollRequest(token="t" * 12_000))
        assert await end_of(EnrollRequest(token="t" * 17_000)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        large = [("x", "y" * 9_000)]
        assert await end_of(EnrollRequest(), metadata=large) is grpc.StatusCode.RESOURCE_EXHAUSTED
        options = [("grpc.use_local_subchannel_pool", 1)]
        secured = Stranger(authority).channel_credentials()
        channels = [
            grpc.aio.secure_channel(ready.enrolment_address, secured, options) for _ in range(3)
        ]  # four streams each
        silent = [
            channel.stream_unary("/shelora.v1.Enrolment/Enroll")()
            for channel in channels
            for _ in range(STRANGERS_CALLS // 2)
        ]
        done, waiting = await asyncio.wait(
            [asyncio.ensure_future(call.code()) for call in silent], return_when=asyncio.FIRST_COMPLETED
        )
        assert done.pop().result() is grpc.StatusCode.RESOURCE_EXHAUSTED  # of one host that has too many
        await pb_grpc.CoordinatorStub(known).Heartbeat(mine())
        for code in waiting:
            code.cancel()
        for channel in channels:
            await channel.close()
    await process.stopped()


async def test_a_port_in_use_is_a_refused_configuration(town, identity):
    async with running_server([SERVICE], town.register) as address:
        with pytest.raises(DomainError, match="in use") as caught:
            await serve(
                ServerSettings(listen=address, metrics_port=-1),
                Service(names=[SERVICE], register=town.register),
                credentials=identity,
                revocations=Revocations(known=True),
            )
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DomainError(Reason.CONFIGURATION_INVALID, "data_dir is missing"), EXIT_REFUSED),
        (DomainError(Reason.CERTIFICATE_REVOKED, "revoked"), EXIT_REFUSED),
        (DomainError(Reason.STORE_UNAVAILABLE, "no store"), EXIT_FAILED),
        (ZeroDivisionError(), EXIT_FAILED),
    ],
)
def test_the_exit_code_tells_a_refusal_from_a_failure(error, code, capsys):
    def load():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_process("bakery", load, None)
    assert caught.value.code == code
    if isinstance(error, DomainError) and error.reason is Reason.CONFIGURATION_INVALID:
        assert capsys.readouterr().err == "bakery: data_dir is missing\n"
