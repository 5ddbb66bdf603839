"""Rounds whose sum a committee opens, with the real cryptography of clients: states, statements, silence, lies."""

from collections.abc import Sequence

import pytest

from coordinator.records import Phase, Statement
from services.common.redis_client import connect
from shelora.committee.context import RoundContext
from shelora.committee.rules import CommitteeRule, committee_rule
from shelora.committee.statements import StatementKind
from shelora.errors import DomainError, Reason
from shelora.obfuscation import Obfuscation
from shelora.v1 import committee_pb2
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.members import SECRET, Convened, Convening, signer
from tests.contract.coordinator.world import spec

FOUR, FIVE = "abcd", "abcde"


async def convened(fed, names: Sequence[str] = FIVE, **rules) -> Convened:
    await_clients = {"clients": len(names), "rounds": 1, "committee_s": 20, **rules}
    party = Convened(fed, names)
    await fed.begin(spec(Convening.name, **await_clients), names)
    return party


def states(federation: pb.Federation) -> list[tuple[str, str]]:
    return [(pb.RoundState.Name(r.state).removeprefix("ROUND_STATE_"), r.reason) for r in federation.history]


async def test_a_round_goes_over_its_committee_to_a_result_that_every_client_opens(fed):
    party = await convened(fed, rounds=2)
    seen = []
    for _ in range(20):
        shown = await party.step()
        seen.append(pb.RoundState.Name(shown.current.state).removeprefix("ROUND_STATE_"))
        if shown.phase == pb.PHASE_FINISHED:
            break
    assert [state for state in ("COLLECTING", "CERTIFYING", "AGGREGATING") if state in seen]
    federation = await fed.federation()
    assert (federation.phase, federation.trained, federation.draws) == (Phase.FINISHED, 2, 2)
    opened = [await client.open(federation.round_id(2)) for client in party.clients.values()]
    assert {o.contributors for o in opened} == {tuple(FIVE)}
    assert {o.total_weight for o in opened} == {50}
    assert len({o.secret_sum.tobytes() for o in opened}) == 1
    assert all(not o.liars for o in opened)


async def test_the_coordinator_never_learns_the_committee_before_clients_say_so(fed):
    party = await convened(fed)
    await fed.settle()
    shown = (await fed.shown()).current
    assert shown.state == pb.ROUND_STATE_KEYING
    federation = await fed.federation()
    assert (await fed.store.rounds.read(federation, 1)).record.order == ()
    assert not shown.committee
    await party.act()
    await fed.settle()
    record = (await fed.store.rounds.read(federation, 1)).record
    assert record.order == party.clients["a"].seats[shown.round_id]._committee.members
    assert tuple((await fed.shown()).current.committee) == record.order, "operators see who sits on it"


async def test_of_a_large_cohort_some_are_members_and_all_are_in_the_sum(fed):
    names = [f"ward-{number:02}" for number in range(34)]
    party = await convened(fed, names)
    for name in names[:5]:  # as many as it withstands, wherever they sit
        party.clients[name].silent_from = "check"
    federation = await party.play()
    assert federation.phase is Phase.FINISHED, federation.failure
    opened = await party.clients[names[0]].open(federation.round_id(1))
    assert opened.contributors == tuple(names)
    assert opened.context.rule == committee_rule(34) == CommitteeRule(16, 5, 4)


async def test_who_names_the_committee_when_it_is_seated_has_done_nothing_wrong_unless_it_sits_there(fed):
    names = [f"ward-{number:02}" for number in range(34)]
    party = await convened(fed, names)
    await fed.settle()
    round_ = (await fed.assignment(names[0])).train.round
    members = RoundContext.from_proto(round_.context).committee(SECRET.committee_key()).members
    late = next(name for name in names if name not in members)
    party.clients[late].silent_from = "key"
    await party.until("COLLECTING")
    convening = fed.handlers.committees
    await convening.post_key("fed", round_.round_id, late, members, None)
    federation = await fed.federation()
    assert late not in await fed.store.committees.speakers(Statement.VIEW, federation, 1)
    party.clients[members[0]].restart()
    another = party.clients[members[0]].seat(RoundContext.from_proto(round_.context))
    with pytest.raises(DomainError) as refused:
        await convening.post_key("fed", round_.round_id, members[0], members, another.key)
    assert refused.value.reason in {Reason.STATEMENT_REWRITTEN, Reason.STEP_OVER}


