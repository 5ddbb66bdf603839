"""Every RPC x every role x every state of a certificate, against real servers that speak TLS."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from itertools import product
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.aggregation import AggregationPool
from coordinator.authority import KeyAuthorityClient
from services.common.guard import DENIALS
from services.common.revocations import Revocations
from services.common.server import running_server
from shelora.errors import DomainError, Reason
from shelora.transport.certificates import key_to_pem
from shelora.transport.channel import open_channel
from shelora.transport.identity import Identity, Role
from shelora.transport.permissions import NO_CERTIFICATE_NEEDED, PERMISSIONS, scoped_fields
from shelora.transport.replicas import Replicas
from shelora.transport.revocations import Revocation, issued_ms
from shelora.transport.status import error_from_rpc
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.v1 import aggregation_pb2 as aggregation
from shelora.v1 import (
    aggregation_pb2_grpc,
    common_pb2,
    coordinator_pb2_grpc,
    enrolment_pb2_grpc,
    key_authority_pb2_grpc,
)
from shelora.v1 import coordinator_pb2 as coordinator
from tests.e2e.recorder import inside_tls
from tests.identities import (
    AGGREGATION,
    COORDINATOR,
    KEY_AUTHORITY,
    OPERATOR,
    Stranger,
    TestAuthority,
    client,
)

OURS = ("Coordinator", "Aggregation", "KeyAuthority", "Enrolment")
SERVICES = (
    *(f"shelora.v1.{name}" for name in OURS),
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
)
ROLES = (OPERATOR, COORDINATOR, AGGREGATION, KEY_AUTHORITY, client())
NOT_IMPLEMENTED = {"/grpc.health.v1.Health/List"}
"""By gRPC's own health servicer; what is not in the table is refused to everyone."""
ADMITTED = "admitted"


def method_of(path: str) -> Any:
    service, _, name = path.lstrip("/").partition("/")
    return descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]


def served_methods() -> list[str]:
    pool = descriptor_pool.Default()
    return [
        f"/{service}/{method.name}"
        for service in SERVICES
        for method in pool.FindServiceByName(service).methods
    ]


def filled(message: Any, identity: Identity) -> Any:
    """The message with every federation, client and round in it set to the identity's own."""
    own = {
        "federation_id": identity.federation_id,
        "client_id": identity.client_id,
        "round_id": f"{identity.federation_id}.00000000.1",
    }
    for *above, name in scoped_fields(message.DESCRIPTOR):
        place = message
        for step in above:
            place = getattr(place, step)
        setattr(place, name, own[name])
    return message


def request_for(path: str, identity: Identity) -> Any:
    return filled(message_factory.GetMessageClass(method_of(path).input_type)(), identity)


def _deny_nothing(base: type) -> Any:
    """A servicer whose every method answers INTERNAL with the word `admitted`: the call got through."""

    async def unary(_self: Any, request: Any, context: Any) -> None:
        if hasattr(request, "__aiter__"):
            async for _ in request:
                break
        await context.abort(grpc.StatusCode.DATA_LOSS, ADMITTED)

    async def streaming(_self: Any, request: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.DATA_LOSS, ADMITTED)
        yield None

    service = base.__name__.removesuffix("Servicer")
    methods = {
        m.name: streaming if m.server_streaming else unary
        for m in descriptor_pool.Default().FindServiceByName(f"shelora.v1.{service}").methods
    }
    return type(f"Open{service}", (base,), methods)()


def register(server: grpc.aio.Server) -> None:
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(
        _deny_nothing(coordinator_pb2_grpc.CoordinatorServicer), server
    )
    aggregation_pb2_grpc.add_AggregationServicer_to_server(
        _deny_nothing(aggregation_pb2_grpc.AggregationServicer), server
    )
    key_authority_pb2_grpc.add_KeyAuthorityServicer_to_server(
        _deny_nothing(key_authority_pb2_grpc.KeyAuthorityServicer), server
    )
    enrolment_pb2_grpc.add_EnrolmentServicer_to_server(
        _deny_nothing(enrolment_pb2_grpc.EnrolmentServicer), server
    )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> TestAuthority:
    return TestAuthority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def address(authority: TestAuthority) -> AsyncIterator[str]:
    async with serving_everything(authority) as served:
        yield served


