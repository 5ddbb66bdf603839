"""How much a coordinator takes on."""

from dataclasses import dataclass

from shelora.errors import DomainError, Reason


@dataclass(frozen=True)
class Limits:
    """How much a coordinator takes on. Calls at the same moment may exceed a limit by their number."""

    max_federations: int = 1000
    """Federations, ended ones included until their state expires."""
    max_members: int = 20_000
    """Members of one federation."""
    result_life_s: int = 7 * 86_400
    """Seconds that aggregation keeps the result of a federation that has ended, at least."""


def limit_reached(message: str) -> DomainError:
    """A limit refuses what was asked."""
    return DomainError(Reason.LIMIT_REACHED, message)
