"""The tasks that a federation can have, by name, and what each asks of its specification.

How agents carry them out is in `client_agent.tasks`. A new task is named here and there.
"""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

TaskName: TypeAlias = Literal["sequence-classification", "causal-lm", "chat", "image-classification"]
LossOn: TypeAlias = Literal["answers", "everything"]
SEQUENCE_CLASSIFICATION: Final = "sequence-classification"
CAUSAL_LM: Final = "causal-lm"
CHAT: Final = "chat"
IMAGE_CLASSIFICATION: Final = "image-classification"
ANSWERS: Final = "answers"
EVERYTHING: Final = "everything"


@dataclass(frozen=True, slots=True)
class TaskRules:
    """What a specification must say for a task."""

    labelled: bool
    """Whether it lists class names; it lists none otherwise."""
    least_tokens: int
    """Least `max_tokens`: predicting a next token takes two."""


TASKS: Final[dict[TaskName, TaskRules]] = {
    SEQUENCE_CLASSIFICATION: TaskRules(labelled=True, least_tokens=1),
    CAUSAL_LM: TaskRules(labelled=False, least_tokens=2),
    CHAT: TaskRules(labelled=False, least_tokens=8),
    IMAGE_CLASSIFICATION: TaskRules(labelled=True, least_tokens=1),
}
