import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import transitions
from coordinator.records import (
    EvaluationRecord,
    FederationRecord,
    Means,
    MemberRecord,
    Model,
    Phase,
    ResultRecord,
)
from shelora.errors import DomainError, Reason
from shelora.federation import StopSpec
from shelora.lora.layout import Matrix, Tensor
from shelora.rounds import RoundKind, RoundState
from tests.unit.coordinator.records import (
    DIGEST,
    MATRICES,
    MEMBERS,
    NEGOTIATION,
    PLAN,
    TENSORS,
    a_round,
    federation,
    ticket,
)

COUNTED = [replace(m, tier_columns=(1, 2)) for m in MATRICES]


def refusal(change) -> DomainError:
    with pytest.raises(DomainError) as refused:
        change()
    return refused.value


def test_no_joining_client_fixes_the_model():
    empty, model = federation(model=None), Model(matrices=MATRICES[:1], tensors=())
    assert transitions.required_model(empty, model) is empty
    record = federation()
    assert transitions.required_model(record, record.model) is record


@pytest.mark.parametrize(
    ("shapes", "elected"),
    [("xyy", "y"), ("xy", None), ("xxyy", None), ("x", "x"), ("", None), ("xyzyy", "y"), ("xyz", None)],
)
def test_the_model_is_that_of_more_than_half(shapes, elected):
    joined = {
        str(i): MEMBERS["a"].model_copy(update={"client_id": str(i), "shapes": digest})
        for i, digest in enumerate(shapes)
    }
    assert transitions.elected_shapes(joined) == elected


def test_who_has_another_model_is_no_member_once_it_is_fixed():
    record = federation(model=None)
    odd = MEMBERS["c"].model_copy(update={"shapes": "odd"})
    joined = {**MEMBERS, "c": odd}
    assert record.admitted(joined) == joined
    fixed = transitions.with_model(record, federation().model)
    own = MEMBERS["a"].model_copy(update={"shapes": fixed.model.digest})
    assert fixed.admitted({**joined, "a": own}).keys() == {"a", "b"}, "b joined before models were compared"


def test_a_revocation_before_the_first_round_lets_the_others_decide_on_the_model_anew():
    assert transitions.revoked(federation(sequence=0), {"a": 5}).model is None
    assert transitions.revoked(federation(sequence=1), {"a": 5}).model is not None


@pytest.mark.parametrize(
    ("matrices", "tensors", "words"),
    [
        ((Matrix("q", 8, 12), Matrix("v", 9, 12)), TENSORS, r"matrix v \[9, 12\] differs .* v \[8, 12\]"),
        ((Matrix("v", 8, 12), Matrix("q", 8, 12)), TENSORS, "matrix v"),
        (MATRICES[:1], TENSORS, r"matrix v \[8, 12\] is missing"),
        ((*MATRICES, Matrix("k", 8, 12)), TENSORS, r"matrix k \[8, 12\] is not in the federation's model"),
        (MATRICES, (Tensor("bias", (4,), 4.0),), r"tensor bias \[4\] differs"),
        (MATRICES, (), r"tensor bias \[3\] is missing"),
    ],
)
def test_another_model_is_refused_naming_the_first_difference(matrices, tensors, words):
    with pytest.raises(DomainError, match=words) as refused:
        transitions.required_model(federation(), Model(matrices=matrices, tensors=tensors))
    assert refused.value.reason is Reason.MODEL_MISMATCH


@pytest.mark.parametrize("phase", [Phase.FINISHED, Phase.FAILED])
def test_an_ended_federation_takes_no_clients_and_does_not_start_again(phase):
    ended = federation(phase=phase)
    assert refusal(lambda: transitions.required_model(ended, ended.model)).reason is Reason.FEDERATION_CLOSED
    assert refusal(lambda: transitions.started(ended)).reason is Reason.FEDERATION_CLOSED


def test_starting_twice_changes_nothing_the_second_time():
    once = transitions.started(federation(phase=Phase.CREATED))
    assert once.phase is Phase.RUNNING
    assert transitions.started(once) == once


def planning() -> FederationRecord:
    return federation(negotiation=NEGOTIATION, sequence=1, plan_count=1)


def test_the_leaders_plan_comes_into_force():
    after = transitions.with_plan(planning(), "a", 1, DIGEST, COUNTED)
    assert after.plan is not None
    assert after.negotiation is None
    assert after.plan.tier_columns == ((1, 2), (1, 2))
    assert transitions.with_plan(after, "a", 1, DIGEST, COUNTED) is after


def test_a_plan_from_anyone_else_or_under_another_number_is_refused():
    for client, number in (("b", 1), ("a", 2), ("a", 0)):
        refused = refusal(lambda c=client, n=number: transitions.with_plan(planning(), c, n, DIGEST, COUNTED))
        assert refused.reason is Reason.NOT_LEADER


