"""Tokens, the pin, certificates and their renewal, over real TLS."""

import asyncio
import hashlib
import stat
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial

import grpc
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from services.common.server import running_server
from services.key_authority.ca import Issuer, RootFile
from services.key_authority.enrolment import Enrolments
from services.key_authority.register import Grant, Register
from services.key_authority.sealer import Binding, Sealer, SealingKey
from services.key_authority.servicer import SERVICE_NAMES, register
from shelora.errors import DomainError, Reason
from shelora.levels import Level
from shelora.operator import create_token
from shelora.transport.certificates import (
    der_to_pem,
    key_to_pem,
    new_key,
    read_certificate,
    signing_request,
    utc_now,
)
from shelora.transport.channel import call, open_channel
from shelora.transport.enrolment import Token, certify, enroll, keep_renewed, renewal_at
from shelora.transport.identity import Identity, Role
from shelora.transport.tls import IdentityFolder, IdentityInMemory, TlsCredentials
from shelora.v1 import enrolment_pb2, enrolment_pb2_grpc
from tests.identities import (
    AGGREGATION,
    COORDINATOR,
    KEY_AUTHORITY,
    LOCAL,
    OPERATOR,
    SEALER,
    VAULT,
    TestAuthority,
    client,
)

CLIENT = Grant(role=Role.CLIENT, federation_id="clinic", client_id="ward-7")


@asynccontextmanager
async def serving(add, authority, *, anonymous=True, identity=None, names=None):
    """The key authority's services; `anonymous` is the enrolment port, the other admits certificates."""
    folder = authority.enrolled(identity or KEY_AUTHORITY, f"server-{anonymous}", names=names)
    credentials = TlsCredentials(IdentityFolder(folder), anonymous_clients=anonymous)
    async with running_server(SERVICE_NAMES, add, credentials=credentials) as address:
        yield address


@pytest.fixture
async def address(add, authority):
    async with serving(add, authority) as served:
        yield served


async def refusal(awaitable):
    with pytest.raises(DomainError) as caught:
        await awaitable
    return caught.value


async def test_a_token_is_exchanged_once_for_a_certificate_that_names_its_holder(
    tmp_path, address, enrolments
):
    token, _ = await enrolments.create_token(CLIENT)
    held = await enroll(token.encoded, address, tmp_path / "mine", retry_s=0)
    assert held.facts.identity == client()
    assert held.facts.names == ()
    assert timedelta(hours=23) < held.facts.expires - utc_now() <= timedelta(hours=24)
    stored = IdentityFolder(tmp_path / "mine")
    assert stored.read() == held or stored.read().certificate == held.certificate
    assert stat.S_IMODE(stored.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(stored.path.parent.stat().st_mode) == 0o700
    again = await refusal(enroll(token.encoded, address, tmp_path / "theirs", retry_s=0))
    assert again.reason is Reason.TOKEN_REFUSED
    assert not (tmp_path / "theirs").exists()


async def test_of_many_at_once_a_token_serves_one(tmp_path, address, enrolments):
    token, _ = await enrolments.create_token(CLIENT)
    racing = [enroll(token.encoded, address, tmp_path / str(n), retry_s=0) for n in range(8)]
    outcomes = await asyncio.gather(*racing, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, DomainError)]
    assert len(refused) == 7
    assert {error.reason for error in refused} == {Reason.TOKEN_REFUSED}


async def test_a_lost_answer_costs_nothing_the_same_key_gets_the_same_identity(enrolments):
    token, _ = await enrolments.create_token(CLIENT)
    request = signing_request(new_key())
    first, second = [await enrolments.enroll(token.encoded, request, "") for _ in range(2)]
    one, two = map(x509.load_der_x509_certificate, (first, second))
    assert one.public_key() == two.public_key()


