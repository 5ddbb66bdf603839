"""How an operator ends a federation, lets it go on, and has nothing of it left."""

import asyncio

import pytest
import redis

from coordinator.records import EvaluationRecord, Phase, Sighting
from coordinator.render import GONE_MS
from shelora.errors import DomainError, Reason
from shelora.federation import FederationSpec
from shelora.view import status_line
from tests.contract.coordinator.test_driver import outcomes
from tests.contract.coordinator.world import spec


async def until_trained(fed, rounds: int) -> None:
    await fed.settle()
    while (await fed.federation()).trained < rounds:
        await fed.act()
        fed.now_ms += 1000
        await fed.settle()


async def test_stopping_makes_the_newest_result_the_final_one(fed):
    await fed.begin(spec(rounds=5))
    await until_trained(fed, 2)
    for _ in range(2):
        await fed.handlers.federations.stop("fed")
    await fed.settle()
    record, shown = await fed.federation(), await fed.shown()
    assert (record.phase, record.trained, record.ticket) == (Phase.FINISHED, 2, None)
    assert (shown.stopped, shown.spec.round.rounds) == (True, 2)
    assert outcomes(shown)[-1][3:] == ("ABANDONED", "FEDERATION_CLOSED"), "the round in progress"
    finish = (await fed.assignment("a")).finish
    assert finish.result.round_number == 2
    assert (record.garbage, fed.aggregation.updates) == ((), {})


async def test_stopping_while_a_round_is_aggregated_keeps_the_round(fed):
    await fed.begin(spec("none", rounds=5))
    await fed.settle()
    await fed.act()
    await fed.driver.step("fed")  # closes it
    await fed.handlers.federations.stop("fed")
    await fed.settle()
    record = await fed.federation()
    assert (record.phase, record.trained) == (Phase.FINISHED, 1)


@pytest.mark.parametrize("running", [True, False])
async def test_stopping_without_a_result_fails_it_in_words(fed, running):
    if running:
        await fed.begin(spec())
        await fed.settle()
    else:
        await fed.handlers.federations.create(spec())
    await fed.handlers.federations.stop("fed")
    await fed.settle()
    record = await fed.federation()
    assert (record.phase, record.failure) == (
        Phase.FAILED,
        "its operator stopped it before a round was published",
    )
    assert not (await fed.handlers.federations.stop("fed")).stopped or record.stopped


async def test_a_failed_federation_gives_its_agents_the_newest_result(fed):
    await fed.begin(spec(rounds=5, max_attempts=1))
    await until_trained(fed, 1)
    fed.now_ms += 60_000
    await fed.settle()
    halt = (await fed.assignment("a")).halt
    assert halt.why.startswith("round 2 was abandoned")
    assert (halt.result.round_number, halt.plan.plan_number) == (1, 1)


async def test_extending_a_running_federation_adds_rounds_once_however_often_it_is_asked(fed):
    await fed.begin(spec())
    await until_trained(fed, 1)
    for _ in range(2):
        await fed.handlers.federations.extend("fed", 4)
    assert (await fed.shown()).spec.round.rounds == 4
    record = await fed.play()
    assert (record.phase, record.trained) == (Phase.FINISHED, 4)
    assert record.spec == spec(), "creating it again finds it"


@pytest.mark.parametrize("stopped", [True, False])
async def test_a_finished_federation_goes_on_from_its_result(fed, stopped):
    await fed.begin(spec())
    if stopped:
        await until_trained(fed, 1)
        await fed.handlers.federations.stop("fed")
    before = await fed.play()
    await fed.handlers.federations.extend("fed", 3)
    record = await fed.play()
    assert (before.phase, record.phase, record.trained, record.stopped) == (
        Phase.FINISHED,
        Phase.FINISHED,
        3,
        False,
    )