@asynccontextmanager
async def serving_everything(
    authority: TestAuthority, revocations: Revocations | None = None
) -> AsyncIterator[str]:
    services = [f"shelora.v1.{name}" for name in OURS]
    credentials = authority.credentials(COORDINATOR, "server")
    async with running_server(services, register, credentials=credentials, revocations=revocations) as served:
        yield served


async def outcome(channel: grpc.aio.Channel, path: str, request: Any) -> str:
    """`admitted`, or the reason of the refusal."""
    method = method_of(path)
    shape = "_".join("stream" if s else "unary" for s in (method.client_streaming, method.server_streaming))
    response = message_factory.GetMessageClass(method.output_type)
    multi = getattr(channel, shape)(
        path, request_serializer=lambda m: m.SerializeToString(), response_deserializer=response.FromString
    )
    call = multi(iter([request]) if method.client_streaming else request, timeout=10)
    try:
        if method.server_streaming:
            await call.read()
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return ADMITTED if error.details() == ADMITTED else error_from_rpc(error).reason.value
    return ADMITTED


def test_the_table_names_exactly_the_rpcs_that_are_served() -> None:
    assert set(PERMISSIONS) == set(served_methods()) - NOT_IMPLEMENTED
    assert set(PERMISSIONS) >= NO_CERTIFICATE_NEEDED


def test_no_role_but_clients_reads_keys_or_results_and_none_but_the_coordinator_makes_them() -> None:
    assert PERMISSIONS["/shelora.v1.KeyAuthority/GetEpochSecrets"] == {Role.CLIENT}
    assert PERMISSIONS["/shelora.v1.Aggregation/GetResult"] == {Role.CLIENT}
    assert PERMISSIONS["/shelora.v1.KeyAuthority/OpenEpoch"] == {Role.COORDINATOR}


def test_no_request_of_a_client_hides_an_identity_in_a_list() -> None:
    """The scope check looks into single messages; a list of messages with identities would escape it."""

    def hidden(message: Any) -> bool:
        return any(
            field.message_type is not None
            and (bool(scoped_fields(field.message_type)) if field.is_repeated else hidden(field.message_type))
            for field in message.fields
        )

    for path, roles in PERMISSIONS.items():
        if Role.CLIENT in roles and path.startswith("/shelora."):
            assert not hidden(method_of(path).input_type), path


async def test_every_rpc_admits_the_roles_of_the_table_and_no_other(
    authority: TestAuthority, address: str
) -> None:
    for identity in ROLES:
        async with open_channel(address, authority.credentials(identity)) as channel:
            for path in served_methods():
                allowed = identity.role in PERMISSIONS.get(path, ())
                expected = ADMITTED if allowed else Reason.PERMISSION_DENIED.value
                got = await outcome(channel, path, request_for(path, identity))
                assert got == expected, (str(identity), path)


async def test_every_rpc_refuses_an_expired_certificate_in_the_handshake(
    authority: TestAuthority, address: str
) -> None:
    day = timedelta(days=1)
    for identity in ROLES:
        held = authority.held(identity, lifetime=day, ago=2 * day)
        async with open_channel(address, _Fixed(held)) as channel:
            for path in served_methods():
                got = await outcome(channel, path, request_for(path, identity))
                assert got == Reason.STORE_UNAVAILABLE.value, (str(identity), path)