async def test_an_expired_token_is_refused_also_for_the_key_that_used_it(enrolments, clock):
    unused, _ = await enrolments.create_token(CLIENT, 60)
    used, expires_ms = await enrolments.create_token(CLIENT, 60)
    request = signing_request(new_key())
    await enrolments.enroll(used.encoded, request, "")
    assert expires_ms - clock() <= 60_000
    clock.ahead_ms = 60_000
    for token in (unused, used):
        error = await refusal(enrolments.enroll(token.encoded, request, ""))
        assert error.reason is Reason.TOKEN_REFUSED
        assert token.encoded not in error.message


async def test_tokens_survive_a_restart_and_are_stored_as_hashes_alone(
    tmp_path, authority, enrolments, clock
):
    token, _ = await enrolments.create_token(CLIENT)
    used, _ = await enrolments.create_token(Grant(role=Role.OPERATOR))
    await enrolments.enroll(used.encoded, signing_request(new_key()), "")
    path = tmp_path / "register.sealed"
    content = SEALER.open(Binding(purpose="register of tokens and clients", vault=VAULT), path.read_bytes())
    assert token.secret.hex().encode() not in content
    assert hashlib.sha256(token.secret).hexdigest().encode() in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    restarted = Enrolments(Register(path, SEALER, VAULT), Issuer(authority.root), clock)
    assert await restarted.enroll(token.encoded, signing_request(new_key()), "")
    error = await refusal(restarted.enroll(used.encoded, signing_request(new_key()), ""))
    assert error.reason is Reason.TOKEN_REFUSED


def test_the_root_survives_a_restart_and_a_damaged_or_foreign_one_is_left_as_it_is(tmp_path):
    root_file = partial(RootFile, tmp_path / "ca", SEALER)
    assert root_file(VAULT).load() is None
    first = root_file(VAULT).load_or_create()
    assert root_file(VAULT).load_or_create().certificate == first.certificate
    (path,) = (tmp_path / "ca").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    whole = path.read_bytes()
    assert b"PRIVATE" not in whole
    assert first.certificate.splitlines()[1] not in whole
    with pytest.raises(DomainError, match="another epoch, federation, vault or kind"):
        root_file("af" * 16).load_or_create()
    with pytest.raises(DomainError, match="sealed under the sealing key"):
        RootFile(tmp_path / "ca", Sealer(SealingKey(bytes(32))), VAULT).load_or_create()
    for damaged in (whole[:100], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with pytest.raises(DomainError, match=r"damaged.* left as it is") as caught:
            root_file(VAULT).load_or_create()
        assert caught.value.reason is Reason.CONFIGURATION_INVALID
        assert path.read_bytes() == damaged
    (tmp_path / "ca").chmod(0o750)
    with pytest.raises(DomainError, match="chmod 700"):
        root_file(VAULT).load_or_create()


async def test_a_name_that_is_taken_needs_a_token_for_that_name(enrolments):
    open_tokens = [
        (await enrolments.create_token(Grant(role=Role.CLIENT, federation_id="clinic")))[0] for _ in range(3)
    ]
    await enrolments.enroll(open_tokens[0].encoded, signing_request(new_key()), "ward-7")
    impostor = enrolments.enroll(open_tokens[1].encoded, signing_request(new_key()), "ward-7")
    assert (await refusal(impostor)).reason is Reason.CLIENT_EXISTS
    assert await enrolments.enroll(open_tokens[1].encoded, signing_request(new_key()), "ward-8")
    named, _ = await enrolments.create_token(CLIENT)
    assert await enrolments.enroll(named.encoded, signing_request(new_key()), "")
    nameless = enrolments.enroll(open_tokens[2].encoded, signing_request(new_key()), "")
    assert (await refusal(nameless)).reason is Reason.INVALID_ARGUMENT


async def test_a_token_for_one_client_makes_no_other(enrolments):
    token, _ = await enrolments.create_token(CLIENT)
    error = await refusal(enrolments.enroll(token.encoded, signing_request(new_key()), "ward-8"))
    assert error.reason is Reason.INVALID_ARGUMENT
    assert await enrolments.enroll(token.encoded, signing_request(new_key()), "")


@pytest.mark.parametrize(
    "grant",
    [
        Grant(role=Role.CLIENT),
        Grant(role=Role.CLIENT, federation_id="Clinic"),
        Grant(role=Role.CLIENT, federation_id="clinic", client_id="a/b"),
        Grant(role=Role.CLIENT, federation_id="clinic", client_id="a", names=("localhost",)),
        Grant(role=Role.OPERATOR, federation_id="clinic"),
        Grant(role=Role.OPERATOR, federation_id="", client_id="", names=("localhost",)),
        Grant(role=Role.COORDINATOR),
        Grant(role=Role.COORDINATOR, names=("no spaces",)),
        Grant(role=Role.COORDINATOR, names=("*.example.org",)),
        Grant(role=Role.AGGREGATION, names=("a",) * 33),
        Grant(role=Role.KEY_AUTHORITY, names=LOCAL),
    ],
)
async def test_a_token_that_makes_no_sense_is_refused(enrolments, grant):
    assert (await refusal(enrolments.create_token(grant))).reason is Reason.INVALID_ARGUMENT


def foreign_request(key):
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\x30\x00",
        b"x" * 10_000,
        foreign_request(ec.generate_private_key(ec.SECP384R1())),
        foreign_request(rsa.generate_private_key(65537, 2048)),
        signing_request(new_key())[:-1] + b"\x00",
    ],
    ids=["empty", "nothing", "long", "P-384", "RSA", "signature"],
)
async def test_a_malformed_request_is_refused_and_does_not_cost_the_token(enrolments, request_):
    token, _ = await enrolments.create_token(CLIENT)
    assert (await refusal(enrolments.enroll(token.encoded, request_, ""))).reason is Reason.INVALID_ARGUMENT
    assert await enrolments.enroll(token.encoded, signing_request(new_key()), "")