async def test_a_silent_member_costs_no_attempt_and_is_not_asked_again(fed):
    party = await convened(fed, max_attempts=1)
    party.clients["c"].silent_from = "key"
    federation = await party.play(90)
    assert federation.phase is Phase.FINISHED, federation.failure
    shown = await fed.shown()
    assert states(shown) == [("ABANDONED", "COMMITTEE_INCOMPLETE"), ("PUBLISHED", "")]
    assert [(drop.client_id, drop.reason) for drop in shown.history[0].dropped] == [
        ("c", "COMMITTEE_INCOMPLETE")
    ], "the operator sees for whom it waited"
    assert shown.history[1].cohort_count == 4
    assert federation.draws == 1, "nothing was uploaded in the first attempt"


async def test_when_too_few_are_left_the_silent_are_asked_again_and_it_costs_an_attempt(fed):
    party = await convened(fed, "ab", max_attempts=2)
    party.clients["b"].silent_from = "key"
    federation = await party.play(120)
    assert federation.phase is Phase.FAILED
    assert "members of the committee were silent" in federation.failure


async def test_the_committee_is_what_most_of_the_cohort_work_out_and_who_differs_is_not_asked_again(fed):
    party = await convened(fed, max_attempts=1)
    party.clients["c"].secret = Obfuscation(bytes(32), 1)
    federation = await party.play(90)
    assert federation.phase is Phase.FINISHED, federation.failure
    shown = await fed.shown()
    assert states(shown) == [("ABANDONED", "COMMITTEE_INCOMPLETE"), ("PUBLISHED", "")]
    assert (await party.clients["a"].open(federation.round_id(2))).contributors == tuple("abde")


async def test_a_key_is_taken_from_its_member_for_its_place_only(fed):
    party = await convened(fed)
    await fed.settle()
    round_ = (await fed.assignment("a")).train.round
    context = RoundContext.from_proto(round_.context)
    seat, convening = party.clients["a"].seat(context), fed.handlers.committees
    order = context.committee(SECRET.committee_key()).members
    swapped = (*order[1:], order[0])
    for members, key, why in (
        (order, None, "key must be set"),
        (order[1:], seat.key, "order must name 5 clients"),
        ((*order[1:], "z"), seat.key, "order must name 5 clients"),
        ((order[0], *order[:4]), seat.key, "order must name 5 clients"),
        (swapped, seat.key, "position must be that in the order"),
        (order, party.clients["b"].seat(context).key, "is signed by b"),
    ):
        with pytest.raises(DomainError, match=why):
            await convening.post_key("fed", round_.round_id, "a", members, key)
    assert await fed.store.committees.statements(Statement.VIEW, await fed.federation(), 1) == {}


async def test_statements_are_kept_once_and_others_refused(fed):
    party = await convened(fed)
    await fed.settle()
    round_ = (await fed.assignment("a")).train.round
    client, convening = party.clients["a"], fed.handlers.committees
    await client.train(round_)
    scope, order = ("fed", round_.round_id, "a"), client.seats[round_.round_id]._committee.members
    await convening.post_key(*scope, order, client.seats[round_.round_id].key)
    client.restart()
    another = client.seat(RoundContext.from_proto(round_.context))
    with pytest.raises(DomainError) as refused:
        await convening.post_key(*scope, order, another.key)
    assert refused.value.reason is Reason.STATEMENT_REWRITTEN


