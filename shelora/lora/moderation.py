"""How far one round may move the model where servers see no norm: every agent bounds a decrypted sum by what it knows.

Under additive encryption an update of any size looks like every other, so no server can leave it out. An agent knows
of honest changes how far it moved itself and how far the last rounds moved the model, and that a mean is no longer than
its longest summand. Of the change of a matrix or tensor it takes over at most, in Frobenius norm,

    limit = MULTIPLE * max(own change, changes of the last REMEMBERED rounds)

and cuts what is longer to that length, in its direction. A round is remembered with at most SPREAD times the own change
of that round: else an attacker would raise the limit by MULTIPLE every round. One member can thus pull the model by
at most MULTIPLE * SPREAD own steps a round, and not throw it away in one; it can still pull, every round, in a
direction of its own. Agents may cut differently, as their own changes differ: the next round's mean brings them
together again, as every agent sends all of its model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shelora.errors import DomainError, Reason

MULTIPLE: Final = 4.0
"""How many times longer than the longest known honest change a change may be."""
SPREAD: Final = 2.0
"""Honest clients' changes differ by a factor of about 2 with alpha, rank and data (docs/protocol.md, "Screening")."""
REMEMBERED: Final = 3
"""Rounds whose changes count."""


@dataclass(frozen=True, slots=True)
class Moderated:
    """How much of a change is taken over."""

    factor: float
    """1, or less if the change was too long."""
    accepted: float
    """Norm of what is taken over, to be remembered."""

    @property
    def cut(self) -> bool:
        """Whether the change was too long."""
        return self.factor < 1


def moderated(change: float, own: float, last: Sequence[float]) -> Moderated:
    """The part of a change to take over.

    Args:
        change: Norm of what the sum would change.
        own: Norm of what this client's own update would have changed; 0 if it sent none.
        last: What `remembered` kept of the last rounds, oldest first.

    Raises: VALUE_NOT_FINITE: a norm is not a finite number.
    """
    known = (change, own, *last)
    if not all(0 <= norm < float("inf") for norm in known):
        raise DomainError(Reason.VALUE_NOT_FINITE, "the decrypted result holds NaN or infinity")
    honest = max(own, *last[-REMEMBERED:], 0.0)
    limit = MULTIPLE * honest
    if not honest or change <= limit:  # who knows nothing of honest changes has nothing to measure by
        return Moderated(1.0, change)
    return Moderated(limit / change, limit)


def remembered(last: Sequence[float], accepted: float, own: float) -> tuple[float, ...]:
    """What to remember after another round; a round that this client sat out says nothing.

    Args: last: as before; accepted, own: norms of what was taken over and of what its own update would have changed.
    """
    return (*last, min(accepted, SPREAD * own))[-REMEMBERED:] if own else tuple(last)
