import asyncio
import errno
import os
from types import SimpleNamespace

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from client_agent.keys import EpochSecrets
from services.common.server import running_server
from services.key_authority.authority import KEY_RELEASES
from services.key_authority.epochs import EpochId
from services.key_authority.servicer import SERVICE_NAMES
from shelora.audit import LOG_NAME, AuditEvent, verified
from shelora.ckks.parameters import INSECURE_TOY, STANDARD
from shelora.ckks.secret import SecretKey
from shelora.errors import DomainError, Reason
from shelora.obfuscation import epoch_secret_id
from shelora.transport.channel import call, open_channel
from shelora.transport.status import error_from_rpc
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.v1 import key_authority_pb2 as pb
from shelora.v1 import key_authority_pb2_grpc as pb_grpc
from tests.disk import no_file_larger_than
from tests.identities import AGGREGATION, COORDINATOR, KEY_AUTHORITY, OPERATOR, Stranger, client

OPEN = pb.OpenEpochRequest(federation_id="clinic", epoch=1, parameters=STANDARD.name)
GET = pb.GetEpochSecretsRequest(federation_id="clinic", epoch=1, client_id="Ward.7_a-b")


@pytest.fixture
async def address(add, authority, key_authority):
    credentials = authority.credentials(KEY_AUTHORITY)
    async with running_server(
        SERVICE_NAMES, add, credentials=credentials, on_denied=key_authority.denied
    ) as served:
        yield served


@pytest.fixture
async def stub(address, authority):
    """The service as the coordinator and a client call it, each with its certificate."""
    ward = client("Ward.7_a-b")
    async with (
        open_channel(address, authority.credentials(COORDINATOR)) as coordinator,
        open_channel(address, authority.credentials(ward)) as agent,
    ):
        yield SimpleNamespace(
            OpenEpoch=pb_grpc.KeyAuthorityStub(coordinator).OpenEpoch,
            GetEpochSecrets=pb_grpc.KeyAuthorityStub(agent).GetEpochSecrets,
        )


@pytest.fixture
async def plain(add):
    """The service without its guard, which refuses some of what the authority would refuse too."""
    async with running_server(SERVICE_NAMES, add) as address, open_channel(address) as channel:
        yield pb_grpc.KeyAuthorityStub(channel)


async def refusal(method, request):
    with pytest.raises(DomainError) as caught:
        await call(method, request)
    return caught.value.reason


def changed(message, **fields):
    other = type(message)()
    other.CopyFrom(message)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


async def test_a_client_gets_the_secrets_of_an_open_epoch(stub):
    opened = await call(stub.OpenEpoch, OPEN)
    released = await call(stub.GetEpochSecrets, GET)
    assert released.parameters == STANDARD.name
    assert released.key_id == opened.key_id
    assert SecretKey.from_bytes(STANDARD, released.ckks_secret_key).key_id == opened.key_id
    assert len(released.obfuscation_secret) == 32
    assert await call(stub.GetEpochSecrets, GET) == released


async def test_an_epoch_without_a_ckks_key_has_its_secret_and_no_key_that_decrypts(stub, custody):
    keyless = changed(OPEN, parameters="")
    opened = await call(stub.OpenEpoch, keyless)
    released = await call(stub.GetEpochSecrets, GET)
    assert (released.parameters, released.ckks_secret_key) == ("", b"")
    assert released.key_id == opened.key_id == epoch_secret_id(released.obfuscation_secret)
    assert custody.vault.read(EpochId(OPEN.federation_id, OPEN.epoch)).ckks_secret_key == b""
    assert await call(stub.OpenEpoch, keyless) == opened
    assert await refusal(stub.OpenEpoch, OPEN) is Reason.INVALID_ARGUMENT, "it has no key of that profile"
    secrets = EpochSecrets.from_proto(1, released)
    assert (secrets.secret, secrets.encryptor, secrets.decryptor) == (True, None, None)
    other = changed(released, obfuscation_secret=bytes(32))
    with pytest.raises(DomainError, match="another key than it announced"):
        EpochSecrets.from_proto(1, other)


async def test_opening_an_epoch_again_or_at_once_finds_the_same_keys(stub):
    responses = await asyncio.gather(*(call(stub.OpenEpoch, OPEN) for _ in range(8)))
    assert len({response.key_id for response in responses}) == 1


