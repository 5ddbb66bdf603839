"""Revoking clients and roles: certificates, tokens, names, and what survives restarts, lost files and races."""

import asyncio
import threading

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from services.common.revocations import Revocations, follow
from services.common.server import running_server
from services.key_authority.ca import Issuer
from services.key_authority.custody import open_custody
from services.key_authority.enrolment import Enrolments
from services.key_authority.epochs import EpochId
from services.key_authority.register import Grant, Register
from services.key_authority.revoking import Revoker
from services.key_authority.servicer import SERVICE_NAMES
from shelora.audit import AuditEvent, verified
from shelora.ckks.parameters import STANDARD
from shelora.errors import DomainError, Reason
from shelora.operator import list_revocations, revoke_holder
from shelora.transport.certificates import der_to_pem, new_key, read_certificate, signing_request
from shelora.transport.channel import call, open_channel
from shelora.transport.enrolment import renewal_at
from shelora.transport.identity import Identity, Role
from shelora.transport.revocations import Revocation, RevocationList, first_issue_after, issued_ms
from shelora.transport.status import error_from_rpc
from shelora.v1 import enrolment_pb2
from shelora.v1 import key_authority_pb2 as pb
from shelora.v1 import key_authority_pb2_grpc as pb_grpc
from shelora.v1.enrolment_pb2_grpc import EnrolmentStub
from tests.identities import AGGREGATION, COORDINATOR, KEY_AUTHORITY, OPERATOR, SEALER, VAULT, client

CLIENT, OPERATORS = (
    Grant(role=Role.CLIENT, federation_id="clinic", client_id="ward-7"),
    Grant(role=Role.OPERATOR),
)
SERVERS = Grant(role=Role.AGGREGATION, names=("localhost", "127.0.0.1"))


async def refusal(awaitable):
    with pytest.raises(DomainError) as caught:
        await awaitable
    return caught.value.reason


def admits(revocations, certificate):
    try:
        revocations.check(certificate)
    except DomainError:
        return False
    return True


async def enrolled(enrolments, grant=CLIENT):
    """A token, the request it was used for, and the certificate."""
    token, _ = await enrolments.create_token(grant)
    request = signing_request(new_key())
    return token, request, facts(await enrolments.enroll(token.encoded, request, ""))


def facts(certificate):
    return read_certificate(der_to_pem(certificate))


async def test_a_revoked_client_renews_nothing_and_its_tokens_are_void(enrolments, revoker):
    used, request, certificate = await enrolled(enrolments)
    spare, _ = await enrolments.create_token(CLIENT)
    other, _ = await enrolments.create_token(
        Grant(role=Role.CLIENT, federation_id="clinic", client_id="ward-8")
    )
    await revoker.revoke(client())
    assert await refusal(enrolments.renew(request, certificate)) is Reason.CERTIFICATE_REVOKED
    for token in (used, spare):
        assert await refusal(enrolments.enroll(token.encoded, request, "")) is Reason.TOKEN_REFUSED
    assert facts(await enrolments.enroll(other.encoded, request, "")).identity == client("ward-8")


@pytest.mark.parametrize("grant", [OPERATORS, SERVERS], ids=lambda grant: grant.role)
async def test_who_is_of_a_revoked_role_renews_nothing_and_its_tokens_are_void(enrolments, revoker, grant):
    used, request, certificate = await enrolled(enrolments, grant)
    spare, _ = await enrolments.create_token(grant)
    await revoker.revoke(certificate.identity)
    assert await refusal(enrolments.renew(request, certificate)) is Reason.CERTIFICATE_REVOKED
    for token in (used, spare):
        assert await refusal(enrolments.enroll(token.encoded, request, "")) is Reason.TOKEN_REFUSED


@pytest.mark.parametrize("holder", [OPERATOR, AGGREGATION], ids=str)
async def test_with_operators_what_they_issued_is_void_but_what_was_used_stays(enrolments, revoker, holder):
    used, request, certificate = await enrolled(enrolments)
    others = [
        await enrolments.create_token(grant) for grant in (CLIENT, Grant(role=Role.COORDINATOR, names=("c",)))
    ]
    await revoker.revoke(holder)
    for token, _ in others:
        attempt = enrolments.enroll(token.encoded, signing_request(new_key()), "")
        if holder is OPERATOR:
            assert await refusal(attempt) is Reason.TOKEN_REFUSED
        else:
            await attempt
    assert facts(await enrolments.enroll(used.encoded, request, "")).identity == client()
    await enrolments.renew(request, certificate)


