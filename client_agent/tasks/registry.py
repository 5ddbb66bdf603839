"""The tasks by name."""

from typing import Final

from client_agent.tasks.causal import CausalLm
from client_agent.tasks.chat import Chat
from client_agent.tasks.classification import SequenceClassification
from client_agent.tasks.images import ImageClassification
from client_agent.tasks.port import Task
from shelora.errors import DomainError, Reason

_TASKS: Final[dict[str, Task]] = {
    task.name: task for task in (SequenceClassification(), CausalLm(), Chat(), ImageClassification())
}

_BY_LABELS: Final[dict[str, str]] = {CausalLm.name: Chat.name}
"""The task that learns the same from labels that somebody else's data hold."""


def task_of(name: str) -> Task:
    """The task of that name. Raises: DomainError MODEL_INVALID."""
    if name not in _TASKS:
        raise DomainError(Reason.MODEL_INVALID, f"task {name!r} is not known; known are {', '.join(_TASKS)}")
    return _TASKS[name]


def task_by_labels(name: str) -> Task:
    """The task that learns what labels say where that of this name sets them itself. Raises: as `task_of`."""
    return task_of(_BY_LABELS.get(name, name))


def tasks() -> tuple[Task, ...]:
    """All of them."""
    return tuple(_TASKS.values())
