"""Which committed updates go into an aggregate: `shelora.lora.screening` under a federation's rules, with the words."""

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Final

from coordinator.records import BaseModelTags, Commit, Dropped, MemberRecord, UpdateRecord
from shelora.errors import DomainError, Reason
from shelora.federation import ScreeningSpec
from shelora.lora.screening import largest_believed

_SMALLER = "lower learning_rate, lora.alpha or local_steps, or look for broken examples in the data"

_PARTS: Final = {
    "weights": "weights",
    "tokenizer": "tokens",
    "chat_template": "chat templates",
    "start": "starting values (model.adapter, model.head)",
}


def require_believable(rules: ScreeningSpec, update: UpdateRecord, member: MemberRecord | None) -> None:
    """Refuses an update of a training round by what it says and measures.

    Raises: EXAMPLES_MISMATCH, NORM_TOO_LARGE, with both numbers and the remedy.
    """
    claimed, joined = update.report.example_count, member.example_count if member else 0
    if claimed != joined:
        raise DomainError(
            Reason.EXAMPLES_MISMATCH,
            f"the update claims {claimed} examples, the client joined with {joined}: restart the agent, which joins "
            "with the data it has now",
        )
    most = rules.max_update_norm or sys.float_info.max
    if not update.norm <= most:  # NaN is not
        raise DomainError(
            Reason.NORM_TOO_LARGE,
            f"the update has norm {update.norm:.3g}, the federation accepts {most:.3g} (screening.max_update_norm): "
            + _SMALLER,
        )


def misfits(commits: Sequence[Commit]) -> tuple[Dropped, ...]:
    """The updates of a closed round whose clients have another base model than most, in order of their clients.

    Agents that say nothing of it are believed. If no model is more frequent than every other, nobody can tell whose is
    right: all that say something are left out.
    """
    tags = {c.update.client_id: c.update.report.base_model for c in commits if c.update.report.base_model}
    counts = Counter(tags.values()).most_common(2)
    if len(counts) < 2:
        return ()
    (usual, most), (_, next_most) = counts
    right = usual if most > next_most else None
    return tuple(
        Dropped(client_id=client_id, reason=Reason.MODEL_MISMATCH, why=_difference(own, right, tags.values()))
        for client_id, own in sorted(tags.items())
        if own != right
    )


def _difference(own: BaseModelTags, right: BaseModelTags | None, everyone: Collection[BaseModelTags]) -> str:
    others = [right] if right else everyone
    differing = [
        words for part, words in _PARTS.items() if any(getattr(own, part) != getattr(o, part) for o in others)
    ]
    whose = (
        "those of most agents"
        if right
        else "those of other agents, and no model is more frequent than another"
    )
    return (
        f"this agent's base model has other {' and '.join(differing)} than {whose}: take the model.path "
        "and model.adapter that the operator names, the same files at every agent"
    )


def outliers(rules: ScreeningSpec, commits: Sequence[Commit]) -> tuple[Dropped, ...]:
    """The updates of a closed training round that are too large beside the others, in order of their clients."""
    norms = {commit.update.client_id: commit.update.norm for commit in commits}
    most = largest_believed(norms, rules.max_norm_ratio)
    why = (
        "the update has norm {norm:.3g}, above {most:.3g}, {ratio:g} times the median of its round: {remedy}"
    )
    return tuple(
        Dropped(
            client_id=client_id,
            reason=Reason.NORM_OUTLIER,
            why=why.format(norm=norm, most=most, ratio=rules.max_norm_ratio, remedy=_SMALLER),
        )
        for client_id, norm in sorted(norms.items())
        if norm > most
    )
