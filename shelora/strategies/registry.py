"""Public halves by name: the one place where `protection.mode` is looked up."""

from typing import Final

from shelora.errors import DomainError, Reason
from shelora.strategies import complete, plain, she_lora
from shelora.strategies.port import Strategy

DEFAULT: Final = complete.STRATEGY.name
"""The mode of a federation whose file names none."""

UNNAMED: Final = she_lora.STRATEGY.name
"""The mode that a message without one means: the default when callers still left it out."""

_STRATEGIES: Final[dict[str, Strategy]] = {}


def register(strategy: Strategy) -> None:
    """Makes a strategy known. Raises ValueError if another has its name."""
    if _STRATEGIES.setdefault(strategy.name, strategy) is not strategy:
        raise ValueError(f"there is a strategy named {strategy.name} already")


def strategies() -> tuple[str, ...]:
    """Names of the known strategies."""
    return tuple(_STRATEGIES)


def strategy_of(name: str) -> Strategy:
    """The strategy of that name. Raises INVALID_ARGUMENT, with the known names."""
    try:
        return _STRATEGIES[name]
    except KeyError:
        known = " or ".join(map(repr, _STRATEGIES))
        raise DomainError(Reason.INVALID_ARGUMENT, f"there is no strategy {name!r}: use {known}") from None


register(complete.STRATEGY)
register(she_lora.STRATEGY)
register(plain.STRATEGY)