async def test_what_cannot_be_extended_says_why(fed):
    await fed.begin(spec())
    with pytest.raises(
        DomainError, match="rounds must be 2, as many as there are now, to 10000, not 1"
    ) as few:
        await fed.handlers.federations.extend("fed", 1)
    assert few.value.reason is Reason.INVALID_ARGUMENT
    await fed.play()
    fed.now_ms += 8 * 86_400_000
    with pytest.raises(DomainError, match="its last result is stored no longer") as late:
        await fed.handlers.federations.extend("fed", 3)
    assert late.value.reason is Reason.FEDERATION_CLOSED


async def test_a_failed_federation_is_not_extended(fed):
    await fed.begin(spec())
    await fed.settle()
    await fed.handlers.federations.stop("fed")
    await fed.settle()
    with pytest.raises(DomainError, match="has failed and cannot go on") as failed:
        await fed.handlers.federations.extend("fed", 3)
    assert failed.value.reason is Reason.FEDERATION_CLOSED


async def test_a_driver_finds_a_finished_federation_that_was_extended(fed):
    await fed.begin(spec("none", rounds=1))
    driving = asyncio.create_task(fed.driver.run())
    try:
        async with asyncio.timeout(30):
            for rounds in (1, 2):
                while (await fed.federation()).trained < rounds or "fed" not in fed.driver._finished:
                    await fed.act()
                    await asyncio.sleep(0.01)
                await fed.handlers.federations.extend("fed", rounds + 1)
                fed.changes.wake_all()
                await asyncio.sleep(0)
    finally:
        driving.cancel()
        await asyncio.gather(driving, return_exceptions=True)


@pytest.mark.parametrize("negotiation", ["sealed", "ope"])
@pytest.mark.parametrize("rounds", [0, 1, 2])
async def test_deleting_leaves_nothing_and_frees_the_name(fed, redis_url, negotiation, rounds):
    await fed.begin(spec(negotiation=negotiation, rounds=2))
    await until_trained(fed, rounds)
    await fed.act()
    epoch = (await fed.federation()).epoch
    await fed.handlers.federations.delete("fed")
    assert (await fed.assignment("a")).halt.why == "its operator deletes the federation"
    for call in (
        fed.join("late"),
        fed.handlers.federations.extend("fed", 9),
        fed.handlers.federations.start("fed"),
    ):
        with pytest.raises(DomainError) as closed:
            await call
        assert closed.value.reason is Reason.FEDERATION_CLOSED
    await fed.driver._hold("fed")
    with pytest.raises(DomainError) as gone:
        await fed.federation()
    assert gone.value.reason is Reason.FEDERATION_UNKNOWN
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys("*") == []
    assert (fed.aggregation.updates, fed.aggregation.result_rounds()) == ({}, set())
    assert fed.authority.retired_before == epoch + 1
    fed.silent = set()
    await fed.begin(spec(negotiation=negotiation))
    assert (await fed.play()).phase is Phase.FINISHED


async def test_deleting_goes_on_where_it_broke_off(fed, redis_url, monkeypatch):
    await fed.begin(spec())
    await until_trained(fed, 1)
    await fed.handlers.federations.delete("fed")

    async def broken(_federation_id: str) -> None:
        raise DomainError(Reason.STORE_UNAVAILABLE, "gone")

    with monkeypatch.context() as patch:
        patch.setattr(fed.store.disposal, "_forget", broken)
        with pytest.raises(DomainError):
            await fed.driver.step("fed")
    await fed.driver._hold("fed")
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys("*") == []


async def test_a_federation_that_was_never_started_is_deleted_too(fed):
    await fed.handlers.federations.create(spec())
    await fed.join("a")
    await fed.handlers.federations.delete("fed")
    driving = asyncio.create_task(fed.driver.run())
    try:
        async with asyncio.timeout(30):
            while await fed.store.federations.ids():  # noqa: ASYNC110 - the store tells nobody
                await asyncio.sleep(0.01)
    finally:
        driving.cancel()
        await asyncio.gather(driving, return_exceptions=True)