async def test_every_rpc_refuses_a_certificate_that_expired_on_an_open_connection(
    authority: TestAuthority, address: str
) -> None:
    async with AsyncExitStack() as stack:
        channels = []
        for identity in ROLES:
            held = authority.held(identity, lifetime=timedelta(seconds=2))
            channel = await stack.enter_async_context(open_channel(address, _Fixed(held)))
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            channels.append((identity, channel))
        await asyncio.sleep(2.1)
        for (identity, channel), path in product(channels, served_methods()):
            got = await outcome(channel, path, request_for(path, identity))
            assert got == Reason.CERTIFICATE_EXPIRED.value, (str(identity), path)


async def test_every_rpc_refuses_a_revoked_certificate_and_admits_one_that_was_issued_later(
    authority: TestAuthority,
) -> None:
    revocations = Revocations(known=True)
    async with serving_everything(authority, revocations) as address:
        for identity in ROLES:
            revoked, later = authority.held(identity, ago=timedelta(hours=1)), authority.held(identity)
            async with (
                open_channel(address, _Fixed(revoked)) as channel,
                open_channel(address, _Fixed(later)) as renewed,
            ):
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                revocation = Revocation(identity, issued_ms(later.facts) - 1)
                revocations.learn([Revocation.from_proto(revocation.to_proto())])  # as servers learn it
                for path in served_methods():
                    got = await outcome(channel, path, request_for(path, identity))
                    assert got == Reason.CERTIFICATE_REVOKED.value, (str(identity), path)
                    got = await outcome(renewed, path, request_for(path, identity))
                    assert got != Reason.CERTIFICATE_REVOKED.value, (str(identity), path)


async def test_a_revocation_concerns_no_other_client_and_no_other_federation(
    authority: TestAuthority,
) -> None:
    revocations = Revocations(known=True)
    path = "/shelora.v1.Coordinator/Heartbeat"
    async with serving_everything(authority, revocations) as address:
        revocations.learn([Revocation(client(), issued_ms(authority.held(client()).facts) + 10_000)])
        for other in (client("ward-8"), client(federation="bank")):
            async with open_channel(address, authority.credentials(other)) as channel:
                assert await outcome(channel, path, request_for(path, other)) == ADMITTED


async def test_until_a_server_knows_who_is_revoked_it_admits_nobody(authority: TestAuthority) -> None:
    path = "/grpc.health.v1.Health/Check"
    for identity in ROLES:
        revocations = Revocations()
        async with (
            serving_everything(authority, revocations) as address,
            open_channel(address, authority.credentials(identity)) as channel,
        ):
            for complete, expected in ((False, Reason.STORE_UNAVAILABLE.value), (True, ADMITTED)):
                revocations.learn([], complete=complete)
                assert await outcome(channel, path, request_for(path, identity)) == expected


async def test_a_coordinator_that_is_revoked_is_no_reason_to_refuse_an_agent_or_to_end_a_federation(
    authority: TestAuthority,
) -> None:
    """Its calls fail as they do while a server is away: they are tried again, with another certificate."""
    revocations, credentials = Revocations(known=True), authority.credentials(COORDINATOR)
    revocations.learn([Revocation(COORDINATOR, issued_ms(credentials.held.facts))])
    async with (
        serving_everything(authority, revocations) as address,
        open_channel(address, credentials) as keys,
    ):
        replicas = Replicas([address], lambda replica: open_channel(replica, credentials), refresh_s=60)
        pool, key_authority = AggregationPool(replicas, retry_s=0), KeyAuthorityClient(keys, retry_s=0)
        for asked in (pool.stored("clinic.0.1", "ward-7"), key_authority.open_epoch("clinic", 1, "standard")):
            with pytest.raises(DomainError, match="waits for another certificate") as caught:
                await asked
            assert caught.value.reason is Reason.STORE_UNAVAILABLE
        await replicas.close()


