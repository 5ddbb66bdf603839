import asyncio
import errno
import os
from functools import partial

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.key_authority.authority import KEY_RELEASES, Authority
from services.key_authority.credential import AgentCredential
from services.key_authority.custody import open_custody
from services.key_authority.servicer import SERVICE_NAME, register
from services.shell.server import running_server
from shelora.audit import verified
from shelora.ckks.parameters import INSECURE_TOY, STANDARD
from shelora.ckks.secret import SecretKey
from shelora.errors import DomainError, Reason
from shelora.transport.channel import call, open_channel
from shelora.transport.status import error_from_rpc
from shelora.v1 import key_authority_pb2 as pb
from shelora.v1 import key_authority_pb2_grpc as pb_grpc

OPEN = pb.OpenEpochRequest(federation_id="clinic", epoch=1, parameters=STANDARD.name)
GET = pb.GetEpochSecretsRequest(federation_id="clinic", epoch=1, client_id="Ward.7_a-b")


@pytest.fixture
def custody(tmp_path, sealing_key):
    with open_custody(tmp_path / "data", sealing_key) as custody:
        yield custody


@pytest.fixture
async def channel(custody, credential):
    authority = Authority(custody.vault, custody.audit, AgentCredential(credential))
    async with (
        running_server([SERVICE_NAME], partial(register, authority)) as address,
        open_channel(address) as channel,
    ):
        yield channel


@pytest.fixture
def stub(channel):
    return pb_grpc.KeyAuthorityStub(channel)


@pytest.fixture
def shown(credential):
    """Metadata of an agent that has the credential."""
    return [("authorization", f"Bearer {credential}")]


async def refusal(method, request, metadata=()):
    with pytest.raises(DomainError) as caught:
        await call(method, request, metadata=metadata)
    return caught.value.reason


def changed(message, **fields):
    other = type(message)()
    other.CopyFrom(message)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


async def test_an_agent_with_the_credential_gets_the_secrets_of_an_open_epoch(stub, shown):
    opened = await call(stub.OpenEpoch, OPEN)
    released = await call(stub.GetEpochSecrets, GET, metadata=shown)
    assert released.parameters == STANDARD.name
    assert released.key_id == opened.key_id
    assert SecretKey.from_bytes(STANDARD, released.ckks_secret_key).key_id == opened.key_id
    assert len(released.obfuscation_secret) == 32
    assert await call(stub.GetEpochSecrets, GET, metadata=shown) == released


async def test_opening_an_epoch_again_or_at_once_finds_the_same_keys(stub):
    responses = await asyncio.gather(*(call(stub.OpenEpoch, OPEN) for _ in range(8)))
    assert len({response.key_id for response in responses}) == 1


@pytest.mark.parametrize(
    "show",
    [
        lambda _: [],
        lambda _: [("authorization", "")],
        lambda _: [("authorization", "Bearer ")],
        lambda hexadecimal: [("authorization", hexadecimal)],
        lambda hexadecimal: [("authorization", f"Bearer {hexadecimal[:-1]}")],
        lambda hexadecimal: [("authorization", f"Bearer {hexadecimal}0")],
        lambda hexadecimal: [("authorization", f"Basic {hexadecimal}")],
        lambda hexadecimal: [("authorization", f"Bearer {'0' * len(hexadecimal)}")],
        lambda hexadecimal: [("authorization-bin", f"Bearer {hexadecimal}".encode())],
    ],
)
async def test_without_the_credential_nothing_is_released(stub, credential, show):
    await call(stub.OpenEpoch, OPEN)
    released = KEY_RELEASES._value.get()
    assert await refusal(stub.GetEpochSecrets, GET, show(credential)) is Reason.UNAUTHENTICATED
    assert KEY_RELEASES._value.get() == released


async def test_a_caller_without_the_credential_cannot_tell_which_epochs_exist(stub):
    await call(stub.OpenEpoch, OPEN)
    for epoch in (1, 2):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetEpochSecrets(changed(GET, epoch=epoch))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert error_from_rpc(caught.value).message == "the agent credential is missing or wrong"


async def test_an_epoch_that_was_not_opened_is_unknown(stub, shown):
    assert await refusal(stub.GetEpochSecrets, GET, shown) is Reason.FEDERATION_UNKNOWN