def test_a_second_plan_under_the_same_number_is_refused():
    after = transitions.with_plan(planning(), "a", 1, DIGEST, COUNTED)
    other = DIGEST.model_copy(update={"sha256": "ff" * 32})
    assert (
        refusal(lambda: transitions.with_plan(after, "a", 1, other, COUNTED)).reason is Reason.DIGEST_MISMATCH
    )


@pytest.mark.parametrize(
    "matrices",
    [COUNTED[:1], list(MATRICES), [replace(m, out_features=9) for m in COUNTED]],
)
def test_a_plan_that_does_not_fit_the_model_or_the_tiers_is_refused(matrices):
    refused = refusal(lambda: transitions.with_plan(planning(), "a", 1, DIGEST, matrices))
    assert refused.reason is Reason.INVALID_ARGUMENT


def test_a_rejected_plan_leaves_the_other_candidates():
    record = federation(plan=PLAN, plan_count=1)
    after = transitions.without_plan(record, 5_000)
    assert after.plan is None
    assert after.negotiation is not None
    assert (after.negotiation.leader, after.negotiation.candidates) == ("", ("b", "c"))
    assert transitions.without_plan(after, 6_000) is after
    led = transitions.led(after, "b", 7_000)
    assert led.negotiation is not None
    assert (led.negotiation.plan_number, led.negotiation.candidates) == (2, ("c",))


OLD = PLAN.model_copy(update={"number": 7})


@pytest.mark.parametrize(
    ("fields", "plan", "phase"),
    [
        ({"plan": OLD}, OLD, Phase.RUNNING),
        ({"result_plan": OLD, "result_epoch": 1, "result_sequence": 1}, OLD, Phase.RUNNING),
        ({"result_plan": OLD, "result_epoch": 1, "result_sequence": 1, "epoch": 2}, None, Phase.RUNNING),
        ({}, None, Phase.FAILED),
    ],
    ids=["the plan in force", "the plan of the result", "of other keys", "no result"],
)
def test_a_federation_with_a_result_outlives_a_negotiation_without_a_plan(fields, plan, phase):
    after = transitions.unplanned(federation(negotiation=NEGOTIATION, **fields))
    assert (after.plan, after.phase, after.negotiation) == (plan, phase, None)


def test_a_leader_that_gives_up_makes_room_for_the_next_and_nobody_else_can():
    record = federation(negotiation=NEGOTIATION)
    assert transitions.without_leader(record, "b", 1) is record
    assert transitions.without_leader(record, "a", 2) is record
    assert transitions.without_leader(record, "a", 1).negotiation.leader == ""


def test_rejecting_what_is_not_in_force_is_refused():
    for number, sha256 in ((2, DIGEST.sha256), (1, "ff" * 32)):
        record = federation(plan=PLAN)
        refused = refusal(lambda r=record, n=number, s=sha256: transitions.require_in_force(r, n, s))
        assert refused.reason is Reason.PLAN_UNKNOWN
    assert transitions.require_in_force(federation(plan=PLAN), 1, DIGEST.sha256)
    discarded = transitions.without_plan(federation(plan=PLAN), 5_000)
    assert not transitions.require_in_force(discarded, 1, DIGEST.sha256)


def settled(record, ended, now_ms=50_000):
    return transitions.settled(record, ended, ("b", "a"), MEMBERS, now_ms)


def test_a_published_vote_opens_a_negotiation_among_its_voters_in_order():
    record = federation(ticket=ticket(RoundKind.VOTE), sequence=2)
    after = settled(record, a_round(RoundState.PUBLISHED, RoundKind.VOTE))
    assert after.ticket is None
    assert after.negotiation is not None
    assert after.negotiation.candidates == ("b", "a")
    assert after.negotiation.tiers == (1.0,)
    assert after.negotiation.deadline_ms == 110_000


def test_a_published_training_round_becomes_the_result_and_the_last_one_finishes():
    record = federation(ticket=ticket(plan=PLAN), plan=PLAN, sequence=2)
    after = settled(record, a_round(RoundState.PUBLISHED))
    assert (after.trained, after.result_sequence, after.result_plan, after.phase) == (
        1,
        2,
        PLAN,
        Phase.RUNNING,
    )
    last = a_round(RoundState.PUBLISHED)
    last = last.model_copy(update={"round": replace(last.round, number=2)})
    assert settled(record, last).phase is Phase.FINISHED


