"""Which committed updates go into an aggregate: `shelora.lora.screening` under a federation's rules, with the words."""

import sys
from collections.abc import Sequence

from coordinator.records import Commit, Dropped, Member, Update
from shelora.errors import DomainError, Reason
from shelora.federation import ScreeningSpec
from shelora.lora.screening import largest_believed

_SMALLER = "lower learning_rate, lora.alpha or local_steps, or look for broken examples in the data"


def require_believable(rules: ScreeningSpec, update: Update, member: Member | None) -> None:
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
