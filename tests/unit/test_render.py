"""What an operator sees of a federation."""

import pytest
from rich.console import Console

from shelora.cli.render import federation_view, federations_table
from shelora.dashboard.memory import PresenceHistory
from shelora.dashboard.model import federation_page
from shelora.federation import FederationSpec
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import (
    STATES,
    caution,
    early_stopping,
    figures_by_round,
    round_figures,
    size,
    status_line,
    training_rounds,
    who_knows_figures,
)


def federation() -> pb.Federation:
    spec = pb.FederationSpec(
        name="reuters",
        training=pb.TrainingSpec(base_model="all-MiniLM-L6-v2"),
        round=pb.RoundSpec(rounds=5, clients=2),
        protection=pb.ProtectionSpec(mode="selective"),
    )
    summary = pb.RoundSummary(
        kind=pb.ROUND_KIND_TRAIN,
        number=1,
        state=pb.ROUND_STATE_PUBLISHED,
        aggregate_wall_s=0.5,
        updates=[
            pb.UpdateReport(
                client_id="a", example_count=300, train_loss=1.0, train_s=10, upload_bytes=1_000_000
            ),
            pb.UpdateReport(
                client_id="b", example_count=100, train_loss=2.0, train_s=20, upload_bytes=3_000_000
            ),
        ],
        evaluations=[
            pb.EvaluationReport(client_id="a", example_count=90, correct_count=90, download_bytes=5_000_000),
            pb.EvaluationReport(client_id="b", example_count=10, correct_count=0, download_bytes=5_000_000),
        ],
    )
    member = pb.Member(
        client_id="thin-uplink", rank=16, budget=0.1, example_count=2162, stage="downloading", idle_ms=900
    )
    current = pb.RoundSummary(
        kind=pb.ROUND_KIND_TRAIN,
        number=2,
        attempt=2,
        state=pb.ROUND_STATE_COLLECTING,
        cohort_count=2,
        update_count=1,
        dropped=[
            pb.DroppedUpdate(
                client_id="b", reason="NORM_OUTLIER", why="the update has norm 99: lower lora.alpha"
            )
        ],
    )
    return pb.Federation(
        federation_id="reuters",
        spec=spec,
        phase=pb.PHASE_RUNNING,
        members=[member],
        member_count=1,
        trained_rounds=1,
        history=[pb.RoundSummary(kind=pb.ROUND_KIND_VOTE, state=pb.ROUND_STATE_PUBLISHED), summary],
        current=current,
    )


def shown(renderable) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123 - discarded
    console.print(renderable)
    console.file.close()
    return console.export_text()


def test_one_agent_cannot_claim_the_figures_of_all():
    """One report of 10^9 examples, all right, showed an accuracy of 100 %."""
    round_ = pb.RoundSummary()
    for name in "abc":
        round_.evaluations.add(client_id=name, example_count=100, correct_count=50, decrypt_s=1)
    round_.evaluations.add(client_id="d", example_count=10**9, correct_count=10**9, decrypt_s=10**7)
    figures = round_figures(round_)
    assert figures.test_accuracy == (3 * 50 + 200) / 500
    assert figures.test_examples == 500
    assert figures.decrypt_s == 1


def test_figures_are_medians_and_accuracy_is_that_of_all_test_examples():
    figures = round_figures(training_rounds(federation())[0])
    assert figures.train_loss == 1.0
    assert figures.test_accuracy == 0.9
    assert figures.upload_bytes == 2_000_000
    assert figures.train_s == 15


def told_means():
    """Two rounds of `complete`: the reports on the second result have what its sum held."""
    said = pb.Federation(federation_id="f", phase=pb.PHASE_FINISHED, trained_rounds=2)
    said.spec.protection.mode, said.spec.protection.figures = "complete", "means"
    for number in (1, 2):
        summary = said.history.add(number=number, kind=pb.ROUND_KIND_TRAIN, state=pb.ROUND_STATE_PUBLISHED)
        for name in "abc":
            summary.updates.add(client_id=name, upload_bytes=1000)
            report = summary.evaluations.add(client_id=name, decrypt_s=1, download_bytes=1000)
            report.means.train_loss = 1 / number
            if number == 2:
                report.means.accuracy = 0.75
    return said