@pytest.mark.parametrize("grant", [OPERATORS, SERVERS], ids=lambda grant: grant.role)
async def test_who_of_a_revoked_role_enrols_anew_is_good_from_the_first_moment_until_the_next(
    enrolments, revoker, revocations, custody, grant
):
    first = await revoker.revoke(Identity(grant.role))
    _, request, certificate = await enrolled(enrolments, grant)
    assert issued_ms(certificate) > first.at_ms
    revocations.check(facts(await enrolments.renew(request, certificate)))
    second = await revoker.revoke(certificate.identity)
    third = await revoker.revoke(certificate.identity)
    assert first.at_ms < second.at_ms < third.at_ms
    assert [entry.enrolled_again for entry in await revoker.listed(0)] == [True, False, False]
    assert custody.audit.revocations == {first, second, third}


async def test_a_client_that_enrols_anew_is_good_again_from_the_first_moment(
    enrolments, revoker, revocations
):
    await enrolled(enrolments)
    revocation = await revoker.revoke(client())
    _, request, certificate = await enrolled(enrolments)
    assert issued_ms(certificate) > revocation.at_ms
    revocations.check(certificate)
    renewed = facts(await enrolments.renew(request, certificate))
    revocations.check(renewed)
    (listed,) = await revoker.listed(0)
    assert listed.enrolled_again


async def test_a_name_that_was_revoked_is_not_free_for_others(enrolments, revoker):
    await enrolled(enrolments)
    await revoker.revoke(client())
    token, _ = await enrolments.create_token(Grant(role=Role.CLIENT, federation_id="clinic"))
    request = signing_request(new_key())
    assert await refusal(enrolments.enroll(token.encoded, request, "ward-7")) is Reason.CLIENT_EXISTS


async def test_a_repeat_finds_the_first_revocation_until_the_client_is_back(enrolments, revoker, custody):
    assert await refusal(revoker.revoke(client())) is Reason.CLIENT_UNKNOWN
    await enrolled(enrolments)
    first = await revoker.revoke(client())
    assert await revoker.revoke(client()) == first
    await enrolled(enrolments)
    second = await revoker.revoke(client())
    assert second.at_ms > first.at_ms
    assert custody.audit.revocations == {first, second}


async def test_revocations_at_once_have_times_of_their_own_and_are_listed_in_order(
    enrolments, revoker, members, clock
):
    names = [f"ward-{n}" for n in range(8)]
    for name in names:
        await enrolled(enrolments, Grant(role=Role.CLIENT, federation_id="clinic", client_id=name))
    clock.ahead_ms = -60_000  # a clock that was set back makes no earlier revocations
    found = await asyncio.gather(*(revoker.revoke(client(name)) for name in names))
    assert len({revocation.at_ms for revocation in found}) == len(names)
    at_ms, paged = 0, []
    while page := members.revocations(at_ms, limit=3):
        paged += [entry.revocation for entry in page]
        at_ms = paged[-1].at_ms
    assert paged == sorted(found, key=lambda revocation: revocation.at_ms)


async def test_a_renewal_that_a_revocation_overtakes_is_revoked_too(
    enrolments, revoker, revocations, members
):
    """The renewal has looked, then the client is revoked, then the certificate is signed."""
    _, request, certificate = await enrolled(enrolments)
    looked, members_revoked_ms = asyncio.Event(), members.revoked_ms
    loop = asyncio.get_running_loop()

    def look(identity):
        at_ms = members_revoked_ms(identity)
        asyncio.run_coroutine_threadsafe(revoker.revoke(client()), loop).result(30)
        loop.call_soon_threadsafe(looked.set)
        return at_ms

    members.revoked_ms = look
    renewed = facts(await enrolments.renew(request, certificate))
    assert looked.is_set()
    with pytest.raises(DomainError, match="was revoked: ask the operator of federation clinic"):
        revocations.check(renewed)


async def test_keys_that_were_opened_after_a_revocation_are_not_released_to_its_client(
    enrolments, revoker, key_authority, custody
):
    """The call was admitted before the revocation and reads the vault after it."""
    _, _, certificate = await enrolled(enrolments)
    await revoker.revoke(client())
    epoch = EpochId("clinic", 2)
    await key_authority.open_epoch(epoch, STANDARD.name)
    asked = key_authority.release(epoch, "ward-7", certificate)
    assert await refusal(asked) is Reason.CERTIFICATE_REVOKED