def test_an_abandoned_round_is_tried_again_until_the_attempts_are_used_up():
    record = federation(ticket=ticket(), sequence=2)
    ended = a_round(RoundState.ABANDONED, reason=Reason.TOO_FEW_UPDATES)
    again = settled(record, ended)
    assert (again.attempt, again.phase) == (2, Phase.RUNNING)
    failed = settled(again.model_copy(update={"ticket": ticket()}), ended)
    assert failed.phase is Phase.FAILED
    assert "fewer than 2 clients sent an update in time" in failed.failure


def test_a_result_that_is_taken_back_gives_way_to_the_one_before_and_its_epoch():
    earlier = ResultRecord(sequence=1, layout="aa", plan=None, epoch=1, opening=DIGEST, attempt=1)
    record = federation(
        sequence=4,
        ticket=ticket(sequence=4),
        trained=2,
        rotated_at=2,
        epoch=3,
        draws=3,
        result_sequence=3,
        result_layout="bb",
        result_epoch=2,
        result_before=earlier,
    )
    assert (record.results_in_use, record.layouts_in_use, record.oldest_epoch) == ({1, 3}, {"aa", "bb"}, 1)
    ended = a_round(RoundState.ABANDONED, sequence=4, reason=Reason.SUM_UNREADABLE)
    after = settled(record, ended.model_copy(update={"round": replace(ended.round, draw=4)}))
    assert (after.result, after.result_before) == (earlier, None)
    assert (after.trained, after.rotated_at, after.attempt, after.draws) == (1, 1, 2, 4)
    assert [(g.round_id, g.results) for g in after.garbage] == [
        ("fed.00000001.3", True),
        ("fed.00000001.4", True),
    ]


def test_each_result_that_is_taken_back_clears_who_was_not_in_it():
    record = federation(
        result_sequence=1, trained=1, result_contributors=("d", "a", "b", "c"), max_attempts=1
    )
    found = []
    for contributors in (("d", "a", "b", "c"), ("a", "b", "c"), ("c", "b", "d"), ("b", "d")):
        record = record.model_copy(update={"trained": 1, "result_contributors": contributors})
        record = transitions.retracted(record, 1, "")
        found.append((record.sits_out, record.suspects, record.phase))
    assert found == [
        ("d", ("d", "a", "b", "c"), Phase.RUNNING),
        ("a", ("a", "b", "c"), Phase.RUNNING),
        ("b", ("b", "c"), Phase.RUNNING),
        ("b", ("b",), Phase.RUNNING),
    ], "attempts do not count while somebody is cleared"
    failed = transitions.retracted(
        record.model_copy(update={"trained": 1, "result_contributors": ("b",), "result_attempt": 3}), 1, ""
    )
    assert failed.phase is Phase.FAILED, "the last suspect was not left out"


def test_who_weighs_most_is_suspected_first_and_nobody_in_a_large_cohort():
    ended = a_round(RoundState.PUBLISHED).model_copy(update={"contributors": ("a", "b")})
    heavy = {**MEMBERS, "b": MEMBERS["b"].model_copy(update={"example_count": 10**6})}
    after = transitions.settled(federation(ticket=ticket(), sequence=2), ended, ("a", "b"), heavy, 1)
    assert after.result_contributors == ("b", "a")
    many = tuple(f"c{number}" for number in range(transitions.MAX_SUSPECTS + 1))
    after = transitions.settled(
        federation(ticket=ticket(), sequence=2),
        ended.model_copy(update={"contributors": many}),
        (),
        MEMBERS,
        1,
    )
    assert after.result_contributors == ()


def test_without_a_committee_no_earlier_result_is_kept():
    record = federation(ticket=ticket(), sequence=2, result_sequence=1, trained=1)
    assert settled(record, a_round(RoundState.PUBLISHED)).results_in_use == {2}


def test_a_refused_plan_costs_no_attempt():
    record = federation(ticket=ticket(plan=PLAN), attempt=2, sequence=2)
    after = settled(record, a_round(RoundState.ABANDONED, reason=Reason.PLAN_REFUSED))
    assert (after.attempt, after.phase) == (1, Phase.RUNNING)


def test_an_abandoned_round_leaves_nothing_behind_and_a_published_one_its_result():
    record = federation(ticket=ticket(), sequence=2)
    abandoned = settled(record, a_round(RoundState.ABANDONED, reason=Reason.TOO_FEW_UPDATES))
    assert [(g.round_id, g.results) for g in abandoned.garbage] == [("fed.00000001.2", True)]
    published = settled(record.model_copy(update={"result_sequence": 1}), a_round(RoundState.PUBLISHED))
    assert [(g.round_id, g.results) for g in published.garbage] == [
        ("fed.00000001.1", True),
        ("fed.00000001.2", False),
    ]


def test_votes_that_led_to_no_plan_are_garbage_once_nobody_is_left_to_make_one():
    negotiating = federation(negotiation=PLAN.negotiation, sequence=1)
    failed = transitions.failed(negotiating, "no candidate is left")
    assert [(g.round_id, g.results) for g in failed.garbage] == [("fed.00000001.1", True)]