def test_how_good_a_result_is_the_next_rounds_sum_tells():
    said = told_means()
    first, last = figures_by_round(training_rounds(said))
    assert (first.train_loss, first.test_accuracy, first.test_examples) == (1.0, 0.75, 0)
    assert (last.train_loss, last.test_accuracy) == (0.5, None)
    words = " ".join(shown(federation_view(said)).split())
    assert "75.0%" in words
    assert "of the last one each agent knows its own figures" in words
    said.history[1].evaluations[0].means.accuracy = 0.0
    assert figures_by_round(training_rounds(said))[0].test_accuracy == 0.75, "one report counts for nothing"


@pytest.mark.parametrize(
    ("mode", "figures", "words"),
    [
        ("selective", "means", ""),
        ("complete", "none", "protection.figures is none"),
        ("complete", "means", "means"),
    ],
)
def test_an_operator_reads_who_knows_accuracies(mode, figures, words):
    said = told_means().spec
    said.protection.mode, said.protection.figures = mode, figures
    assert words in who_knows_figures(said)
    assert bool(who_knows_figures(said)) == bool(words)
    said.round.stop.patience = 3
    assert ("never ends it" in caution(said)) == (figures == "none")
    said.protection.client_privacy.epsilon = 8
    assert mode == "selective" or "client privacy" in who_knows_figures(said)


def test_votes_are_not_training_rounds():
    assert [r.number for r in training_rounds(federation())] == [1]


def test_a_spoiled_round_is_named_and_its_figures_do_not_count():
    spoiled = federation()
    spoiled.history.add(
        kind=pb.ROUND_KIND_TRAIN, number=2, attempt=1, state=pb.ROUND_STATE_ABANDONED, reason="SUM_UNREADABLE"
    )
    assert training_rounds(spoiled) == []
    assert "taken back, as most agents objected or could not open them: round 1" in shown(
        federation_view(spoiled)
    )
    spoiled.sits_out = "ward-7"
    assert "ward-7 sits out: its update was in every result" in shown(federation_view(spoiled))
    spoiled.history.add(kind=pb.ROUND_KIND_TRAIN, number=1, attempt=2, state=pb.ROUND_STATE_PUBLISHED)
    assert [(r.number, r.attempt) for r in training_rounds(spoiled)] == [(1, 2)]
    assert "taken back" not in shown(federation_view(federation()))


def test_a_running_federation_fits_a_terminal_of_80_columns_without_cutting_words():
    text = shown(federation_view(federation()))
    for words in (
        "round 2 of 5 (attempt 2): collecting updates, 1 of 2 updates",
        "thin-uplink",
        "downloading",
        "90.0%",
    ):
        assert words in text
    assert "…" not in text


def test_a_failed_federation_shows_why():
    failed = federation()
    failed.phase, failed.failure = pb.PHASE_FAILED, "too few updates three times"
    assert "too few updates three times" in shown(federation_view(failed))


def test_the_epsilon_that_a_federation_promises_is_shown_with_it():
    promising = federation()
    assert "epsilon" not in shown(federation_view(promising))
    spec = FederationSpec.model_validate(
        {
            "name": "reuters",
            "training": {"base_model": "all-MiniLM-L6-v2", "labels": ["a", "b"]},
            "round": {"rounds": 5, "clients": 5, "min_updates": 4},
            "protection": {
                "mode": "complete",
                "client_privacy": {"epsilon": 8, "delta": 1e-5, "clip": 1, "tolerated": 1},
            },
        }
    )
    promising.spec.CopyFrom(spec.to_proto())
    words = " ".join(shown(federation_view(promising)).split())
    assert f"epsilon {spec.protection.client_privacy.promised:.3g} at delta 1e-05" in words
    assert "over at most 5 sums" in words


def test_every_state_of_a_round_has_words():
    for state in pb.RoundState.values():
        assert state == pb.ROUND_STATE_UNSPECIFIED or STATES[state]


def test_the_list_has_a_line_for_each_federation():
    assert "1 of 5" in shown(federations_table([federation()]))


def test_sizes_are_decimal():
    assert [size(n) for n in (999, 1_500, 2_000_000, 3e9)] == ["999 B", "1.5 kB", "2.0 MB", "3.0 GB"]