async def test_the_request_chooses_nothing_but_its_key(enrolments):
    """A request that asks for another identity and to sign others is given what the token says."""
    key = new_key()
    wishes = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "operator")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(OPERATOR.uri)]), critical=False
        )
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )
    token, _ = await enrolments.create_token(CLIENT)
    issued = x509.load_der_x509_certificate(await enrolments.enroll(token.encoded, wishes, ""))
    assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert read_certificate(issued.public_bytes(serialization.Encoding.PEM)).identity == client()
    purposes = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]


async def test_another_authority_is_noticed_before_the_token_is_sent(
    tmp_path, address, enrolments, authority
):
    other = TestAuthority(tmp_path / "other")
    token = Token(other.root.pin, b"s" * 32)
    with structlog.testing.capture_logs() as logs:
        error = await refusal(enroll(token.encoded, address, tmp_path / "mine", retry_s=0))
    assert error.reason is Reason.SERVER_UNTRUSTED
    assert token.pin.hex() in error.message
    assert "not sent" in error.message
    assert token.encoded not in error.message
    assert not [record for record in logs if record["event"] == "rpc_denied"]
    assert not (tmp_path / "mine").exists()


async def test_a_server_that_shows_the_pinned_certificate_beside_a_foreign_one_gets_no_token(
    tmp_path, authority
):
    """The chain of a man in the middle may hold anything; what counts is who signed the key of the connection."""
    impostor = TestAuthority(tmp_path / "impostor").held(KEY_AUTHORITY)
    received = []

    async def spy(request, _context):
        received.append(request)
        return enrolment_pb2.EnrollResponse()

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        spy, enrolment_pb2.EnrollRequest.FromString, enrolment_pb2.EnrollResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("shelora.v1.Enrolment", {"Enroll": handler})]
    )
    chain = impostor.certificate + authority.root.certificate
    credentials = grpc.ssl_server_credentials([(key_to_pem(impostor.key), chain)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    token = Token(authority.root.pin, b"s" * 32)
    error = await refusal(enroll(token.encoded, f"127.0.0.1:{port}", tmp_path / "mine", retry_s=0))
    await server.stop(None)
    assert error.reason is Reason.SERVER_UNTRUSTED
    assert received == []


@pytest.mark.parametrize(
    "text", ["", "shelora-token-", "shelora-token-AAAA", "x", "shelora-token-" + "!" * 86]
)
async def test_what_is_no_token_is_refused_without_being_shown(tmp_path, text):
    error = await refusal(enroll(text, "127.0.0.1:1", tmp_path / "mine"))
    assert error.reason is Reason.TOKEN_REFUSED
    assert len(text) < 10 or text not in error.message


async def test_a_wrong_name_is_said_with_the_name_that_was_expected(tmp_path, add, authority, enrolments):
    async with serving(add, authority, names=("keys.example.org",)) as address:
        token, _ = await enrolments.create_token(CLIENT)
        error = await refusal(enroll(token.encoded, address, tmp_path / "mine"))
    assert error.reason is Reason.SERVER_UNTRUSTED
    assert "expected a certificate that names 127.0.0.1" in error.message
    assert address in error.message


async def test_a_client_cannot_pose_as_a_server(tmp_path, add, authority, enrolments):
    async with serving(add, authority, identity=client(), names=LOCAL) as address:
        token, _ = await enrolments.create_token(CLIENT)
        error = await refusal(enroll(token.encoded, address, tmp_path / "mine"))
    assert error.reason is Reason.SERVER_UNTRUSTED


async def test_a_certificate_is_renewed_with_a_new_key_and_the_same_names(add, authority, enrolments):
    async with serving(add, authority, anonymous=False) as address:
        for identity in (client(), AGGREGATION, OPERATOR):
            folder = IdentityFolder(authority.enrolled(identity))
            before = folder.read()
            credentials = TlsCredentials(folder)
            after = await certify(folder, before.authority, renewal_at(address, credentials))
            assert after.facts.identity == identity
            assert after.facts.names == before.facts.names
            assert after.key.public_key() != before.key.public_key()
            assert credentials.generation() == 1


async def test_an_operator_issues_tokens_and_a_client_does_not(add, authority, enrolments):
    async with serving(add, authority, anonymous=False) as address:
        created = await create_token(
            address, authority.credentials(OPERATOR), Role.CLIENT, federation="clinic", client="ward-7"
        )
        assert Token.parse(created.token).pin == authority.root.pin
        asked = create_token(address, authority.credentials(client()), Role.OPERATOR)
        assert (await refusal(asked)).reason is Reason.PERMISSION_DENIED


async def test_calls_go_on_while_both_sides_renew_their_certificates(
    tmp_path, key_authority, revoker, authority, clock
):
    """Certificates of three seconds, renewed by themselves; unary calls and a stream never fail for twice that."""
    lifetime = timedelta(seconds=3)
    enrolments = Enrolments(
        Register(tmp_path / "register.sealed", SEALER, VAULT), Issuer(authority.root, lifetime), clock
    )
    own = IdentityInMemory()
    own.write(authority.held(KEY_AUTHORITY, lifetime=lifetime))
    mine = IdentityFolder(authority.enrolled(client(), lifetime=lifetime))
    issuer = Issuer(authority.root, lifetime)

    async def own_certificate(request):
        return issuer.issue(request, KEY_AUTHORITY, LOCAL)

    add = partial(register, key_authority, enrolments, revoker)
    async with running_server(SERVICE_NAMES, add, credentials=TlsCredentials(own)) as address:
        credentials = TlsCredentials(mine)
        renewing = [
            asyncio.create_task(keep_renewed(own, own_certificate)),
            asyncio.create_task(keep_renewed(mine, renewal_at(address, credentials))),
        ]
        serials = set()
        async with open_channel(address, credentials) as channel:
            stub = enrolment_pb2_grpc.EnrolmentStub(channel)
            request = enrolment_pb2.RenewRequest(signing_request=signing_request(new_key()))
            until = asyncio.get_running_loop().time() + 7
            while asyncio.get_running_loop().time() < until:
                await call(stub.Renew, request, retry_s=0)
                serials.add((own.read().facts.serial, mine.read().facts.serial))
                await asyncio.sleep(0.02)
        for task in renewing:
            task.cancel()
        await asyncio.gather(*renewing, return_exceptions=True)
    assert len({server for server, _ in serials}) >= 3
    assert len({mine for _, mine in serials}) >= 3


async def test_logs_name_who_was_certified_and_hold_neither_token_nor_certificate(
    tmp_path, authority, enrolments, address
):
    with structlog.testing.capture_logs() as logs:
        token, _ = await enrolments.create_token(CLIENT)
        held = await enroll(token.encoded, address, tmp_path / "mine", retry_s=0)
    assert {record["event"] for record in logs} >= {"token_created", "certificate_issued"}
    text = repr(logs)
    for secret in (token.encoded, token.secret.hex(), "BEGIN", "PRIVATE", held.certificate.decode()[40:100]):
        assert secret not in text
    assert "secret" not in repr(token)
    assert "key" not in repr(held).split("certificate")[0]


def test_an_identity_in_memory_is_none_at_first_and_expires(authority):
    kept = IdentityInMemory()
    assert kept.stamp() is None
    with pytest.raises(DomainError, match="no identity yet"):
        kept.read()
    day = timedelta(days=1)
    kept.write(authority.held(client(), lifetime=day, ago=2 * day))
    with pytest.raises(DomainError, match="expired"):
        TlsCredentials(kept)
    kept.write(authority.held(client()))
    credentials = TlsCredentials(kept)
    kept.write(authority.held(client()))
    assert credentials.generation() == 1
    assert credentials.held is kept.read()


def test_an_identity_says_what_is_wrong_with_it(tmp_path, authority):
    folder = IdentityFolder(tmp_path / "mine")
    with pytest.raises(DomainError, match="enrol first"):
        folder.read()
    day = timedelta(days=1)
    folder.write(authority.held(client(), lifetime=day, ago=2 * day))
    with pytest.raises(DomainError, match=r"expired at .* enrol again"):
        TlsCredentials(folder)
    one, two = authority.held(client()), authority.held(client())
    folder.path.write_bytes(key_to_pem(one.key) + two.chain)
    with pytest.raises(DomainError, match="for another key"):
        folder.read()
    folder.path.write_bytes(b"nothing")
    with pytest.raises(DomainError, match="damaged"):
        folder.read()


@pytest.mark.parametrize(
    "identity", [OPERATOR, COORDINATOR, AGGREGATION, KEY_AUTHORITY, client("A.b-c_1", "f-2")]
)
def test_an_identity_survives_its_uri(identity):
    assert Identity.from_uri(identity.uri) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "shelora://",
        "shelora://client",
        "shelora://root",
        "shelora://operator/",
        "shelora://federation/f/client/",
        "shelora://federation/f/client/a/b",
        "shelora://federation//client/a",
        "shelora://federation/f/client/a b",
        "shelora://federation/F/client/a",
        "https://operator",
        "shelora://federation/f/client/a\n",
    ],
)
def test_any_other_uri_names_nobody(uri):
    with pytest.raises(DomainError):
        Identity.from_uri(uri)


async def test_a_promise_of_protection_is_certified_and_renewed(enrolments):
    promised = replace(CLIENT, promise=Level.SELECTIVE)
    token, _ = await enrolments.create_token(promised)
    first = await enrolments.enroll(token.encoded, signing_request(new_key()), "")
    facts = read_certificate(der_to_pem(first))
    assert (facts.identity, facts.promise) == (Identity(Role.CLIENT, "clinic", "ward-7"), Level.SELECTIVE)
    renewed = await enrolments.renew(signing_request(new_key()), facts)
    assert read_certificate(der_to_pem(renewed)).promise is Level.SELECTIVE
    silent, _ = await enrolments.create_token(CLIENT)
    unpromised = await enrolments.enroll(silent.encoded, signing_request(new_key()), "")
    assert read_certificate(der_to_pem(unpromised)).promise is None
    error = await refusal(enrolments.create_token(Grant(role=Role.OPERATOR, promise=Level.NONE)))
    assert "only clients are promised protection" in error.message