def test_votes_of_members_that_encrypt_nothing_are_garbage():
    vote = ticket(kind=RoundKind.VOTE)
    record = federation(ticket=vote, sequence=2)
    ended = a_round(RoundState.PUBLISHED)
    ended = ended.model_copy(update={"round": replace(ended.round, kind=RoundKind.VOTE)})
    after = transitions.settled(record, ended, ["one"], of_budgets([0.0]), 1000)
    assert after.negotiation is None
    assert [(g.round_id, g.results) for g in after.garbage] == [("fed.00000001.2", True)]


def test_votes_of_a_plan_in_use_are_not_garbage():
    record = federation(ticket=ticket(plan=PLAN), plan=PLAN, sequence=2)
    assert settled(record, a_round(RoundState.PUBLISHED)).results_in_use == {1, 2}


@pytest.mark.parametrize(
    ("round_id", "sequence"),
    [
        ("fed.00000001.1", 1),
        ("fed.00000001.2", 2),
        ("fed.00000001.3", None),
        ("fed.00000001.0", None),
        ("fed.00000001.", None),
        ("fed.00000001.²", None),
        ("other.00000001.1", None),
        ("1", None),
    ],
)
def test_a_round_is_known_by_its_full_identifier(round_id, sequence):
    assert federation(sequence=2).sequence_of(round_id) == sequence


def of_budgets(budgets):
    named = {f"m{i}": budget for i, budget in enumerate(budgets)}
    return {n: MemberRecord(client_id=n, rank=4, budget=b, example_count=1) for n, b in named.items()}


@given(st.lists(st.floats(0, 1), max_size=200))
def test_tiers_are_budgets_few_and_no_member_encrypts_less_than_its_own(budgets):
    tiers = transitions.budgets(of_budgets(budgets))
    paying = [budget for budget in budgets if budget]
    assert len(tiers) <= transitions.MAX_PLAN_TIERS
    assert list(tiers) == sorted(set(tiers))
    assert set(tiers) <= set(paying)
    assert all(budget <= tiers[-1] for budget in paying)
    if len(set(paying)) <= transitions.MAX_PLAN_TIERS:
        assert set(tiers) == set(paying), "nobody encrypts more than it must"


def test_a_fleet_of_a_thousand_budgets_makes_few_tiers_and_pays_little_more():
    budgets = [(i + 1) / 1000 for i in range(1000)]
    tiers = transitions.budgets(of_budgets(budgets))
    assert len(tiers) == transitions.MAX_PLAN_TIERS
    assert (
        max(min(t for t in tiers if t >= budget) - budget for budget in budgets)
        < 1 / transitions.MAX_PLAN_TIERS
    )


def complete_with(rule, **fields):
    spec = federation().spec
    rounds = spec.round.model_copy(update={"rounds": 9, "stop": StopSpec.model_validate(rule)})
    protection = spec.protection.model_copy(update={"mode": "complete"})
    spec = spec.model_copy(update={"round": rounds, "protection": protection})
    return federation(spec=spec, ticket=ticket(), sequence=2, **fields)


def test_where_only_means_are_told_a_result_is_judged_by_the_sum_after_it():
    """The reports on result 2 have the means of result 1: when round 3 ends, round 1 is judged."""
    record, ended = complete_with({"metric": "accuracy", "patience": 1}), a_round(RoundState.PUBLISHED)
    told = [
        EvaluationRecord(
            client_id=name,
            example_count=0,
            correct_count=0,
            loss=0.0,
            download_s=0.0,
            decrypt_s=0.0,
            evaluate_s=0.0,
            download_bytes=0,
            means=Means(accuracy=0.8),
        )
        for name in "abc"
    ]
    third, fourth = (
        ended.model_copy(update={"round": replace(ended.round, number=number)}) for number in (3, 4)
    )
    after = transitions.settled(record, third, ("b", "a"), MEMBERS, 1, evaluations=told)
    assert (after.early_stopping.best, after.early_stopping.value, after.phase) == (1, 0.8, Phase.RUNNING)
    over = transitions.settled(
        after.model_copy(update={"ticket": ticket()}), fourth, ("b", "a"), MEMBERS, 1, evaluations=told
    )
    assert (over.early_stopping.judged, over.phase, over.converged) == (2, Phase.FINISHED, True)


def test_a_federation_from_before_there_were_figures_in_sums_goes_on_without():
    stored = json.loads(federation().model_dump_json())
    assert FederationRecord.read(json.dumps(stored)).spec.protection.figures == "means"
    del stored["spec"]["protection"]["figures"]
    assert FederationRecord.read(json.dumps(stored)).spec.protection.figures == "none"
