"""The coordinator's metrics; every series exists, at zero, from the start, but those of a federation."""

from typing import Final

from shelora.errors import Reason
from shelora.rounds import RoundKind, RoundState
from shelora.telemetry.metrics import at_zero, counter, gauge, histogram

TRANSACTIONS: Final = (
    "abandon_round",
    "ask_deletion",
    "ask_rotation",
    "ask_stop",
    "begin_round",
    "cancel_ticket",
    "close_round",
    "create_federation",
    "create_round",
    "drop_contributor",
    "drop_plan",
    "end_by_rule",
    "end_negotiation",
    "end_stopped",
    "extend_federation",
    "fail_federation",
    "fix_model",
    "give_up_lead",
    "name_leader",
    "note_majority",
    "note_split",
    "open_keys",
    "open_round",
    "publish_plan",
    "publish_round",
    "retire_epochs",
    "revoke_clients",
    "settle_round",
    "start_federation",
    "sweep_garbage",
)
"""Names of all transactions."""

TRANSACTION_TOTAL: Final = counter(
    "transactions_total",
    "Attempts at a change of state; a conflict is one that another writer overtook.",
    {"name": TRANSACTIONS, "outcome": ("written", "unchanged", "conflict")},
)

ROUNDS_TOTAL: Final = counter(
    "rounds_total",
    "Rounds that ended; the reason is that of an abandoned round.",
    {"kind": [], "state": [], "reason": []},
)
at_zero(ROUNDS_TOTAL, {"kind": list(RoundKind), "state": [RoundState.PUBLISHED], "reason": [""]})
at_zero(ROUNDS_TOTAL, {"kind": list(RoundKind), "state": [RoundState.ABANDONED], "reason": list(Reason)})

UPDATES_TOTAL: Final = counter(
    "updates_total",
    "Updates offered for a commit.",
    {"outcome": ("committed", "repeated", "rewritten", "late", "refused")},
)

REFUSALS_TOTAL: Final = counter(
    "update_refusals_total",
    "Updates that were refused at their commit or left out of an aggregate, by reason.",
    {"reason": list(Reason)},
)

MEMBERS: Final = gauge(
    "members_count",
    "Members of the federations that this replica drives, by whether they were heard of lately.",
    {"state": ("alive", "silent")},
)

KEY_EPOCH: Final = gauge(
    "key_epoch_count", "Newest epoch of keys among the federations that this replica drives."
)

STAGE_BUCKETS_S: Final = (
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0),
    *(3600.0, 7200.0, 14_400.0, 43_200.0, 86_400.0, 604_800.0),
)
"""From a vote of few agents to the longest deadline, a week. Quantiles are no finer than these steps."""

STAGE_SECONDS: Final = histogram(
    "round_stage_duration_seconds",
    "Wall time of a round's stages.",
    {"kind": list(RoundKind), "stage": ("collecting", "aggregating")},
    buckets=STAGE_BUCKETS_S,
)

TRAIN_LOSS: Final = gauge(
    "train_loss_nats",
    "Training loss of the newest training round: median over updates; of the one before it where only means are told "
    "(complete). Told while a federation is driven here, and after its end.",
    {"federation": []},
)

TEST_ACCURACY: Final = gauge(
    "test_accuracy_ratio",
    "Mean test accuracy, where agents tell no figures of their own (complete): of the newest result that it is known "
    "of. Told while a federation is driven here, and after its end.",
    {"federation": []},
)

TESTED: Final = counter(
    "tested_examples_total",
    "Test examples that agents evaluated after they applied a result, by whether the prediction was right.",
    {"federation": [], "prediction": []},
)

REDIS_USED: Final = gauge("redis_used_bytes", "Memory that Redis uses; 0 while it does not say.")
REDIS_LIMIT: Final = gauge("redis_limit_bytes", "Memory that Redis may use, its maxmemory; 0 for any.")


def tell_fullness(used: int, limit: int) -> None:
    """Sets the gauges of Redis; bytes."""
    REDIS_USED.set(used)
    REDIS_LIMIT.set(limit)


def await_evaluations(federation_id: str) -> None:
    """Makes the counter of a federation's evaluations exist, so that the first one is seen to increase it."""
    at_zero(TESTED, {"federation": [federation_id], "prediction": ("right", "wrong")})


def tell_means(federation_id: str, *, train_loss: float | None, accuracy: float | None) -> None:
    """Sets the gauges to what is known."""
    if train_loss is not None:
        TRAIN_LOSS.labels(federation_id).set(train_loss)
    if accuracy is not None:
        TEST_ACCURACY.labels(federation_id).set(accuracy)


def forget_means(federation_id: str) -> None:
    """Takes the gauges of a federation away that is not driven here any more."""
    for told in (TRAIN_LOSS, TEST_ACCURACY):
        told.remove(federation_id)


MOST_TESTED: Final = 10_000
"""Test examples of one report that count: a billion claimed would hide all others'."""


def tell_evaluation(federation_id: str, right: int, wrong: int) -> None:
    """Counts the test examples of one agent, of a test of more than MOST_TESTED as many at the same share."""
    share = min(1.0, MOST_TESTED / max(1, right + wrong))
    TESTED.labels(federation_id, "right").inc(share * right)
    TESTED.labels(federation_id, "wrong").inc(share * wrong)