async def test_nobody_states_anything_in_the_name_or_the_step_of_another(fed):
    party = await convened(fed)
    current = await party.until("COLLECTING")
    convening = fed.handlers.committees
    federation = await fed.federation()
    seat = party.clients["a"].seats[current.round_id]
    with pytest.raises(DomainError) as early:
        await convening.check("fed", current.round_id, "a", seat.check())
    assert early.value.reason is Reason.STEP_OVER
    with pytest.raises(DomainError) as stolen:
        await convening.check("fed", current.round_id, "b", seat.check())
    assert stolen.value.reason in {Reason.INVALID_ARGUMENT, Reason.SIGNATURE_REFUSED}
    with pytest.raises(DomainError) as stranger:
        await convening.keys("fed", current.round_id, "z")
    assert stranger.value.reason is Reason.NOT_IN_COHORT
    with pytest.raises(DomainError) as unclosed:
        _ = [share async for share in convening.shares("fed", current.round_id, "a")]
    assert unclosed.value.reason is Reason.STEP_OVER
    assert await fed.store.committees.statements(Statement.CHECK, federation, current.sequence) == {}


async def test_a_member_lost_after_its_commit_does_not_stop_the_round_and_its_update_counts(fed):
    party = await convened(fed)
    party.clients["b"].silent_from = "check"
    federation = await party.play()
    opened = await party.clients["a"].open(federation.round_id(1))
    assert opened.contributors == tuple(FIVE)
    assert federation.phase is Phase.FINISHED


@pytest.mark.parametrize("step", ["sign", "answer"])
async def test_a_member_silent_at_any_step_is_waited_for_a_while(fed, step):
    party = await convened(fed)
    party.clients["b"].silent_from = step
    federation = await party.play()
    assert (federation.phase, federation.draws) == (Phase.FINISHED, 1)
    assert (await party.clients["b"].open(federation.round_id(1))).contributors == tuple(FIVE)


async def test_too_few_signatures_spend_the_draw_and_the_next_round_is_of_another(fed):
    party = await convened(fed, max_attempts=2)
    for name in "bc":
        party.clients[name].silent_from = "sign"
    for _ in range(60):
        shown = await party.step()
        if len(shown.history) == 1:
            break
    assert states(shown) == [("ABANDONED", "QUORUM_MISSING")]
    for name in "bc":
        party.clients[name].silent_from = ""
    federation = await party.play()
    assert (federation.phase, federation.draws, federation.trained) == (Phase.FINISHED, 2, 1)
    assert len(party.clients["a"].notes.sets) == 2


async def test_a_member_that_restarted_says_so_and_sits_the_round_out(fed):
    party = await convened(fed)
    current = await party.until("COLLECTING")
    party.clients["b"].restart()
    federation = await party.play()
    assert federation.phase is Phase.FINISHED
    opened = await party.clients["b"].open(current.round_id)
    assert opened.contributors == tuple(FIVE), "as a contributor it counts"


async def test_when_a_quorum_is_gone_before_the_close_the_round_is_abandoned_unspent(fed):
    party = await convened(fed, max_attempts=2)
    for name in "abc":
        party.clients[name].silent_from = "commit"
    current = await party.until("COLLECTING")
    for name in "abc":
        await fed.handlers.committees.leave("fed", current.round_id, name)
        party.clients[name].silent_from = ""
    await fed.settle()
    assert states(await fed.shown())[0] == ("ABANDONED", "COMMITTEE_INCOMPLETE")
    federation = await party.play()
    assert (federation.phase, federation.draws) == (Phase.FINISHED, 1)


async def test_a_dealer_that_most_members_refuse_is_left_out_by_name(fed):
    party = await convened(fed)
    for name in "abcd":
        party.clients[name].refuses = frozenset("e")
    federation = await party.play()
    shown = await fed.shown()
    assert [(d.client_id, d.reason) for d in shown.history[0].dropped] == [("e", "DEALING_REFUSED")]
    assert (await party.clients["e"].open(federation.round_id(1))).contributors == tuple(FOUR)


async def test_an_update_of_another_base_model_is_in_no_set_that_a_committee_signs(fed):
    party = await convened(fed)
    fed.bases = {**dict.fromkeys("abcd", "xxx"), "e": "yxx"}
    federation = await party.play()
    shown = await fed.shown()
    assert [(d.client_id, d.reason) for d in shown.history[0].dropped] == [("e", "MODEL_MISMATCH")]
    assert (await party.clients["a"].open(federation.round_id(1))).contributors == tuple(FOUR)