def test_updates_that_were_dropped_are_named_with_their_reason_and_counted():
    text = shown(federation_view(federation()))
    assert "2, attempt 2 b     NORM_OUTLIER the update has norm 99: lower lora.alpha" in text
    assert ", 1 refused" in " ".join(shown(federations_table([federation()])).split())


def test_who_objects_to_a_result_is_named_with_its_words():
    told = federation()
    told.current.objections.add(client_id="thin-uplink", why="the loss is 3.1, before it 0.9")
    text = " ".join(shown(federation_view(told)).split())
    assert "2, attempt 2 thin-uplink objects to the result the loss is 3.1, before it 0.9" in text


def test_what_keeps_members_from_their_work_is_named_with_how_long_they_are_silent():
    told = federation()
    told.members.add(client_id="hospital", reason="DATA_INVALID", why="train.jsonl, row 3: no label")
    told.members.add(client_id="bank", idle_ms=600_000)
    told.members.add(client_id="lab", idle_ms=3 * 3_600_000)
    told.members.add(client_id="never", idle_ms=2**63 - 1)
    told.members.add(client_id="twin", copy_refused_unix_ms=1_700_000_000_000)
    told.applicants.add(client_id="clinic", reason="PROTECTION_REFUSED", why="the federation offers none")
    text = " ".join(shown(federation_view(told)).split())
    for words in (
        "hospital DATA_INVALID train.jsonl, row 3: no label",
        "bank silent nothing was heard of it for 10 min",
        "lab silent nothing was heard of it for 3 h",
        "never silent nothing was heard of it lately",
        "twin CLIENT_REPLACED two processes have this identity",
        "2023-11-14 22:13 UTC",
        "clinic PROTECTION_REFUSED it did not join: the federation offers none",
    ):
        assert words in text
    assert "thin-uplink silent" not in text


def test_a_stopped_federation_says_after_how_many_rounds():
    stopped = federation()
    stopped.stopped = True
    assert "stopping after 1 rounds" in shown(federation_view(stopped))
    stopped.phase = pb.PHASE_FINISHED
    assert "stopped after 1 rounds" in shown(federations_table([stopped]))
    stopped.deleting = True
    assert "being deleted" in shown(federation_view(stopped))


def test_a_federation_that_is_over_says_how_many_rounds_were_done():
    over = federation()
    over.phase, over.trained_rounds = pb.PHASE_FINISHED, 5
    assert status_line(over).endswith("5 of 5 training rounds done")
    over.phase, over.trained_rounds = pb.PHASE_FAILED, 2
    assert status_line(over).endswith("2 of 5 training rounds done")


def test_one_local_step_is_warned_of_where_servers_see_factors():
    said = federation()
    for mode, steps, warned in (
        ("selective", 1, True),
        ("none", 1, True),
        ("selective", 2, False),
        ("complete", 1, False),
    ):
        said.spec.protection.mode, said.spec.training.local_steps = mode, steps
        console = Console(width=400, record=True)
        console.print(federation_view(said))
        assert ("local_steps is 1, and under" in console.export_text()) is warned
        assert bool(federation_page(said, PresenceHistory(), 0.0).caution) is warned


def test_the_best_round_is_named_while_a_rule_may_end_the_federation():
    shown = federation()
    shown.spec.round.stop.metric, shown.spec.round.stop.patience = "accuracy", 3
    shown.spec.round.stop.threshold = 0.005
    assert early_stopping(shown) == ""
    shown.early_stopping.best_round, shown.early_stopping.best, shown.early_stopping.judged_round = (
        4,
        0.852,
        6,
    )
    words = (
        "best round: 4, accuracy 85.2%, the median over agents, of 6 judged; 3 in a row that are not better by more "
        "than 0.005 end it"
    )
    assert early_stopping(shown) == words
    assert federation_page(shown, PresenceHistory(), 0).early_stopping == words
    shown.phase, shown.early_stopping.ended, shown.trained_rounds = pb.PHASE_FINISHED, True, 7
    assert status_line(shown).endswith(
        "ended by its rule after 7 rounds: 3 in a row were not better than round 4"
    )
    shown.spec.round.stop.metric = "loss"
    assert early_stopping(shown) == "best round: 4, loss 0.8520, the median over agents"