@pytest.mark.parametrize(
    "fields",
    [
        {"federation_id": "../clinic"},
        {"federation_id": ""},
        {"federation_id": "CLINIC"},
        {"epoch": 0},
        {"parameters": "unheard-of"},
        {"parameters": ""},
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
async def test_an_invalid_request_for_secrets_is_refused(stub, shown, fields):
    await call(stub.OpenEpoch, OPEN)
    assert await refusal(stub.GetEpochSecrets, changed(GET, **fields), shown) is Reason.INVALID_ARGUMENT


async def test_every_release_is_counted_and_logged_without_the_secret(stub, shown, custody):
    await call(stub.OpenEpoch, OPEN)
    before = KEY_RELEASES._value.get()
    with structlog.testing.capture_logs() as logs:
        released = await call(stub.GetEpochSecrets, GET, metadata=shown)
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


async def test_openings_releases_and_refusals_are_written_down(stub, shown, tmp_path):
    opened = await call(stub.OpenEpoch, OPEN)
    await call(stub.GetEpochSecrets, GET, metadata=shown)
    await refusal(stub.GetEpochSecrets, changed(GET, epoch=2), shown)
    await refusal(stub.GetEpochSecrets, GET)
    await refusal(stub.GetEpochSecrets, changed(GET, client_id="no name"), shown)
    records = [record.model_dump(exclude_none=True) for record in written_down(tmp_path)[1:]]
    clinic = {"federation_id": "clinic", "epoch": 1}
    keyed = clinic | {"key_id": opened.key_id.hex()}
    expected = [
        keyed | {"event": "epoch_opened"},
        keyed | {"event": "secrets_released", "client_id": "Ward.7_a-b"},
        clinic
        | {"event": "release_refused", "client_id": "Ward.7_a-b", "reason": "FEDERATION_UNKNOWN", "epoch": 2},
        clinic | {"event": "release_refused", "client_id": "Ward.7_a-b", "reason": "UNAUTHENTICATED"},
        clinic | {"event": "release_refused", "reason": "INVALID_ARGUMENT"},
    ]
    assert [
        {name: record.get(name) for name in wanted} for record, wanted in zip(records, expected, strict=True)
    ] == (expected)
    assert "client_id" not in records[-1]


async def test_nothing_is_released_that_cannot_be_written_down(stub, shown, tmp_path, monkeypatch):
    await call(stub.OpenEpoch, OPEN)
    released, before = KEY_RELEASES._value.get(), written_down(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetEpochSecrets(GET, metadata=shown)
        assert error_from_rpc(caught.value).reason is Reason.STORE_UNAVAILABLE
        assert await refusal(stub.GetEpochSecrets, GET) is Reason.UNAUTHENTICATED, (
            "a refusal keeps its reason"
        )
    assert KEY_RELEASES._value.get() == released
    assert written_down(tmp_path) == before
    await call(stub.GetEpochSecrets, GET, metadata=shown)


async def test_the_next_epoch_opens_while_the_one_before_is_still_released(stub, shown):
    first = await call(stub.OpenEpoch, OPEN)
    second = await call(stub.OpenEpoch, changed(OPEN, epoch=2))
    assert first.key_id != second.key_id
    assert (await call(stub.GetEpochSecrets, GET, metadata=shown)).key_id == first.key_id
    assert (await call(stub.GetEpochSecrets, changed(GET, epoch=2), metadata=shown)).key_id == second.key_id


async def test_the_server_says_that_it_serves_and_what(channel):
    check = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
    health = await health_pb2_grpc.HealthStub(channel).Check(check)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    names = [
        service.name async for response in reflected for service in response.list_services_response.service
    ]
    assert SERVICE_NAME in names


def test_no_method_of_the_service_decrypts():
    methods = pb.DESCRIPTOR.services_by_name["KeyAuthority"].methods
    assert [method.name for method in methods] == ["OpenEpoch", "GetEpochSecrets"]


def test_a_credential_file_is_read_and_its_repr_shows_nothing(credential_file, credential):
    read = AgentCredential.from_file(credential_file)
    read.require(f"Bearer {credential}")
    assert credential not in repr(read)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_credential_file_open_to_other_users_is_refused_with_the_remedy(credential_file, mode):
    credential_file.chmod(mode)
    with pytest.raises(DomainError, match=f"chmod 600 {credential_file}") as caught:
        AgentCredential.from_file(credential_file)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


@pytest.mark.parametrize("content", ["", "short", "AB" * 32, "g" * 64, "ab" * 16 + " " + "ab" * 16, "ä" * 64])
def test_a_credential_that_is_not_hexadecimal_is_refused_with_the_remedy(credential_file, content):
    credential_file.write_text(content)
    with pytest.raises(DomainError, match="openssl rand -hex 32") as caught:
        AgentCredential.from_file(credential_file)
    assert not content or content not in caught.value.message


def test_a_missing_credential_file_is_refused(tmp_path):
    with pytest.raises(DomainError, match="No such file"):
        AgentCredential.from_file(tmp_path / "absent")