async def test_a_member_that_refuses_everyone_stands_alone(fed):
    party = await convened(fed)
    party.clients["a"].refuses = frozenset("bcde")
    federation = await party.play()
    assert (await party.clients["b"].open(federation.round_id(1))).contributors == tuple(FIVE)


async def test_a_commit_without_a_dealing_or_with_anothers_is_refused(fed):
    party = await convened(fed)
    party.clients["a"].silent_from = "commit"
    await party.until("COLLECTING")
    await party.act()
    round_ = (await fed.assignment("a")).train.round
    digests = fed.aggregation.put(round_.round_id, "a", len(round_.layout.shards))
    update = fed.update("a", round_, digests)
    with pytest.raises(DomainError, match="dealt must be set"):
        await fed.handlers.updates.commit("fed", round_.round_id, update)
    stolen = party.clients["b"].dealt[round_.round_id]
    with pytest.raises(DomainError) as refused:
        await fed.handlers.updates.commit("fed", round_.round_id, update, stolen)
    assert refused.value.reason is Reason.SIGNATURE_REFUSED


async def test_a_revoked_contributor_is_in_no_certified_set_that_is_published(fed):
    party = await convened(fed, max_attempts=2)
    for name in FIVE:
        party.clients[name].silent_from = "answer"
    await party.until("AGGREGATING")
    fed.revoked["e"] = fed.now_ms
    await fed.settle()
    assert states(await fed.shown())[0] == ("ABANDONED", "CERTIFICATE_REVOKED")
    assert (await fed.federation()).draws == 1, "its set may be known to members: it is spent"


async def test_nothing_of_the_committee_is_left_when_the_round_is_over(fed):
    party = await convened(fed)
    federation = await party.play()
    await fed.settle()
    for kind in Statement:
        assert await fed.store.committees.statements(kind, federation, 1) == {}
    assert not await fed.store.committees.dealers(federation, 1)
    assert await fed.store.committees.dealings(federation, 1, FIVE) == {}
    assert [await fed.store.committees.shares(federation, 1, place, FIVE) for place in range(5)] == [{}] * 5
    assert (await party.clients["a"].open(federation.round_id(1))).contributors == tuple(FIVE)


async def test_a_signature_after_the_quorums_is_taken_and_not_needed(fed):
    """Members sign side by side: who comes after the last one that was needed has done nothing wrong."""
    party = await convened(fed)
    late = party.clients["e"]
    late.silent_from = "sign"
    current = await party.until("AGGREGATING")
    federation = await fed.federation()
    record = (await fed.store.rounds.read(federation, current.sequence)).record
    signed = late.seats[current.round_id].certify(record.contributors)
    signature = committee_pb2.SetSignature(signature=signed.signature, certificate=signed.certificate)
    await fed.handlers.committees.sign("fed", current.round_id, "e", signature)
    assert "e" not in await fed.store.committees.speakers(Statement.SIGNATURE, federation, current.sequence)
    with pytest.raises(DomainError) as forged:
        await fed.handlers.committees.sign(
            "fed", current.round_id, "e", committee_pb2.SetSignature(signature=b"x", certificate=b"y")
        )
    assert forged.value.reason is Reason.SIGNATURE_REFUSED


async def test_a_set_that_was_not_proposed_finds_no_signature_here(fed):
    party = await convened(fed)
    for name in FIVE:
        party.clients[name].silent_from = "sign"
    current = await party.until("CERTIFYING")
    await party.step()
    seat = party.clients["a"].seats[current.round_id]
    other = signer("a").sign(StatementKind.SET, seat.context, b"another set")
    signature = committee_pb2.SetSignature(signature=other.signature, certificate=other.certificate)
    with pytest.raises(DomainError) as refused:
        await fed.handlers.committees.sign("fed", current.round_id, "a", signature)
    assert refused.value.reason is Reason.SIGNATURE_REFUSED


async def test_deleting_a_federation_leaves_nothing_of_its_committees(fed, redis_url):
    party = await convened(fed, rounds=3)
    await party.until("CERTIFYING")
    await fed.handlers.federations.delete("fed")
    await fed.driver._hold("fed")
    async with connect(redis_url) as client:
        assert await client.keys("*{fed}*") == []
