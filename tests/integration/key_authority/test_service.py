import asyncio
from functools import partial
from types import SimpleNamespace

import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.key_authority.authority import KEY_RELEASES, Authority
from services.key_authority.servicer import SERVICE_NAMES, register
from services.key_authority.vault import Vault
from services.shell.server import running_server
from shelora.ckks.parameters import INSECURE_TOY, STANDARD
from shelora.ckks.secret import SecretKey
from shelora.errors import DomainError, Reason
from shelora.transport.channel import call, open_channel
from shelora.v1 import key_authority_pb2 as pb
from shelora.v1 import key_authority_pb2_grpc as pb_grpc
from tests.identities import COORDINATOR, KEY_AUTHORITY, OPERATOR, client

OPEN = pb.OpenEpochRequest(federation_id="clinic", epoch=1, parameters=STANDARD.name)
GET = pb.GetEpochSecretsRequest(federation_id="clinic", epoch=1, client_id="Ward.7_a-b")


@pytest.fixture
async def address(tmp_path, authority, enrolments):
    add = partial(register, Authority(Vault(tmp_path / "epochs")), enrolments)
    async with running_server(SERVICE_NAMES, add, credentials=authority.credentials(KEY_AUTHORITY)) as served:
        yield served


@pytest.fixture
async def stub(address, authority):
    """Calls as the coordinator, GetEpochSecrets as the client."""
    async with (
        open_channel(address, authority.credentials(COORDINATOR)) as coordinator,
        open_channel(address, authority.credentials(client("Ward.7_a-b"))) as ward,
    ):
        opening, releasing = pb_grpc.KeyAuthorityStub(coordinator), pb_grpc.KeyAuthorityStub(ward)
        yield SimpleNamespace(OpenEpoch=opening.OpenEpoch, GetEpochSecrets=releasing.GetEpochSecrets)


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


async def test_a_client_of_the_federation_gets_the_secrets_of_an_open_epoch(stub):
    opened = await call(stub.OpenEpoch, OPEN)
    released = await call(stub.GetEpochSecrets, GET)
    assert released.parameters == STANDARD.name
    assert released.key_id == opened.key_id
    assert SecretKey.from_bytes(STANDARD, released.ckks_secret_key).key_id == opened.key_id
    assert len(released.obfuscation_secret) == 32
    assert await call(stub.GetEpochSecrets, GET) == released


async def test_opening_an_epoch_again_or_at_once_finds_the_same_keys(stub):
    responses = await asyncio.gather(*(call(stub.OpenEpoch, OPEN) for _ in range(8)))
    assert len({response.key_id for response in responses}) == 1


@pytest.mark.parametrize("stranger", [client("Ward.7_a-b", "other"), client("ward-8"), COORDINATOR, OPERATOR])
async def test_nobody_else_is_released_anything_nor_learns_which_epochs_exist(
    stub, address, authority, stranger
):
    await call(stub.OpenEpoch, OPEN)
    released = KEY_RELEASES._value.get()
    messages = set()
    async with open_channel(address, authority.credentials(stranger)) as channel:
        for epoch in (1, 2):
            with pytest.raises(DomainError) as caught:
                await call(pb_grpc.KeyAuthorityStub(channel).GetEpochSecrets, changed(GET, epoch=epoch))
            assert caught.value.reason is Reason.PERMISSION_DENIED
            messages.add(caught.value.message)
    assert len(messages) == 1
    assert KEY_RELEASES._value.get() == released


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
        {"parameters": ""},
        {"parameters": INSECURE_TOY.name},
    ],
)
async def test_an_invalid_request_to_open_an_epoch_is_refused(stub, fields):
    assert await refusal(stub.OpenEpoch, changed(OPEN, **fields)) is Reason.INVALID_ARGUMENT


async def test_another_profile_for_an_open_epoch_is_refused(stub):
    await call(stub.OpenEpoch, OPEN)
    assert await refusal(stub.OpenEpoch, changed(OPEN, parameters="LARGE")) is Reason.INVALID_ARGUMENT


async def test_an_invalid_epoch_is_refused(stub):
    await call(stub.OpenEpoch, OPEN)
    assert await refusal(stub.GetEpochSecrets, changed(GET, epoch=0)) is Reason.INVALID_ARGUMENT


async def test_every_release_is_counted_and_logged_without_the_secret(stub):
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
    }


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
    assert [method.name for method in methods] == ["OpenEpoch", "GetEpochSecrets"]