async def test_rounds_beyond_what_client_privacy_is_planned_for_are_refused(fed):
    plain = spec("complete", rounds=1)
    hidden = FederationSpec.model_validate(
        {
            **plain.model_dump(),
            "protection": {
                **plain.protection.model_dump(),
                "client_privacy": {"noise_multiplier": 1.0, "delta": 1e-5, "clip": 0.5, "sums": 3},
            },
        }
    )
    await fed.begin(hidden)
    assert (await fed.handlers.federations.extend("fed", 3)).rounds == 3
    with pytest.raises(DomainError, match="was for 3 sums") as refused:
        await fed.handlers.federations.extend("fed", 4)
    assert refused.value.reason is Reason.INVALID_ARGUMENT
    assert (await fed.federation()).rounds == 3


async def test_what_a_member_last_said_of_itself_is_not_shown_for_ever_after_the_end(fed):
    await fed.begin(spec("none", rounds=1))
    await fed.play()
    await fed.store.presence.see("fed", "a", Sighting(stage="decrypting", progress=0.5, at_ms=fed.now_ms))
    assert {m.client_id: m.stage for m in (await fed.shown()).members}["a"] == "decrypting"
    fed.now_ms += GONE_MS + 1
    assert not {m.client_id: m.stage for m in (await fed.shown()).members}["a"]


async def evaluated(fed, losses) -> None:
    """Agents evaluate the newest result, as they do before they train on from it."""
    record = await fed.federation()
    if record.trained:
        for client in "abc":
            told = EvaluationRecord(
                client_id=client,
                example_count=10,
                correct_count=5,
                loss=losses[record.trained - 1],
                download_s=0,
                decrypt_s=0,
                evaluate_s=0,
                download_bytes=0,
            )
            await fed.handlers.members.report_evaluation("fed", record.round_id(record.result_sequence), told)


async def trained_with(fed, losses):
    """Plays until the federation has ended, with these losses by round."""
    for _ in range(30):
        await fed.settle()
        await evaluated(fed, losses)
        if (await fed.federation()).ended:
            break
        await fed.act()
        fed.now_ms += 1000
    return await fed.federation()


def with_rule(rounds):
    return spec("none", rounds=rounds, stop={"metric": "loss", "patience": 2, "threshold": 0.05})


async def test_a_rule_ends_a_federation_that_gets_no_better_with_its_newest_result(fed):
    await fed.begin(with_rule(20))
    record = await trained_with(fed, [2.0, 1.0, 0.97, 0.99, *[0.1] * 20])
    assert (record.phase, record.trained, record.converged) == (Phase.FINISHED, 5, True)
    assert (record.early_stopping.best, record.early_stopping.judged) == (2, 4)
    assert (await fed.assignment("a")).finish.result.round_number == 5
    shown = await fed.shown()
    assert (shown.early_stopping.best_round, shown.early_stopping.best, shown.early_stopping.ended) == (
        2,
        1.0,
        True,
    )
    assert (shown.spec.round.rounds, shown.stopped) == (5, False)
    assert "ended by its rule after 5 rounds: 2 in a row were not better than round 2" in status_line(shown)


async def test_a_federation_that_gets_better_trains_all_its_rounds_under_a_rule(fed):
    await fed.begin(with_rule(5))
    record = await trained_with(fed, [2.0, 1.0, 0.5, 0.2, 0.1])
    assert (record.phase, record.trained, record.converged) == (Phase.FINISHED, 5, False)
    assert record.early_stopping.best == 4, "the last round is not judged: no round follows it"


async def test_a_federation_that_its_rule_ended_can_be_extended_and_is_judged_anew(fed):
    await fed.begin(with_rule(20))
    await trained_with(fed, [1.0] * 20)
    await fed.handlers.federations.extend("fed", 9)
    record = await fed.federation()
    assert (record.phase, record.early_stopping, record.converged) == (Phase.RUNNING, None, False)
    record = await trained_with(fed, [1.0] * 20)
    assert record.converged
    assert 4 < record.trained < 9


async def test_without_evaluations_a_rule_ends_nothing(fed):
    await fed.begin(with_rule(6))
    record = await fed.play()
    assert (record.trained, record.early_stopping, record.converged) == (6, None, False)
