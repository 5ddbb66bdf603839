"""Which code trains: the agent's own loop, or one from the user's package or module (docs/own-trainer.md)."""

import importlib
from importlib.metadata import entry_points
from typing import Any, Final

from client_agent.agent import Learn
from client_agent.config import OWN_LEARNER
from client_agent.tables import first_line
from shelora.configuration import invalid

GROUP: Final = "client_agent.learners"
"""Group of entry points; each is called as `client_agent.agent.Learn` is."""


def learner_of(name: str) -> Learn:
    """The learner of that name: `transformers`, an entry point of the group, or `module:attribute`.

    Raises: DomainError CONFIGURATION_INVALID if there is none, or it cannot be loaded.
    """
    if name == OWN_LEARNER:
        from client_agent.learner import Learner  # noqa: PLC0415 - loads torch

        return Learner
    offered = {point.name: point for point in entry_points(group=GROUP)}
    try:
        found = offered[name].load() if name in offered else _imported(name, tuple(offered))
    except (ImportError, AttributeError, SyntaxError) as error:
        raise invalid(
            f"learner = {name}: it cannot be loaded: {first_line(error)}; install its package beside the agent, or "
            "name its folder in PYTHONPATH"
        ) from error
    if not callable(found):
        raise invalid(f"learner = {name}: it is a {type(found).__name__}; name a class derived from Learner")
    learn: Learn = found
    return learn


def _imported(name: str, offered: tuple[str, ...]) -> Any:  # noqa: ANN401 - whatever lies there
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join((OWN_LEARNER, *offered))
        raise invalid(
            f"learner = {name}: no installed package offers it; known are {known}, or module:attribute"
        )
    return getattr(importlib.import_module(module), attribute)
