from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from coordinator import transitions
from coordinator.decisions import (
    OpenKeys,
    Rest,
    RetireEpochs,
    View,
    WriteFederation,
    WriteRound,
    decide,
    median_overlap,
    median_train_loss,
    most_weight,
)
from coordinator.records import Commit, Phase, Report, UpdateRecord
from shelora.committee.certificate import MOST_OVER_MEAN
from shelora.errors import Reason
from shelora.federation import ProtectionSpec
from shelora.rounds import RoundKind, RoundState
from tests.unit.coordinator.records import MEMBERS, PLAN, a_round, federation, ticket

NOW = 20_000


def view(record, round_=None, alive=None, **changes) -> View:
    alive = set(MEMBERS) if alive is None else alive
    return View(
        federation=record, round=round_, members=MEMBERS, alive=alive, update_count=0, voters=[], **changes
    )


def running(**changes):
    return federation(**{"phase": Phase.RUNNING, "key_id": "ab" * 16, "plan": PLAN, "sequence": 3, **changes})


def test_keys_are_opened_for_the_first_epoch_and_then_for_the_next_one():
    assert decide(view(running(key_id="", plan=None)), NOW) == OpenKeys(1)
    assert decide(view(running(rotate_from=1)), NOW) == OpenKeys(2)
    assert decide(view(running(epoch=2, rotate_from=1)), NOW) != OpenKeys(3)


def test_a_rotation_waits_for_the_round_in_progress():
    waiting = running(rotate_from=1, ticket=ticket(RoundKind.TRAIN, plan=PLAN))
    collecting = a_round(RoundState.COLLECTING)
    assert isinstance(decide(view(waiting, collecting), NOW), Rest)
    assert decide(view(waiting), NOW) == WriteFederation("cancel_ticket", transitions.cancelled(waiting))


def test_a_revocation_comes_before_everything_else():
    decision = decide(view(running(rotate_from=1), revoked={"a": NOW}), NOW)
    assert isinstance(decision, WriteFederation)
    assert (decision.name, decision.record.revoked) == ("revoke_clients", {"a": NOW})
    assert decision.record.rotate_from == 1
    assert not isinstance(decide(view(decision.record, revoked={"a": NOW}), NOW), WriteFederation), (
        "it is taken in once"
    )


def test_a_round_that_can_still_succeed_drops_the_revoked_and_another_is_abandoned():
    record = running(revoked={"a": NOW}, ticket=ticket(RoundKind.TRAIN, plan=PLAN))
    collecting = a_round(RoundState.COLLECTING)
    decision = decide(view(record, collecting), NOW)
    assert isinstance(decision, WriteRound)
    assert decision.record.dropped_ids == {"a"}
    both = record.model_copy(update={"revoked": dict.fromkeys(collecting.round.cohort, NOW)})
    abandoned = decide(view(both, collecting), NOW)
    assert abandoned.record.round.reason is Reason.CERTIFICATE_REVOKED


def test_epochs_are_retired_when_nothing_else_is_to_do_and_no_result_needs_them():
    idle = view(running(epoch=3, result_epoch=2, result_sequence=3), alive=set())
    assert decide(idle, NOW) == RetireEpochs(2)
    done = view(running(epoch=3, result_epoch=2, result_sequence=3, retired_before=2), alive=set())
    assert isinstance(decide(done, NOW), Rest)


def commit(examples, loss, overlap=None) -> Commit:
    report = Report(
        example_count=examples,
        train_loss=loss,
        train_s=1,
        encrypt_s=1,
        upload_s=1,
        upload_bytes=1,
        overlap=overlap,
    )
    update = UpdateRecord(client_id="a", layout_digest="", shards=(), rank=1, scaling=1, report=report)
    return Commit(ordinal=1, update=update)


def test_one_that_lies_about_its_loss_or_overlap_moves_no_figure_and_forces_no_vote():
    honest = [commit(30, loss) for loss in (1.0, 1.1, 1.2)]
    assert median_train_loss([*honest, commit(10**9, 1.7e308)]) == 1.1
    assert median_train_loss([commit(10**9, 1.7e308)] * 2) == 1.7e308
    agreed = [commit(30, 1.0, overlap) for overlap in (0.9, 0.95, 1.0)]
    assert median_overlap([*agreed, commit(30, 1.0, 0.0)]) == 0.95
    assert median_overlap([commit(30, 1.0, 0.95), commit(30, 1.0, 0.0)]) == 0.95
    assert median_overlap([commit(30, 1.0, overlap) for overlap in (0.1, 0.2, 0.95)]) == 0.2  # most say so
    assert median_overlap(honest) is None


def test_a_stop_leaves_no_keys_that_nobody_knows_of():
    """They are made before they are noted, and the stop may come in between."""
    due = running(stopped=True, rotate_from=1, result_sequence=2, result_epoch=1)
    assert decide(view(due), NOW) == OpenKeys(2)
    early = running(stopped=True, key_id="", plan=None)
    ended = decide(view(early), NOW)
    assert ended == WriteFederation("end_stopped", transitions.stopped_now(early))
    assert decide(view(ended.record), NOW) == RetireEpochs(2)


@given(claims=st.lists(st.one_of(st.integers(1, 10), st.integers(1, 10**9)), min_size=2, max_size=40))
def test_members_certify_every_cohort_that_comes_whole_whatever_it_claims(claims):
    most = most_weight(claims, federation())
    weights = [min(claim, most) for claim in claims]
    assert most * len(weights) <= (MOST_OVER_MEAN - 1) * sum(weights)


def test_a_round_for_those_that_are_waited_for_has_their_scale():
    """Else members would refuse every set of theirs, round after round."""
    members = {n: MEMBERS["a"].model_copy(update={"client_id": n, "example_count": 10}) for n in "abc"}
    members |= {n: MEMBERS["a"].model_copy(update={"client_id": n, "example_count": 1000}) for n in "defgh"}
    spec = federation().spec
    spec = spec.model_copy(update={"protection": ProtectionSpec(mode="complete")})
    record = running(spec=spec, plan=None, ticket=ticket(RoundKind.TRAIN))
    everyone = replace(view(record, alive=set(members)), members=members)
    assert decide(everyone, NOW).record.most_weight == 1000
    waited_for = replace(everyone, laggards=frozenset("defgh"))
    assert decide(waited_for, NOW).record.most_weight == 10
    nobody = replace(everyone, laggards=frozenset(members))
    assert decide(nobody, NOW).record.most_weight == 1000