async def test_calls_in_progress_end_when_their_certificate_is_revoked(authority: TestAuthority) -> None:
    """A stream of answers that nothing announces, a stream of requests that is quiet, and a call that takes long."""
    revocations, ended = Revocations(known=True), []

    @contextmanager
    def noting(name: str) -> Iterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            ended.append(name)
            raise

    class Quiet(coordinator_pb2_grpc.CoordinatorServicer):
        async def Watch(self, _request: Any, _context: Any) -> AsyncIterator[coordinator.Assignment]:
            yield coordinator.Assignment(assignment_id="first")
            with noting("watch"):
                await asyncio.Event().wait()

        async def CastBallot(self, requests: Any, _context: Any) -> None:
            with noting("ballot"):
                async for _ in requests:
                    arrived.set()

        async def Join(self, _request: Any, _context: Any) -> None:
            started.set()
            with noting("join"):
                await asyncio.Event().wait()

    def add(server: grpc.aio.Server) -> None:
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(Quiet(), server)

    async def quiet_ballot() -> AsyncIterator[coordinator.CastBallotRequest]:
        header = coordinator.CastBallotHeader(
            federation_id="clinic", client_id="ward-7", round_id="clinic.0.1"
        )
        yield coordinator.CastBallotRequest(header=header)
        await asyncio.Event().wait()

    arrived, started = asyncio.Event(), asyncio.Event()
    credentials = authority.credentials(COORDINATOR, "server-3")
    held = authority.held(client())
    async with (
        running_server(
            ["shelora.v1.Coordinator"], add, credentials=credentials, revocations=revocations
        ) as address,
        open_channel(address, _Fixed(held)) as channel,
        open_channel(address, authority.credentials(client("ward-8"))) as bystander,
    ):
        stub = coordinator_pb2_grpc.CoordinatorStub(channel)
        own = {"federation_id": "clinic", "client_id": "ward-7"}
        watch = stub.Watch(coordinator.WatchRequest(**own))
        other = coordinator_pb2_grpc.CoordinatorStub(bystander).Watch(
            coordinator.WatchRequest(federation_id="clinic", client_id="ward-8")
        )
        assert (await watch.read()).assignment_id == (await other.read()).assignment_id == "first"
        ballot, join = stub.CastBallot(quiet_ballot()), stub.Join(coordinator.JoinRequest(**own))
        calls = [asyncio.ensure_future(call) for call in (watch.read(), ballot, join)]
        await arrived.wait()
        await started.wait()
        revocations.learn([Revocation(client(), issued_ms(held.facts))])
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert sorted(ended) == ["ballot", "join", "watch"]
        reasons = [error_from_rpc(error).reason for error in outcomes]
        assert reasons == [Reason.CERTIFICATE_REVOKED] * 3
        assert not other.done()
        other.cancel()


async def test_every_rpc_refuses_a_caller_without_a_certificate(
    authority: TestAuthority, address: str
) -> None:
    async with open_channel(address, Stranger(authority)) as channel:
        for path in served_methods():
            assert await outcome(channel, path, request_for(path, client())) == Reason.STORE_UNAVAILABLE.value


async def test_on_the_enrolment_port_a_stranger_may_enrol_and_nothing_else(authority: TestAuthority) -> None:
    open_port = TlsCredentials(IdentityFolder(authority.enrolled(KEY_AUTHORITY)), anonymous_clients=True)
    async with (
        running_server([f"shelora.v1.{name}" for name in OURS], register, credentials=open_port) as address,
        open_channel(address, Stranger(authority)) as channel,
    ):
        for path in served_methods():
            expected = ADMITTED if path in NO_CERTIFICATE_NEEDED else Reason.UNAUTHENTICATED.value
            assert await outcome(channel, path, request_for(path, client())) == expected, path


