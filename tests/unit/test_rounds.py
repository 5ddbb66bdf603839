import itertools
from collections import Counter
from dataclasses import replace

import pytest

from shelora.errors import DomainError, Reason
from shelora.rounds import (
    COMMITTEE_TRANSITIONS,
    ENDED,
    TRANSITIONS,
    Event,
    Round,
    RoundKind,
    RoundState,
    Turnout,
    grace_ends_ms,
    longest_s,
    select_cohort,
    should_close,
)

COLLECTING = Round(
    round_id="r",
    kind=RoundKind.TRAIN,
    number=1,
    attempt=1,
    min_updates=2,
    deadline_s=10,
    cohort=("a", "b", "c"),
    state=RoundState.COLLECTING,
    opened_ms=5_000,
)

LEGAL = {
    ("SELECTING", "OPEN", "COLLECTING"),
    ("COLLECTING", "CLOSE", "AGGREGATING"),
    ("AGGREGATING", "PUBLISH", "PUBLISHED"),
    ("SELECTING", "ABANDON", "ABANDONED"),
    ("COLLECTING", "ABANDON", "ABANDONED"),
    ("AGGREGATING", "ABANDON", "ABANDONED"),
}


LEGAL_WITH_COMMITTEE = {
    ("SELECTING", "OPEN", "KEYING"),
    ("KEYING", "SEAT", "COLLECTING"),
    ("COLLECTING", "CLOSE", "CERTIFYING"),
    ("CERTIFYING", "CERTIFY", "AGGREGATING"),
    ("AGGREGATING", "PUBLISH", "PUBLISHED"),
    ("SELECTING", "ABANDON", "ABANDONED"),
    ("KEYING", "ABANDON", "ABANDONED"),
    ("COLLECTING", "ABANDON", "ABANDONED"),
    ("CERTIFYING", "ABANDON", "ABANDONED"),
    ("AGGREGATING", "ABANDON", "ABANDONED"),
}


def in_state(state: RoundState, draw: int = 0) -> Round:
    return Round(
        round_id="r",
        kind=RoundKind.VOTE,
        number=0,
        attempt=1,
        min_updates=2,
        deadline_s=10,
        cohort=("a", "b"),
        draw=draw,
        state=state,
        opened_ms=1,
    )


@pytest.mark.parametrize(("draw", "legal"), [(0, LEGAL), (1, LEGAL_WITH_COMMITTEE)])
@pytest.mark.parametrize(("state", "event"), list(itertools.product(RoundState, Event)))
def test_every_state_and_event_either_follows_the_table_or_is_refused(state, event, draw, legal):
    reason = Reason.TOO_FEW_UPDATES if event is Event.ABANDON else None
    targets = [target for origin, name, target in legal if (origin, name) == (state, event)]
    if not targets:
        with pytest.raises(DomainError) as refused:
            in_state(state, draw).advance(event, 99, reason)
        assert refused.value.reason is Reason.INVALID_TRANSITION
        return
    after = in_state(state, draw).advance(event, 99, reason)
    assert [after.state] == targets
    assert after.reason is reason
    assert after.ended == (after.state in ENDED)
    assert after.ended_ms == (99 if after.ended else 0)


def test_the_table_holds_exactly_the_legal_steps():
    assert {(state, event, target) for (state, event), target in TRANSITIONS.items()} == LEGAL
    steps = {(state, event, target) for (state, event), target in COMMITTEE_TRANSITIONS.items()}
    assert steps == LEGAL_WITH_COMMITTEE


def test_a_draw_is_spent_from_the_close_on_and_stays_so():
    round_ = in_state(RoundState.SELECTING, draw=3)
    for event in (Event.OPEN, Event.SEAT):
        round_ = round_.advance(event, 2)
    assert not round_.spent
    assert not round_.advance(Event.ABANDON, 3, Reason.TOO_FEW_UPDATES).spent
    closed = round_.advance(Event.CLOSE, 3)
    assert closed.spent
    assert closed.advance(Event.ABANDON, 4, Reason.QUORUM_MISSING).spent
    assert not replace(closed, draw=0).spent, "without a committee nothing is"


def test_opening_starts_the_clock_and_later_events_keep_it():
    opened = in_state(RoundState.SELECTING).advance(Event.OPEN, 7_000)
    assert (opened.opened_ms, opened.deadline_ms) == (7_000, 17_000)
    assert opened.advance(Event.CLOSE, 9_000).opened_ms == 7_000


@pytest.mark.parametrize("event", [Event.OPEN, Event.ABANDON])
def test_a_reason_belongs_to_abandonment_and_only_to_it(event):
    reason = None if event is Event.ABANDON else Reason.TOO_FEW_UPDATES
    with pytest.raises(DomainError, match="abandoned for a reason"):
        in_state(RoundState.SELECTING).advance(event, 1, reason)


