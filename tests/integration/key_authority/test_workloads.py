"""Servers that enrol by themselves, with a key they share with the authority, over real TLS."""

import asyncio
import json
from contextlib import asynccontextmanager
from datetime import timedelta

import grpc
import pytest

from services.common.membership import join
from services.common.revocations import Revocations, follow
from services.common.server import running_server
from services.common.settings import MemberSettings
from services.key_authority.ca import Issuer
from services.key_authority.enrolment import Enrolments, Workload
from services.key_authority.register import Grant
from services.key_authority.servicer import SERVICE_NAMES
from services.key_authority.settings import KeyAuthoritySettings
from shelora.errors import DomainError, Reason
from shelora.transport.certificates import key_to_pem, new_key, pem_to_der, signing_request
from shelora.transport.channel import open_channel
from shelora.transport.enrolment import certified_by, certify, enroll, enroll_server, renew, renewal_at
from shelora.transport.identity import Role
from shelora.transport.revocations import issued_ms
from shelora.transport.tls import IdentityFolder, TlsCredentials
from shelora.transport.workload import WorkloadKey
from shelora.v1 import enrolment_pb2 as pb
from tests.identities import AGGREGATION, KEY_AUTHORITY, TestAuthority, client

KEY, OTHER = WorkloadKey(b"k" * 32), WorkloadKey(b"o" * 32)
NAMES = ("shelora-aggregation", "10.0.0.9")


@pytest.fixture
def lifetime():
    """So short that renewal can be watched."""
    return timedelta(seconds=3)


@pytest.fixture
def enrolments(members, authority, clock, lifetime):
    issuer = Issuer(authority.root, lifetime)
    workloads = [
        Workload(OTHER, Role.COORDINATOR, ("elsewhere",)),
        Workload(KEY, Role.AGGREGATION, NAMES),
    ]
    return Enrolments(members, issuer, clock, workloads=workloads)


@pytest.fixture
async def address(add, authority):
    credentials = TlsCredentials(IdentityFolder(authority.enrolled(KEY_AUTHORITY)), anonymous_clients=True)
    async with running_server(SERVICE_NAMES, add, credentials=credentials) as served:
        yield served


async def refusal(awaitable):
    with pytest.raises(DomainError) as caught:
        await awaitable
    return caught.value


async def test_one_key_certifies_every_replica_with_the_role_and_names_of_the_key(
    tmp_path, address, authority
):
    replicas = [
        await enroll_server(KEY, address, IdentityFolder(tmp_path / f"pod-{n}"), retry_s=0) for n in range(2)
    ]
    assert [held.facts.identity for held in replicas] == [AGGREGATION] * 2
    assert [held.facts.names for held in replicas] == [NAMES] * 2
    assert replicas[0].key.public_key() != replicas[1].key.public_key()
    assert {held.authority for held in replicas} == {authority.root.certificate}


async def test_another_key_is_refused_and_nothing_is_left(tmp_path, address):
    folder = IdentityFolder(tmp_path / "mine")
    error = await refusal(enroll_server(WorkloadKey(b"x" * 32), address, folder, retry_s=0))
    assert error.reason is Reason.TOKEN_REFUSED
    assert not folder.exists()


async def test_a_proof_holds_for_one_authority_one_request_and_one_direction(enrolments, authority, tmp_path):
    request = signing_request(new_key())
    foreign = TestAuthority(tmp_path / "foreign").root.der
    for proof in (
        KEY.request_proof(foreign, request),
        KEY.request_proof(authority.root.der, signing_request(new_key())),
        KEY.answer_proof(authority.root.der, request),
        b"",
    ):
        with pytest.raises(DomainError) as caught:
            await enrolments.enroll_server(request, proof)
        assert caught.value.reason is Reason.TOKEN_REFUSED
    certificate, proof = await enrolments.enroll_server(
        request, KEY.request_proof(authority.root.der, request)
    )
    assert proof == KEY.answer_proof(authority.root.der, certificate)


async def test_who_stands_between_can_neither_pass_the_proof_on_nor_answer(tmp_path, enrolments):
    """An impostor with an authority of its own gets a proof, which is of no use, and is not believed."""
    impostor = TestAuthority(tmp_path / "impostor")
    held = impostor.held(KEY_AUTHORITY)
    received = []

    async def spy(request, _context):
        received.append(request)
        certificate = Issuer(impostor.root).issue(request.signing_request, AGGREGATION, NAMES)
        return pb.EnrollServerResponse(certificate=certificate, proof=request.proof)

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        spy, pb.EnrollServerRequest.FromString, pb.EnrollServerResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("shelora.v1.Enrolment", {"EnrollServer": handler})]
    )
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(key_to_pem(held.key), held.chain)])
    )
    await server.start()
    folder = IdentityFolder(tmp_path / "mine")
    error = await refusal(enroll_server(KEY, f"127.0.0.1:{port}", folder, retry_s=0))
    await server.stop(None)
    assert error.reason is Reason.SERVER_UNTRUSTED
    assert not folder.exists()
    (passed_on,) = received
    assert KEY.secret not in passed_on.SerializeToString()
    with pytest.raises(DomainError, match="same key"):
        await enrolments.enroll_server(passed_on.signing_request, passed_on.proof)


