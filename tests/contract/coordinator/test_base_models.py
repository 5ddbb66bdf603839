"""Agents with another base model than most: left out of votes and updates, told, and named to the operator."""

import pytest

from coordinator import checks
from coordinator.records import Phase
from shelora.errors import DomainError, Reason
from shelora.v1 import coordinator_pb2 as pb
from tests.contract.coordinator.test_driver import until_training
from tests.contract.coordinator.world import spec

LEFT_OUT = "MODEL_MISMATCH"


def left_out(summary: pb.RoundSummary) -> list[str]:
    return [drop.client_id for drop in summary.dropped if drop.reason == LEFT_OUT]


@pytest.mark.parametrize("mode", ["none", "selective"])
async def test_another_base_model_is_left_out_of_the_first_round_and_told(fed, mode):
    fed.bases = {"a": "xxx", "b": "yxx", "c": "xxx"}
    await fed.begin(spec(mode))
    for _ in range(4):
        await fed.act()
        await fed.settle()
        if (await fed.shown()).history:
            break
    first = (await fed.shown()).history[0]
    assert left_out(first) == ["b"]
    assert "has other weights than those of most agents: take the model.path" in first.dropped[0].why
    told = await fed.assignment("b")
    assert (told.notice_reason, told.notice) == (LEFT_OUT, first.dropped[0].why)
    assert told.notice_round_id == first.round_id
    assert (await fed.assignment("a")).notice_reason == ""
    aggregated = [[p.client_id for p in r.contributions] for r in fed.aggregation.aggregated]
    assert aggregated[0] == ["a", "c"]


async def test_one_that_ended_for_its_base_model_is_not_waited_for(fed):
    """Seen from outside: the round after the one that left it out lasted its whole deadline."""
    fed.bases = {"a": "xxx", "b": "yxx", "c": "xxx"}
    await fed.begin(spec("none", rounds=3, deadline_s=3600))
    begun = fed.now_ms
    while not (await fed.federation()).ended:
        await fed.settle()
        if (await fed.shown()).history:
            fed.idle = {"b"}  # it was told, and has ended
        await fed.act()
        fed.now_ms += 5000
    assert left_out((await fed.shown()).history[0]) == ["b"]
    assert (await fed.federation()).trained == 3
    assert fed.now_ms - begun < 60_000, "less than the least grace"


async def test_a_ballot_of_another_base_model_is_left_out(fed):
    fed.bases = {"a": "xxx", "b": "xxx", "c": "xzx"}
    await fed.begin(spec("selective", negotiation="ope"))
    await fed.settle()
    await fed.act()
    await fed.settle()
    vote = (await fed.shown()).history[0]
    assert (vote.kind, left_out(vote)) == (pb.ROUND_KIND_VOTE, ["c"])
    assert "has other tokens than" in (await fed.assignment("c")).notice


async def test_agents_that_agree_or_say_nothing_are_all_counted(fed):
    fed.bases = {"a": "xxx", "b": "xxx"}
    await fed.begin(spec("none"))
    record = await fed.play()
    assert record.phase is Phase.FINISHED
    assert all(not left_out(round_) for round_ in (await fed.shown()).history)
    assert not (await fed.shown()).history[0].updates[0].HasField("base_model"), "nobody needs to see it"


async def test_one_hostile_tag_among_three_costs_the_others_nothing(fed):
    """The control: before, the first to join decided; here the majority does, round by round."""
    fed.bases = {"a": "???", "b": "xxx", "c": "xxx"}
    await fed.begin(spec("none"))
    record = await fed.play()
    assert record.phase is Phase.FINISHED
    assert [left_out(round_) for round_ in (await fed.shown()).history] == [["a"]] * record.trained


async def test_without_a_majority_nobody_is_believed_and_the_operator_reads_why(fed):
    fed.bases = {"a": "xxx", "b": "yxz"}
    await fed.begin(spec("none", clients=2), "ab")
    train = await until_training(fed)
    for client in "ab":
        await fed.commit(client, train.round)
    await fed.settle()
    abandoned = (await fed.shown()).history[0]
    assert (abandoned.reason, left_out(abandoned)) == (LEFT_OUT, ["a", "b"])
    assert "other weights and chat templates than those of other agents" in abandoned.dropped[0].why
    assert (await fed.assignment("a")).notice_reason == LEFT_OUT
    record = await fed.play()
    assert record.phase is Phase.FAILED
    assert "different base models" in record.failure


@pytest.mark.parametrize("tag", [b"", b"x" * 31, b"x" * 4096])
def test_a_tag_of_another_length_is_refused(tag):
    whole = b"x" * 32
    report = pb.UpdateReport(
        example_count=1, base_model=pb.BaseModelTags(weights=whole, tokenizer=tag, chat_template=whole)
    )
    with pytest.raises(DomainError, match=r"report\.base_model\.tokenizer must have 32 bytes") as caught:
        checks.report(report)
    assert caught.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("other", ["xxxt", "xxx"])
async def test_who_starts_from_another_adapter_or_from_none_is_left_out_and_told(fed, other):
    fed.bases = {"a": "xxxs", "b": "xxxs", "c": other}
    await fed.begin(spec("none"))
    for _ in range(4):
        await fed.act()
        await fed.settle()
        if (await fed.shown()).history:
            break
    first = (await fed.shown()).history[0]
    assert left_out(first) == ["c"]
    assert (
        "other starting values (model.adapter, model.head) than those of most agents" in first.dropped[0].why
    )


def test_a_starting_tag_has_the_length_of_a_digest():
    report = pb.UpdateReport(client_id="a", example_count=1)
    for part in ("weights", "tokenizer", "chat_template"):
        setattr(report.base_model, part, b"x" * 32)
    assert checks.report(report).base_model.start == ""
    report.base_model.start = b"x" * 31
    with pytest.raises(DomainError, match=r"report\.base_model\.start must have 32 bytes") as refusal:
        checks.report(report)
    assert refusal.value.reason is Reason.INVALID_ARGUMENT