@pytest.mark.parametrize(
    "identity",
    [client(federation="bank"), client(name="ward-8"), OPERATOR, COORDINATOR, AGGREGATION, KEY_AUTHORITY],
    ids=str,
)
async def test_to_anybody_but_the_client_itself_nothing_is_released_and_no_epoch_shown(
    stub, address, authority, identity
):
    await call(stub.OpenEpoch, OPEN)
    released = KEY_RELEASES._value.get()
    answers = set()
    async with open_channel(address, authority.credentials(identity)) as channel:
        for epoch in (1, 2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await pb_grpc.KeyAuthorityStub(channel).GetEpochSecrets(changed(GET, epoch=epoch))
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            answers.add(error_from_rpc(caught.value).message)
    assert len(answers) == 1, "it tells which epochs exist"
    assert KEY_RELEASES._value.get() == released


def denied(tmp_path):
    with (tmp_path / "data" / "audit.log").open("rb") as file:
        return [record for record in verified(file) if record.event is AuditEvent.CALL_DENIED]


async def test_a_call_refused_for_its_certificate_is_in_the_audit_log_before_it_is_answered(
    tmp_path, address, authority
):
    async with open_channel(address, authority.credentials(client(name="ward-8"))) as channel:
        stub = pb_grpc.KeyAuthorityStub(channel)
        assert await refusal(stub.GetEpochSecrets, GET) is Reason.PERMISSION_DENIED
        assert await refusal(stub.OpenEpoch, OPEN) is Reason.PERMISSION_DENIED
        seen = [(r.method.rpartition("/")[2], r.role, r.federation_id, r.client_id) for r in denied(tmp_path)]
    assert seen == [
        ("GetEpochSecrets", "client", "clinic", "ward-8"),
        ("OpenEpoch", "client", "clinic", "ward-8"),
    ]
    assert {record.reason for record in denied(tmp_path)} == {"PERMISSION_DENIED"}


async def test_a_call_that_is_refused_stays_so_if_it_cannot_be_written_down(address, authority, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    operator = authority.credentials(OPERATOR)
    monkeypatch.setattr(os, "fsync", full)
    with structlog.testing.capture_logs() as logs:
        async with open_channel(address, operator) as channel:
            assert (
                await refusal(pb_grpc.KeyAuthorityStub(channel).OpenEpoch, OPEN) is Reason.PERMISSION_DENIED
            )
    assert "refusal_not_written_down" in {record["event"] for record in logs}


async def test_a_stranger_cannot_fill_the_audit_log(tmp_path, custody, key_authority, add, authority):
    folder = IdentityFolder(authority.enrolled(KEY_AUTHORITY))
    port = TlsCredentials(folder, anonymous_clients=True)
    async with (
        running_server(SERVICE_NAMES, add, credentials=port, on_denied=key_authority.denied) as open_address,
        open_channel(open_address, Stranger(authority)) as channel,
    ):
        assert await refusal(pb_grpc.KeyAuthorityStub(channel).OpenEpoch, OPEN) is Reason.UNAUTHENTICATED
    assert denied(tmp_path) == []


async def test_an_epoch_that_was_not_opened_is_unknown(stub):
    assert await refusal(stub.GetEpochSecrets, GET) is Reason.FEDERATION_UNKNOWN


@pytest.mark.parametrize(
    "fields",
    [
        {"federation_id": "../clinic"},
        {"federation_id": ""},
        {"federation_id": "CLINIC"},
        {"epoch": 0},
        {"parameters": "unheard-of"},
        {"parameters": INSECURE_TOY.name},
    ],
)
async def test_an_invalid_request_to_open_an_epoch_is_refused(stub, fields):
    assert await refusal(stub.OpenEpoch, changed(OPEN, **fields)) is Reason.INVALID_ARGUMENT


async def test_another_profile_for_an_open_epoch_is_refused(stub):
    await call(stub.OpenEpoch, OPEN)
    assert await refusal(stub.OpenEpoch, changed(OPEN, parameters="LARGE")) is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "fields", [{"client_id": ""}, {"client_id": "a b"}, {"client_id": "a" * 65}, {"epoch": 0}]
)
async def test_an_invalid_request_for_secrets_is_refused(plain, fields):
    await call(plain.OpenEpoch, OPEN)
    assert await refusal(plain.GetEpochSecrets, changed(GET, **fields)) is Reason.INVALID_ARGUMENT


async def test_every_release_is_counted_and_logged_without_the_secret(stub, custody):
    await call(stub.OpenEpoch, OPEN)
    before = KEY_RELEASES._value.get()
    with structlog.testing.capture_logs() as logs:
        released = await call(stub.GetEpochSecrets, GET)
    assert KEY_RELEASES._value.get() == before + 1
    (record,) = [record for record in logs if record["event"] == "key_released"]
    assert record == {
        "event": "key_released",
        "log_level": "info",
        "federation_id": "clinic",
        "epoch": 1,
        "client_id": "Ward.7_a-b",
        "parameters": STANDARD.name,
        "key_id": released.key_id.hex(),
        "audit_head": custody.audit.head,
    }


def written_down(tmp_path):
    with (tmp_path / "data" / "audit.log").open("rb") as file:
        return list(verified(file))


async def test_openings_releases_and_refusals_are_written_down(plain, tmp_path):
    opened = await call(plain.OpenEpoch, OPEN)
    await call(plain.GetEpochSecrets, GET)
    await refusal(plain.GetEpochSecrets, changed(GET, epoch=2))
    await refusal(plain.GetEpochSecrets, changed(GET, client_id="no name"))
    records = [record.model_dump(exclude_none=True) for record in written_down(tmp_path)[1:]]
    clinic = {"federation_id": "clinic", "epoch": 1}
    keyed = clinic | {"key_id": opened.key_id.hex()}
    expected = [
        keyed | {"event": "epoch_opened"},
        keyed | {"event": "secrets_released", "client_id": "Ward.7_a-b"},
        clinic
        | {"event": "release_refused", "client_id": "Ward.7_a-b", "reason": "FEDERATION_UNKNOWN", "epoch": 2},
        clinic | {"event": "release_refused", "reason": "INVALID_ARGUMENT"},
    ]
    assert [
        {name: record.get(name) for name in wanted} for record, wanted in zip(records, expected, strict=True)
    ] == (expected)
    assert "client_id" not in records[-1]


async def test_nothing_is_released_that_cannot_be_written_down(stub, tmp_path, monkeypatch):
    await call(stub.OpenEpoch, OPEN)
    released, before = KEY_RELEASES._value.get(), written_down(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetEpochSecrets(GET)
        assert error_from_rpc(caught.value).reason is Reason.STORE_UNAVAILABLE
        unopened = await refusal(stub.GetEpochSecrets, changed(GET, epoch=2))
        assert unopened is Reason.FEDERATION_UNKNOWN, "a refusal keeps its reason"
    assert KEY_RELEASES._value.get() == released
    assert written_down(tmp_path) == before
    await call(stub.GetEpochSecrets, GET)


async def test_nothing_is_released_when_real_writes_to_the_log_stop_half_way(stub, tmp_path):
    await call(stub.OpenEpoch, OPEN)
    released, before = KEY_RELEASES._value.get(), written_down(tmp_path)
    length = (tmp_path / "data" / LOG_NAME).stat().st_size
    quiet, refused = structlog.testing.capture_logs(), pytest.raises(grpc.aio.AioRpcError)
    with quiet, no_file_larger_than(length + 20), refused as caught:
        await stub.GetEpochSecrets(GET)
    error = error_from_rpc(caught.value)
    assert error.reason is Reason.STORE_UNAVAILABLE
    assert "File too large; make room for its data_dir" in error.message
    assert KEY_RELEASES._value.get() == released
    await call(stub.GetEpochSecrets, GET)
    assert written_down(tmp_path)[: len(before)] == before


async def test_the_next_epoch_opens_while_the_one_before_is_still_released(stub):
    first = await call(stub.OpenEpoch, OPEN)
    second = await call(stub.OpenEpoch, changed(OPEN, epoch=2))
    assert first.key_id != second.key_id
    assert (await call(stub.GetEpochSecrets, GET)).key_id == first.key_id
    assert (await call(stub.GetEpochSecrets, changed(GET, epoch=2))).key_id == second.key_id


async def test_the_server_says_that_it_serves_and_what(address, authority):
    async with open_channel(address, authority.credentials(OPERATOR)) as channel:
        for name in SERVICE_NAMES:
            check = health_pb2.HealthCheckRequest(service=name)
            health = await health_pb2_grpc.HealthStub(channel).Check(check)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = [s.name async for response in reflected for s in response.list_services_response.service]
    assert set(SERVICE_NAMES) <= set(names)


def test_no_method_of_the_service_decrypts():
    methods = pb.DESCRIPTOR.services_by_name["KeyAuthority"].methods
    assert [method.name for method in methods] == ["OpenEpoch", "GetEpochSecrets", "RetireEpochs"]