async def test_an_authority_that_was_made_anew_is_noticed_at_renewal(tmp_path, address):
    former = TestAuthority(tmp_path / "former")
    folder = IdentityFolder(former.enrolled(AGGREGATION))
    obtain = certified_by(KEY, address, former.root.certificate)
    before = folder.read()
    assert (await refusal(certify(folder, before.authority, obtain))).reason is Reason.SERVER_UNTRUSTED
    assert folder.read() == before or folder.read().certificate == before.certificate


async def test_a_server_joins_without_help_and_renews_with_the_key_alone(tmp_path, address, authority):
    key_file = tmp_path / "workload.key"
    key_file.write_text(KEY.secret.hex() + "\n")
    settings = MemberSettings(
        identity=tmp_path / "mine",
        key_authority_address="127.0.0.1:1",
        workload_key_file=key_file,
        enrolment_address=address,
    )
    membership = await join(settings)
    first = membership.credentials.held.facts
    assert first.identity == AGGREGATION
    renewing = asyncio.create_task(membership.keep_renewed())
    async with asyncio.timeout(60):
        while membership.credentials.held.facts.serial == first.serial:  # noqa: ASYNC110 - a file is watched
            await asyncio.sleep(0.02)
    renewing.cancel()
    await asyncio.gather(renewing, return_exceptions=True)
    assert pem_to_der(membership.credentials.held.authority) == authority.root.der


class Server:
    """What a server does for its membership: keeps its certificate, and asks who is revoked."""

    def __init__(self, settings):
        self.settings = settings
        self.known = Revocations()

    @asynccontextmanager
    async def running(self):
        membership = await join(self.settings)
        async with open_channel(self.settings.key_authority_address, membership.credentials) as authority:
            tasks = [
                asyncio.create_task(membership.keep_renewed()),
                asyncio.create_task(follow(self.known, authority, 0.01, on_own=membership.void.set)),
            ]
            yield membership
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def admits(self, certificate):
        try:
            self.known.check(certificate)
        except DomainError:
            return False
        return True

    async def goes_on_after(self, revocation, membership):
        """Once it has learnt of the revocation, by a certificate that is none of those."""

        def goes_on():
            return self.known.newest_ms >= revocation.at_ms and self.admits(membership.credentials.held.facts)

        async with asyncio.timeout(60):
            while not goes_on():  # noqa: ASYNC110 - a file is watched
                await asyncio.sleep(0.01)
        obtain = renewal_at(self.settings.key_authority_address, membership.credentials)
        await renew(IdentityFolder(self.settings.identity), obtain)


@pytest.fixture
async def authority_address(add, authority, revocations):
    credentials = TlsCredentials(IdentityFolder(authority.enrolled(KEY_AUTHORITY, "keys")))
    async with running_server(SERVICE_NAMES, add, credentials=credentials, revocations=revocations) as served:
        yield served


@pytest.fixture
def server(tmp_path, address, authority_address):
    key_file = tmp_path / "workload.key"
    key_file.write_text(KEY.secret.hex())
    return Server(
        MemberSettings(
            identity=tmp_path / "server",
            key_authority_address=authority_address,
            workload_key_file=key_file,
            enrolment_address=address,
        )
    )


@pytest.mark.parametrize("lifetime", [timedelta(days=1)])
async def test_a_server_whose_role_is_revoked_is_certified_anew_with_its_workload_key_and_goes_on(
    server, revoker, lifetime
):
    async with server.running() as membership:
        before = membership.credentials.held.facts
        revocation = await revoker.revoke(AGGREGATION)
        assert issued_ms(before) <= revocation.at_ms
        await server.goes_on_after(revocation, membership)


