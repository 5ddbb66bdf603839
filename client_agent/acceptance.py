"""The least protection a client accepts, whatever servers say: what its owner wrote, or what it was promised.

Servers hand out the specification of a federation and the layouts of its rounds. Anyone who controls the coordinator or
its Redis can change both; these rules refuse such a change. They use nothing that a server says.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from client_agent.config import HiddenClient
from shelora.errors import DomainError, Reason
from shelora.levels import WEAKEST_PROTECTED, Level

_ROUNDING: Final = 1 + 1e-6
"""Epsilons are computed on different machines."""


def least_accepted(promises: Iterable[Level | None]) -> Level:
    """The strongest of the promises, those of the certificate and of earlier runs; never `none`."""
    return max((WEAKEST_PROTECTED, *filter(None, promises)), key=lambda level: level.strength)


def require_level(offered: Level, written: Sequence[Level] | None, promises: Iterable[Level | None]) -> None:
    """Refuses a federation that protects less than this client accepts.

    Args:
        offered: What the coordinator says that the federation does.
        written: `protection.accept` of the configuration; None if its owner left it out.
        promises: What the certificate says, and what an earlier run took part in.

    Raises: PROTECTION_REFUSED, naming both levels and what to write if the offer is meant.
    """
    if written is not None:
        if offered not in written:
            raise _refused(
                f"the federation offers {offered} protection, and protection.accept lists {', '.join(written)}: "
                f"ask its operator; add {offered} to the list if that is meant"
            )
        return
    least = least_accepted(promises)
    if offered.strength < least.strength:
        raise _refused(
            f"the federation offers {offered} protection, and this client was promised {least}: ask its operator "
            f"who changed it; write protection.accept: [{offered}] into the configuration if that is meant"
        )


def require_hidden(
    offered: HiddenClient | None, written: HiddenClient | None, known: HiddenClient | None
) -> None:
    """Refuses a federation whose sums reveal more about a client than this one accepts.

    Args:
        offered: What the federation promises; None if nothing.
        written: `protection.client_privacy` of the configuration; None if its owner left it out.
        known: What an earlier run took part under.

    Raises: PROTECTION_REFUSED, naming both and what to write if the offer is meant.
    """
    least = written or known
    if least is None or (
        offered is not None
        and offered.epsilon <= least.epsilon * _ROUNDING
        and offered.delta <= least.delta
        and offered.tolerated >= least.tolerated
    ):
        return
    asked = "its configuration asks for" if written else "this client took part under"
    remedy = "ask its operator who changed it; write protection.client_privacy into the configuration if it is meant"
    raise _refused(f"the federation offers {_told(offered)}, and {asked} {_told(least)}: {remedy}")


def _told(hidden: HiddenClient | None) -> str:
    if hidden is None:
        return "no client privacy"
    who = f"{hidden.tolerated} clients tolerated"
    return f"client privacy of epsilon {hidden.epsilon:g} at delta {hidden.delta:g} with {who}"


def _refused(message: str) -> DomainError:
    return DomainError(Reason.PROTECTION_REFUSED, message)