@pytest.mark.parametrize(
    ("updates", "now_ms", "expected"),
    [
        (0, 14_999, None),
        (2, 14_999, None),
        (3, 5_001, Event.CLOSE),
        (3, 15_000, Event.CLOSE),
        (2, 15_000, Event.CLOSE),
        (1, 15_000, Event.ABANDON),
        (0, 15_000, Event.ABANDON),
    ],
)
def test_a_round_closes_when_all_committed_or_at_its_deadline(updates, now_ms, expected):
    assert should_close(COLLECTING, Turnout(updates), now_ms) is expected


@pytest.mark.parametrize(
    ("updates", "sending", "now_ms", "expected"),
    [
        (1, 1, 15_000, None),
        (1, 1, 34_999, None),
        (1, 1, 35_000, Event.ABANDON),
        (1, 0, 15_000, Event.ABANDON),
        (0, 1, 15_000, Event.ABANDON),
        (2, 1, 15_000, Event.CLOSE),
    ],
)
def test_a_late_round_waits_for_updates_that_it_needs_and_that_are_on_their_way(
    updates, sending, now_ms, expected
):
    turnout = Turnout(updates, sending=sending)
    assert should_close(COLLECTING, turnout, now_ms, grace=2.0) is expected


def test_a_round_collects_for_a_week_at_most():
    assert longest_s(3600, 3.0) == 4 * 3600
    assert longest_s(3600, 0.0) == 3600
    assert longest_s(3 * 86_400, 3.0) == longest_s(7 * 86_400, 3.0) == 7 * 86_400


@pytest.mark.parametrize(
    ("target", "updates", "expected"),
    [(2, 1, None), (2, 2, Event.CLOSE), (2, 3, Event.CLOSE), (5, 2, None), (5, 3, Event.CLOSE)],
)
def test_a_round_closes_at_its_target_or_when_all_it_asked_have_answered(target, updates, expected):
    assert should_close(replace(COLLECTING, target_updates=target), Turnout(updates), 5_001) is expected


def test_every_round_asks_other_clients_the_same_on_every_replica_and_all_as_often():
    clients = [f"client-{number}" for number in range(20)]
    asked = Counter()
    for number in range(400):
        cohort = select_cohort(f"fed.1.{number}", clients, 5)
        assert cohort == select_cohort(f"fed.1.{number}", reversed(clients), 5)
        assert len(set(cohort)) == 5
        assert list(cohort) == sorted(cohort)
        asked.update(cohort)
    assert set(asked) == set(clients)
    assert all(60 <= count <= 140 for count in asked.values())  # 100 each, and chance


def test_without_a_limit_or_with_one_that_is_large_every_client_is_asked():
    assert select_cohort("r", {"b", "a"}, 0) == select_cohort("r", {"b", "a"}, 9) == ("a", "b")


@pytest.mark.parametrize("state", sorted(set(RoundState) - {RoundState.COLLECTING}))
def test_only_a_collecting_round_is_due_for_anything(state):
    assert should_close(in_state(state), Turnout(5), 10**15) is None


@pytest.mark.parametrize(
    ("updates", "absent", "unawaited", "expected"),
    [
        (2, 0, 0, None),
        (2, 1, 0, Event.CLOSE),
        (2, 0, 1, Event.CLOSE),
        (1, 1, 0, None),
        (1, 0, 2, None),
        (1, 2, 0, Event.ABANDON),
        (0, 2, 0, Event.ABANDON),
        (0, 3, 0, Event.ABANDON),
    ],
)
def test_nobody_waits_for_those_who_cannot_come_and_too_few_end_it_at_once(
    updates, absent, unawaited, expected
):
    assert should_close(COLLECTING, Turnout(updates, absent=absent, unawaited=unawaited), 5_001) is expected


def test_a_round_that_most_have_committed_to_waits_for_the_rest_in_proportion():
    wide = replace(COLLECTING, deadline_s=100_000)
    assert grace_ends_ms(wide, 5_000 + 100_000, 2.0) == 5_000 + 300_000
    assert grace_ends_ms(wide, 6_000, 2.0) == 6_000 + 60_000, "a minute at least"
    assert grace_ends_ms(wide, 0, 2.0) is None
    assert grace_ends_ms(wide, 105_000, 0) is None
    assert should_close(wide, Turnout(2), 65_999, 66_000) is None
    assert should_close(wide, Turnout(2), 66_000, 66_000) is Event.CLOSE
    assert should_close(wide, Turnout(1), 66_000, 66_000) is None, "not with fewer than a result needs"
    assert should_close(COLLECTING, Turnout(2), 15_000, 66_000) is Event.CLOSE, "nor beyond the deadline"
