"""Published sums that clients cannot open: the round is repeated from the result before, but for no lone liar."""

import pytest

from coordinator.records import Dropped, Phase
from shelora.errors import DomainError, Reason
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.members import Client, Convened
from tests.contract.coordinator.test_committees import FOUR, convened, states
from tests.contract.coordinator.world import World

SPOILED = ("ABANDONED", "SUM_UNREADABLE")
PUBLISHED = ("PUBLISHED", "")


async def cannot_open(fed: World, party: Convened, names: str, *sequences: int) -> None:
    """Has clients say that they cannot open the results of these rounds."""
    federation = await fed.federation()
    for name in names:
        party.clients[name].unreadable = frozenset(map(federation.round_id, sequences))


def numbers(shown: pb.Federation) -> list[int]:
    return [round_.number for round_ in shown.history]


async def test_a_sum_that_most_cannot_open_is_taken_back_and_its_round_repeated(fed):
    party = await convened(fed, FOUR, rounds=3)
    await cannot_open(fed, party, "abc", 2)
    while (await fed.federation()).sequence < 4:
        await party.step()
    federation = await fed.federation()
    assert (federation.result_sequence, federation.trained, federation.attempt) == (1, 1, 2)
    federation = await party.play()
    shown = await fed.shown()
    assert federation.phase is Phase.FINISHED, federation.failure
    assert states(shown) == [PUBLISHED, PUBLISHED, SPOILED, PUBLISHED, PUBLISHED]
    assert numbers(shown) == [1, 2, 3, 2, 3]
    assert [round_.attempt for round_ in shown.history] == [1, 1, 1, 2, 1]
    assert {drop.client_id for drop in shown.history[2].dropped} == set("abc"), (
        "the operator sees who said so"
    )
    assert federation.draws == 5, "that of the round which could not begin is spent, too"
    assert {name: len(client.notes.sets) for name, client in party.clients.items()} == {
        "a": 2,
        "b": 4,
        "c": 4,
        "d": 4,
    }, "one set a draw; the first suspect sits out after the second"


async def test_the_repetition_begins_from_the_result_before_which_is_still_there(fed):
    party = await convened(fed, FOUR, rounds=2)
    while (await fed.federation()).trained < 1:
        await party.step()
    await cannot_open(fed, party, FOUR, 2)
    await fed.handlers.federations.extend("fed", 3)
    while (await fed.federation()).sequence < 4:
        await party.step()
    await fed.settle()
    federation = await fed.federation()
    train = (await fed.assignment("b")).train
    assert (train.round.number, train.base.round_id) == (2, federation.round_id(1))
    assert (await party.clients["a"].open(federation.round_id(1))).contributors == tuple(FOUR)
    assert federation.results_in_use == {1}
    assert fed.aggregation.result_rounds() == {federation.round_id(1)}, "what was taken back is deleted"


async def test_the_first_sum_is_taken_back_to_the_start(fed):
    party = await convened(fed, FOUR, rounds=2)
    await cannot_open(fed, party, FOUR, 1)
    while (await fed.federation()).sequence < 3:
        await party.step()
    await fed.settle()
    train = (await fed.assignment("b")).train
    assert (train.round.number, train.HasField("base")) == (1, False)
    federation = await party.play()
    assert (federation.phase, federation.trained) == (Phase.FINISHED, 2)


async def test_stopping_while_the_first_round_is_repeated_says_that_its_result_was_taken_back(fed):
    party = await convened(fed, FOUR, rounds=2)
    await cannot_open(fed, party, FOUR, 1)
    while (await fed.federation()).sequence < 3:
        await party.step()
    await fed.handlers.federations.stop("fed")
    await fed.settle()
    federation = await fed.federation()
    assert (federation.phase, federation.trained) == (Phase.FAILED, 0)
    assert "while its first round was repeated: the result of that had been taken back" in federation.failure


@pytest.mark.parametrize(("names", "liars"), [("abc", "c"), (FOUR, "d"), (FOUR, "cd")])
async def test_liars_that_are_no_majority_take_nothing_back(fed, names, liars):
    party = await convened(fed, names, rounds=3)
    await cannot_open(fed, party, liars, 1, 2)
    federation = await party.play(90)
    shown = await fed.shown()
    assert federation.phase is Phase.FINISHED, federation.failure
    assert SPOILED not in states(shown)
    assert numbers(shown) == [1, 2, 3]


async def test_two_of_three_are_a_majority(fed):
    party = await convened(fed, "abc", rounds=2)
    await cannot_open(fed, party, "ab", 1)
    federation = await party.play()
    assert federation.phase is Phase.FINISHED, federation.failure
    assert SPOILED in states(await fed.shown())


