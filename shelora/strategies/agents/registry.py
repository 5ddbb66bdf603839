"""Secret halves by name."""

from typing import Final

from shelora.strategies.agents import complete, she_lora
from shelora.strategies.agents.port import AgentStrategy
from shelora.strategies.registry import strategy_of

_STRATEGIES: Final[dict[str, AgentStrategy]] = {}


def register(strategy: AgentStrategy) -> None:
    """Makes a secret half known. Raises ValueError if another has its name; INVALID_ARGUMENT without a public half."""
    strategy_of(strategy.name)
    if _STRATEGIES.setdefault(strategy.name, strategy) is not strategy:
        raise ValueError(f"there is a strategy named {strategy.name} already")


def agent_strategy_of(name: str) -> AgentStrategy:
    """The secret half of the strategy of that name. Raises INVALID_ARGUMENT."""
    strategy_of(name)
    return _STRATEGIES[name]


register(she_lora.SHE_LORA)
register(complete.COMPLETE)
register(she_lora.PLAIN)