@pytest.mark.parametrize(
    ("grant", "event"),
    [(CLIENT, AuditEvent.CLIENT_REVOKED), (OPERATORS, AuditEvent.ROLE_REVOKED)],
    ids=lambda value: getattr(value, "role", ""),
)
async def test_revocations_survive_a_restart_and_the_loss_of_the_register(
    tmp_path, authority, sealing_key, clock, grant, event
):
    async def started(custody, name):
        members, known = Register(tmp_path / name, SEALER, VAULT), Revocations(known=True)
        revoker = Revoker(members, custody.audit, known, clock)
        await revoker.load()
        return Enrolments(members, Issuer(authority.root), clock), revoker, known

    with open_custody(tmp_path / "keys", sealing_key) as custody:
        enrolments, revoker, _ = await started(custody, "register.sealed")
        _, _, certificate = await enrolled(enrolments, grant)
        revocation = await revoker.revoke(certificate.identity)
    for name in ("register.sealed", "another.sealed"):
        with open_custody(tmp_path / "keys", sealing_key) as custody:
            enrolments, revoker, known = await started(custody, name)
            assert [entry.revocation for entry in await revoker.listed(0)] == [revocation]
            with pytest.raises(DomainError):
                known.check(certificate)
    with (tmp_path / "keys" / "audit.log").open("rb") as file:
        events = [record.event for record in verified(file)]
    assert events.count(event) == 1


@pytest.mark.parametrize("step", ["register", "audit log"])
async def test_a_revocation_whose_caller_is_cancelled_is_done_wholly(
    enrolments, revoker, members, custody, revocations, monkeypatch, step
):
    _, _, certificate = await enrolled(enrolments)
    reached, go_on = threading.Event(), threading.Event()
    where, name = (members, "revoke") if step == "register" else (custody.audit, "revoked")
    original = getattr(where, name)

    def slow(*arguments):
        reached.set()
        go_on.wait()
        return original(*arguments)

    monkeypatch.setattr(where, name, slow)
    revoking = asyncio.create_task(revoker.revoke(client()))
    await asyncio.to_thread(reached.wait)
    revoking.cancel()
    await asyncio.wait([revoking])
    assert revoking.cancelled()
    ended = asyncio.create_task(refusal(called_without_end(revocations, certificate)))
    go_on.set()
    assert await ended is Reason.CERTIFICATE_REVOKED
    assert not admits(revocations, certificate)
    assert custody.audit.revocations == {entry.revocation for entry in await revoker.listed(0)}


async def called_without_end(revocations, certificate):
    async with revocations.until_revoked(certificate):
        await asyncio.Event().wait()


async def test_an_operator_that_revokes_the_operators_is_answered_and_cut_off_with_its_calls_under_way(
    add, authority, revocations, custody, clock
):
    credentials = authority.credentials(KEY_AUTHORITY)
    async with (
        running_server(SERVICE_NAMES, add, credentials=credentials, revocations=revocations) as address,
        open_channel(address, authority.credentials(OPERATOR)) as operator,
        open_channel(address, authority.credentials(AGGREGATION)) as bystander,
    ):
        watches = [HealthStub(channel).Watch(HealthCheckRequest()) for channel in (operator, bystander)]
        for watch in watches:
            await watch.read()
        clock.ahead_ms = 2000  # certificates of the test count whole seconds
        revocation = await revoke_holder(address, authority.credentials(OPERATOR), OPERATOR)
        assert (revocation.role, revocation.client_id) == ("operator", "")
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await watches[0].read()
        assert error_from_rpc(ended.value).reason is Reason.CERTIFICATE_REVOKED
        for asked in (
            revoke_holder(address, authority.credentials(OPERATOR), OPERATOR),
            list_revocations(address, authority.credentials(OPERATOR)),
        ):
            assert await refusal(asked) is Reason.CERTIFICATE_REVOKED
        assert not watches[1].done()
        watches[1].cancel()
    assert custody.audit.revocations == {Revocation.from_proto(revocation)}