async def test_every_rpc_refuses_the_certificates_of_another_authority(
    authority: TestAuthority, address: str, tmp_path
) -> None:
    other = TestAuthority(tmp_path)
    for identity in ROLES:
        held = other.held(identity)
        stranger = _Fixed(
            SimpleNamespace(key=held.key, certificate=held.certificate, authority=authority.root.certificate)
        )
        async with open_channel(address, stranger) as channel:
            for path in served_methods():
                got = await outcome(channel, path, request_for(path, identity))
                assert got == Reason.STORE_UNAVAILABLE.value, (str(identity), path)


async def test_a_client_may_name_no_other_federation_client_or_round_in_any_field(
    authority: TestAuthority, address: str
) -> None:
    checked = 0
    async with open_channel(address, authority.credentials(client())) as channel:
        for path, roles in PERMISSIONS.items():
            if Role.CLIENT not in roles:
                continue
            for field in scoped_fields(method_of(path).input_type):
                request = request_for(path, client())
                place = request
                for step in field[:-1]:
                    place = getattr(place, step)
                setattr(place, field[-1], "other.00000000.1" if field[-1] == "round_id" else "other")
                assert await outcome(channel, path, request) == Reason.PERMISSION_DENIED.value, (path, field)
                checked += 1
    assert checked > 25


async def test_a_federation_whose_name_begins_like_another_is_another(
    authority: TestAuthority, address: str
) -> None:
    async with open_channel(address, authority.credentials(client(federation="clinic-2"))) as channel:
        for round_id in ("clinic.00000000.1", "clinic-22.00000000.1", "clinic", ""):
            request = aggregation.GetResultRequest(round_id=round_id)
            path = "/shelora.v1.Aggregation/GetResult"
            assert await outcome(channel, path, request) == Reason.PERMISSION_DENIED.value


async def test_a_later_message_of_a_stream_cannot_change_whose_it_is(
    authority: TestAuthority,
) -> None:
    received: list[Any] = []

    class Storing(aggregation_pb2_grpc.AggregationServicer):
        async def PutShard(self, requests: Any, _context: Any) -> aggregation.PutShardResponse:
            async for request in requests:
                received.append(request)  # noqa: PERF401 - what came before the refusal counts
            return aggregation.PutShardResponse()

    def add(server: grpc.aio.Server) -> None:
        aggregation_pb2_grpc.add_AggregationServicer_to_server(Storing(), server)

    def header(name: str) -> aggregation.PutShardRequest:
        shard = aggregation.PutShardHeader(
            round_id="clinic.0.1", client_id=name, digest=common_pb2.ShardDigest()
        )
        return aggregation.PutShardRequest(header=shard)

    credentials = authority.credentials(AGGREGATION, "server-2")
    before = DENIALS.labels(Reason.PERMISSION_DENIED.value)._value.get()
    async with (
        running_server(["shelora.v1.Aggregation"], add, credentials=credentials) as address,
        open_channel(address, authority.credentials(client())) as channel,
    ):
        call = aggregation_pb2_grpc.AggregationStub(channel).PutShard(
            iter([header("ward-7"), header("ward-8")])
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert error_from_rpc(caught.value).reason is Reason.PERMISSION_DENIED
    assert [request.header.client_id for request in received] == ["ward-7"]
    assert DENIALS.labels(Reason.PERMISSION_DENIED.value)._value.get() == before + 1


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_valid_certificate_over_an_older_tls_is_refused(
    authority: TestAuthority, address: str, version: ssl.TLSVersion
) -> None:
    mine, server = authority.enrolled(client()), authority.folder / "server"
    between = inside_tls(address, server, [mine], version)
    async with between.running(), open_channel(between.address, authority.credentials(client())) as channel:
        path = "/shelora.v1.Coordinator/Heartbeat"
        got = await outcome(channel, path, request_for(path, client()))
    assert got == (ADMITTED if version is ssl.TLSVersion.TLSv1_3 else Reason.UNAUTHENTICATED.value)


class _Fixed:
    """Credentials of one identity in memory."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            self._held.authority, key_to_pem(self._held.key), self._held.certificate
        )

    def generation(self) -> int:
        return 0