@pytest.mark.parametrize("lifetime", [timedelta(days=1)])
async def test_a_server_without_a_workload_key_goes_on_once_it_is_enrolled_anew_where_it_runs(
    server, revoker, enrolments, address, authority, lifetime
):
    async def enrolled():
        token, _ = await enrolments.create_token(Grant(role=Role.AGGREGATION, names=NAMES))
        await enroll(token.encoded, address, server.settings.identity)

    await enrolled()
    server.settings = server.settings.model_copy(
        update={"workload_key_file": None, "enrolment_address": None}
    )
    async with server.running() as membership:
        revocation = await revoker.revoke(AGGREGATION)
        obtain = renewal_at(server.settings.key_authority_address, membership.credentials)
        error = await refusal(renew(IdentityFolder(server.settings.identity), obtain))
        assert error.reason is Reason.CERTIFICATE_REVOKED
        assert "shelora token create --role aggregation" in error.message
        agent = authority.held(client()).facts
        async with asyncio.timeout(60):
            while server.admits(agent):  # noqa: ASYNC110 - nothing tells that it was refused
                await asyncio.sleep(0.01)
        await enrolled()
        await server.goes_on_after(revocation, membership)
        assert server.admits(agent)


@pytest.mark.parametrize("lifetime", [timedelta(days=1)])
async def test_a_stolen_workload_key_is_locked_out_by_another_in_its_place_and_a_revocation(
    tmp_path, server, address, authority_address, revoker, enrolments, lifetime
):
    """In the order of the runbook: another key on both sides, both started again, then the revocation."""
    stolen = IdentityFolder(tmp_path / "thief")
    await enroll_server(KEY, address, stolen, retry_s=0)
    async with server.running():
        pass
    enrolments._workloads = (Workload(OTHER, Role.AGGREGATION, NAMES),)  # what a restart reads
    server.settings.workload_key_file.write_text(OTHER.secret.hex())
    refused = await refusal(enroll_server(KEY, address, IdentityFolder(tmp_path / "new"), retry_s=0))
    assert refused.reason is Reason.TOKEN_REFUSED

    async with server.running() as membership:
        renewal = renewal_at(authority_address, TlsCredentials(stolen))
        await renew(stolen, renewal)  # without the revocation the thief's certificate goes on
        await server.goes_on_after(await revoker.revoke(AGGREGATION), membership)
        assert (await refusal(renew(stolen, renewal))).reason is Reason.CERTIFICATE_REVOKED


async def test_an_identity_that_is_still_valid_is_kept(tmp_path, authority):
    settings = MemberSettings(
        identity=authority.enrolled(AGGREGATION),
        key_authority_address="127.0.0.1:1",
        workload_key_file=tmp_path / "workload.key",
        enrolment_address="127.0.0.1:1",
    )
    (tmp_path / "workload.key").write_text(KEY.secret.hex())
    before = IdentityFolder(settings.identity).read().certificate
    assert (await join(settings)).credentials.held.certificate == before


@pytest.mark.parametrize("given", [{"workload_key_file": "k"}, {"enrolment_address": "a:1"}])
async def test_half_a_configuration_is_refused(tmp_path, given):
    fields = {name: tmp_path / value if "file" in name else value for name, value in given.items()}
    settings = MemberSettings(identity=tmp_path, key_authority_address="a:1", **fields)
    error = await refusal(join(settings))
    assert error.reason is Reason.CONFIGURATION_INVALID
    assert "enrolment_address" in error.message


def test_what_is_no_key_is_refused_without_being_shown(tmp_path):
    for text in ("", "ab" * 31, "zz" * 32):
        with pytest.raises(DomainError, match="openssl rand -hex 32") as caught:
            WorkloadKey.from_hex(text)
        assert not text or text not in caught.value.message
    with pytest.raises(DomainError, match="cannot be read"):
        WorkloadKey.from_file(tmp_path / "none")
    assert "k" * 32 not in repr(KEY)


def authority_settings(monkeypatch, tmp_path, **workload):
    entry = {
        "role": "aggregation",
        "key_file": str(tmp_path / "key"),
        "names": ["Agg.Example.org"],
        **workload,
    }
    monkeypatch.setenv("SHELORA_KEY_AUTHORITY_WORKLOADS", json.dumps([entry]))
    return KeyAuthoritySettings.load(data_dir=tmp_path)


def test_the_authority_reads_workloads_from_its_environment(monkeypatch, tmp_path):
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(KEY.secret.hex())
    (settings,) = authority_settings(monkeypatch, tmp_path).workloads
    assert settings.read() == Workload(KEY, Role.AGGREGATION, ("agg.example.org",))
    path.chmod(0o640)
    with pytest.raises(DomainError, match="chmod 600"):
        settings.read()


@pytest.mark.parametrize(
    "wrong", [{"role": "operator"}, {"role": "client"}, {"names": []}, {"names": ["a b"]}, {"key": "x"}]
)
def test_a_workload_that_makes_no_sense_is_refused(monkeypatch, tmp_path, wrong):
    with pytest.raises(DomainError, match="WORKLOADS") as caught:
        authority_settings(monkeypatch, tmp_path, **wrong)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