@pytest.mark.parametrize("role", ["client", "key-authority", "nobody", ""])
async def test_other_roles_are_not_revoked_as_a_whole_and_only_operators_revoke(add, authority, role):
    asking = enrolment_pb2.RevokeRoleRequest(role=role)
    credentials = authority.credentials(KEY_AUTHORITY)
    async with running_server(SERVICE_NAMES, add, credentials=credentials) as address:
        for identity, reason in (
            (OPERATOR, Reason.INVALID_ARGUMENT),
            (COORDINATOR, Reason.PERMISSION_DENIED),
        ):
            async with open_channel(address, authority.credentials(identity)) as channel:
                assert await refusal(call(EnrolmentStub(channel).RevokeRole, asking)) is reason


async def test_over_the_wire_the_operator_revokes_servers_learn_it_and_the_client_is_cut_off(
    add, authority, revocations, enrolments, clock
):
    await enrolled(enrolments)
    mine = authority.credentials(client())
    credentials, learnt = authority.credentials(KEY_AUTHORITY), Revocations()
    async with running_server(
        SERVICE_NAMES, add, credentials=credentials, revocations=revocations
    ) as address:
        news = asyncio.Event()
        async with (
            open_channel(address, authority.credentials(AGGREGATION)) as polling,
            open_channel(address, authority.credentials(COORDINATOR)) as coordinator,
            open_channel(address, mine) as agent,
        ):
            following = asyncio.create_task(follow(learnt, polling, 0.01, news.set))
            opening = pb.OpenEpochRequest(federation_id="clinic", epoch=1, parameters=STANDARD.name)
            await call(pb_grpc.KeyAuthorityStub(coordinator).OpenEpoch, opening)
            get = pb_grpc.KeyAuthorityStub(agent).GetEpochSecrets
            asking = pb.GetEpochSecretsRequest(federation_id="clinic", epoch=1, client_id="ward-7")
            await call(get, asking)
            clock.ahead_ms = 2000  # certificates of the test count whole seconds
            operator = authority.credentials(OPERATOR)
            first = await revoke_holder(address, operator, client())
            assert await revoke_holder(address, operator, client()) == first
            assert await list_revocations(address, operator) == [first]
            assert await refusal(call(get, asking)) is Reason.CERTIFICATE_REVOKED
            renewing = renewal_at(address, mine)(signing_request(new_key()))
            assert await refusal(renewing) is Reason.CERTIFICATE_REVOKED
            await news.wait()
            assert learnt.clients_of("clinic") == {"ward-7": first.at_unix_ms}
            assert await refusal(revoke_holder(address, operator, client("ward-9"))) is Reason.CLIENT_UNKNOWN
            asked = revoke_holder(address, authority.credentials(client("x")), client("x"))
            assert await refusal(asked) is Reason.PERMISSION_DENIED
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def test_while_the_key_authority_is_away_what_is_known_stays_in_force(add, authority, revocations):
    learnt = Revocations()
    credentials = authority.credentials(KEY_AUTHORITY)
    async with (
        running_server(SERVICE_NAMES, add, credentials=credentials, revocations=revocations) as address,
        open_channel(address, authority.credentials(AGGREGATION)) as polling,
    ):
        following = asyncio.create_task(follow(learnt, polling, 0.01))
        held = authority.held(client()).facts
        with pytest.raises(DomainError, match="does not know yet"):
            learnt.check(held)
        while not admits(learnt, held):  # noqa: ASYNC110 - nothing tells when the list is known
            await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    learnt.learn([Revocation(client(), issued_ms(held))])
    async with open_channel(address, authority.credentials(AGGREGATION)) as polling:
        following = asyncio.create_task(follow(learnt, polling, 0.01))
        await asyncio.sleep(0.1)
        assert not following.done()
        with pytest.raises(DomainError) as caught:
            learnt.check(held)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert caught.value.reason is Reason.CERTIFICATE_REVOKED


@pytest.mark.parametrize("at_ms", [0, 1, 999, 1000, 1001, 1_700_000_000_999])
def test_the_first_issue_after_a_revocation_is_the_next_whole_second(at_ms):
    assert first_issue_after(at_ms) % 1000 == 0
    assert at_ms < first_issue_after(at_ms) <= at_ms + 1000


def test_a_list_takes_revocations_in_any_order_and_forgets_none():
    known = RevocationList()
    known.add([Revocation(client(), 9000), Revocation(client(), 3000), Revocation(client("b", "bank"), 5000)])
    assert known.clients_of("clinic") == {"ward-7": 9000}
    assert known.newest_ms == 9000
    assert len(known) == 2