async def test_of_two_one_alone_takes_nothing_back_and_the_federation_fails_as_without_it(fed):
    party = await convened(fed, "ab", rounds=2, max_attempts=2)
    await cannot_open(fed, party, "a", 1)
    federation = await party.play(200)
    assert (federation.phase, federation.trained) == (Phase.FAILED, 1)
    assert "a: SUM_UNREADABLE" in federation.failure


async def test_a_round_waits_for_a_majority_that_may_still_say_so(fed):
    """With as many as a result needs gone it would be abandoned before the third says so."""
    party = await convened(fed, FOUR, rounds=2, min_updates=3, max_attempts=2)
    await cannot_open(fed, party, "abc", 1)
    while (await fed.federation()).trained < 1:
        await party.step()
    party.clients["c"].silent_from = party.clients["d"].silent_from = "commit"
    party.clients["c"].unreadable = frozenset()
    await party.until("COLLECTING")
    for _ in range(3):
        await party.step()
    assert states(await fed.shown()) == [PUBLISHED]
    await cannot_open(fed, party, "abc", 1)
    await party.step()
    assert states(await fed.shown()) == [PUBLISHED, SPOILED]


async def test_repeated_spoiling_ends_the_federation_after_the_last_attempt_with_the_result_before(fed):
    """Whoever is left out, so it is not one alone."""
    party = await convened(fed, FOUR, rounds=3, max_attempts=2)
    await cannot_open(fed, party, FOUR, *range(2, 14, 2))
    federation = await party.play(160)
    assert (federation.phase, federation.trained, federation.result_sequence) == (Phase.FAILED, 1, 1)
    assert "the sum of round 2 was spoiled in attempt 5" in federation.failure
    assert "a: SUM_UNREADABLE, the sum does not open" in federation.failure
    assert (await fed.assignment("a")).halt.result.round_id == federation.round_id(1)


async def test_a_last_sum_that_does_not_open_is_repeated_when_the_federation_is_extended(fed):
    party = await convened(fed, FOUR, rounds=2)
    await cannot_open(fed, party, FOUR, 2)
    federation = await party.play()
    assert (federation.phase, federation.results_in_use) == (Phase.FINISHED, {1, 2})
    await fed.handlers.federations.extend("fed", 3)
    federation = await party.play()
    shown = await fed.shown()
    assert (federation.phase, federation.trained) == (Phase.FINISHED, 3)
    assert numbers(shown) == [1, 2, 3, 2, 3]


def spoil(party: Convened, culprit: str, reason: Reason | None = None) -> None:
    """Has the others give up what begins from a sum with the culprit's update; without a reason, object to it."""
    for client in party.clients.values():
        client.distrusts, client.says = frozenset({culprit} - {client.name}), reason


@pytest.mark.parametrize("culprit", FOUR)
@pytest.mark.parametrize("reason", [None, Reason.RESULT_REFUSED, Reason.SUM_UNREADABLE])
async def test_one_that_spoils_every_result_sits_out_and_the_federation_finishes(fed, culprit, reason):
    party = await convened(fed, FOUR, rounds=3, min_updates=3, max_attempts=2)
    spoil(party, culprit, reason)
    federation = await party.play(200)
    shown = await fed.shown()
    assert (federation.phase, federation.trained) == (Phase.FINISHED, 3), federation.failure
    assert federation.sits_out == shown.sits_out == culprit
    assert states(shown).count(SPOILED) == 1 + FOUR.index(culprit), "each that was taken back has cleared one"
    assert [
        r.update_count for r in shown.history if (r.number, r.state) == (3, pb.ROUND_STATE_PUBLISHED)
    ] == [3]


async def test_another_spoiler_is_looked_for_anew_once_the_one_that_was_found_is_no_help(fed):
    """Also if the first results were taken back wrongly: who is left out then must not end the search for ever."""
    party = await convened(fed, FOUR, rounds=4, min_updates=2, max_attempts=2)
    spoil(party, "d")
    while (await fed.federation()).suspects != ("d",) or (await fed.federation()).trained < 3:
        await party.step()
    spoil(party, "b")  # of the third result on: the two before it have no way back
    federation = await party.play(300)
    assert (federation.phase, federation.sits_out) == (Phase.FINISHED, "b"), federation.failure


@pytest.mark.parametrize("names", ["a", "ab"])
async def test_who_objects_with_too_few_others_is_in_the_next_sum_and_the_operator_reads_why(fed, names):
    """Honest clients object too, if their data is unlike the others': they go on learning, and teaching."""
    party = await convened(fed, FOUR, rounds=3, min_updates=3)
    for name in names:
        party.clients[name].distrusts, party.clients[name].says = frozenset("d"), None
    federation = await party.play()
    shown = await fed.shown()
    assert federation.phase is Phase.FINISHED, federation.failure
    assert states(shown) == [PUBLISHED] * 3
    assert [round_.update_count for round_ in shown.history] == [4, 4, 4]
    objections = [[(said.client_id, said.why) for said in round_.objections] for round_ in shown.history]
    assert objections == [*[[(name, "it forgets") for name in names]] * 2, []], "no round began from the last"


