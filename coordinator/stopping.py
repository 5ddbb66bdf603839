"""Whether a federation has trained long enough, by its operator's rule (`round.stop`). Pure.

A round is judged by the median over its clients, each counting alike: one that lies moves it no farther than to the
next honest value, so that nobody ends a federation, or keeps it from its end, alone.

Where clients tell nothing of their own, each reports the mean that a later sum held. The median then guards against
who reports another mean, and not against a contributor that puts lies into the sum: one can move the mean anywhere.
"""

from collections.abc import Sequence
from statistics import median

from coordinator.records import EarlyStopping, EvaluationRecord
from shelora.federation import StopSpec


def value_of(
    rule: StopSpec, evaluations: Sequence[EvaluationRecord], least: int, *, of_means: bool = False
) -> float | None:
    """What a round is judged by: accuracy, 0 to 1, or loss in nats. None if fewer than `least` clients say it.

    Args: of_means: Judges by the means in the sum of a result: they are of the result before it.
    """
    by = _mean if of_means else _own
    told = [value for one in evaluations if (value := by(rule, one)) is not None]
    return None if len(told) < max(1, least) else median(told)


def _own(rule: StopSpec, one: EvaluationRecord) -> float | None:
    if not one.example_count:
        return None
    return one.correct_count / one.example_count if rule.metric == "accuracy" else one.loss


def _mean(rule: StopSpec, one: EvaluationRecord) -> float | None:
    if one.means is None:
        return None
    return one.means.accuracy if rule.metric == "accuracy" else one.means.loss


def judged(
    rule: StopSpec, seen: EarlyStopping | None, number: int, value: float | None
) -> EarlyStopping | None:
    """What the rule has seen after the round of that number. It judges a round once, and not without a value."""
    if value is None or (seen is not None and number <= seen.judged):
        return seen
    if seen is None or rule.gain(value, seen.value) > rule.threshold:
        return EarlyStopping(best=number, value=value, judged=number)
    return seen.model_copy(update={"judged": number, "waited": seen.waited + 1})


def is_over(rule: StopSpec, seen: EarlyStopping | None) -> bool:
    """Whether the best round has stayed the best for as long as the rule waits."""
    return seen is not None and seen.waited >= rule.patience