async def test_objections_to_the_newest_result_count_with_those_that_cannot_open_it(fed):
    party = await convened(fed, FOUR, rounds=2)
    party.clients["a"].unreadable = frozenset({(await fed.federation()).round_id(1)})
    while (await fed.federation()).trained < 1:
        await party.step()
    await party.until("COLLECTING")
    assignment = (await fed.assignment("b")).train
    result = assignment.base.round_id
    await party.clients["b"].object(result)
    await party.clients["b"].object(result)
    await party.clients["c"].object(assignment.round.round_id)
    await fed.settle()
    assert states(await fed.shown()) == [PUBLISHED], "two of four are not more than half"
    await party.clients["c"].object(result)
    await fed.settle()
    assert states(await fed.shown()) == [PUBLISHED, SPOILED]
    with pytest.raises(DomainError) as refused:
        await Client("z", fed).object(result)
    assert refused.value.reason is Reason.CLIENT_UNKNOWN


async def test_an_objection_is_kept_once_and_only_where_servers_cannot_screen(fed):
    party = await convened(fed, FOUR, rounds=2)
    while (await fed.federation()).trained < 1:
        await party.step()
    federation = await fed.federation()
    first, second = (Dropped(client_id="a", reason=Reason.RESULT_REFUSED, why=why) for why in ("1", "2"))
    assert await fed.store.rounds.put_objection(federation, 1, first)
    assert not await fed.store.rounds.put_objection(federation, 1, second)
    assert await fed.store.rounds.objections(federation, 1) == [first]
    screened = federation.spec.protection.model_copy(update={"mode": "none"})
    spec = federation.spec.model_copy(update={"protection": screened})
    await fed.store.federations.transact("test", "fed", lambda r: r.model_copy(update={"spec": spec}))
    await party.clients["b"].object(federation.round_id(1))
    assert await fed.store.rounds.objections(federation, 1) == [first]


async def test_a_failure_for_another_reason_does_not_blame_who_objected(fed):
    party = await convened(fed, FOUR, rounds=2, min_updates=3, max_attempts=1)
    party.clients["a"].distrusts, party.clients["a"].says = frozenset("d"), None
    while (await fed.federation()).trained < 1:
        await party.step()
    for name in "bcd":
        party.clients[name].silent_from = "commit"
    await party.until("COLLECTING")
    await party.step()
    assert [said.client_id for said in (await fed.shown()).history[0].objections] == ["a"]
    fed.now_ms += 1000 * (await fed.federation()).spec.round.deadline_s
    federation = await party.play(20)
    assert "at last for TOO_FEW_UPDATES" in federation.failure
    assert "it forgets" not in federation.failure


async def test_a_last_result_that_most_object_to_is_repeated_when_the_federation_is_extended(fed):
    party = await convened(fed, FOUR, rounds=2)
    federation = await party.play()
    for name in "abc":
        await party.clients[name].object(federation.round_id(2))
    assert [said.client_id for said in (await fed.shown()).history[-1].objections] == [*"abc"]
    await fed.handlers.federations.extend("fed", 3)
    federation = await party.play()
    assert (federation.phase, federation.trained) == (Phase.FINISHED, 3)
    assert numbers(await fed.shown()) == [1, 2, 3, 2, 3]


async def test_a_failure_says_who_objected_although_their_updates_came(fed):
    party = await convened(fed, FOUR, rounds=3, max_attempts=1)
    spoil(party, "d")
    for client in party.clients.values():
        client.distrusts = frozenset("abcd")
    federation = await party.play(200)
    assert federation.phase is Phase.FAILED
    assert "a: RESULT_REFUSED, it forgets" in federation.failure


async def test_one_that_behaves_once_another_sits_out_costs_no_more_than_that(fed):
    party = await convened(fed, FOUR, rounds=4, min_updates=3)
    spoil(party, "d")
    while (await fed.federation()).sits_out != "a":
        await party.step()
    for client in party.clients.values():
        client.distrusts = frozenset()
    await party.until("COLLECTING")
    assert "they go on without it" in (await fed.assignment("a")).wait.why
    federation = await party.play(200)
    shown = await fed.shown()
    assert (federation.phase, federation.sits_out) == (Phase.FINISHED, "a"), federation.failure
    assert states(shown).count(SPOILED) == 1


async def test_nobody_sits_out_where_too_few_would_be_left(fed):
    party = await convened(fed, "abc", rounds=2, min_updates=3, max_attempts=2)
    spoil(party, "c")
    federation = await party.play(120)
    assert federation.phase is Phase.FAILED
    assert "the sum of round 1 was spoiled in attempt" in federation.failure
