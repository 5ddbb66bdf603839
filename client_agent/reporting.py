"""TensorBoard, MLflow and Weights & Biases, by the callbacks that transformers has for them. Off unless asked for.

They receive a round's losses, gradient norms and rates. These are this client's own, so they stay on its side. One
set of callbacks serves all rounds, and steps are counted on from round to round.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from client_agent.config import Tracker
from shelora.configuration import invalid

_CALLBACKS: Final[Mapping[str, type[Any]]] = {
    "tensorboard": TensorBoardCallback,
    "mlflow": MLflowCallback,
    "wandb": WandbCallback,
}
FOLDER: Final = "tensorboard"
"""In `state_dir`: what TensorBoard is pointed at."""


def require_trackers(names: Sequence[Tracker]) -> None:
    """Raises: DomainError CONFIGURATION_INVALID for one that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise invalid(
                f"training.report_to = {name}: needs the package {name}, which is not installed: pip install {name}"
            )


class Reporting:
    """The trackers that a configuration names.

    Args:
        names: Of the trackers.
        folder: This client's state folder.
    """

    def __init__(self, names: Sequence[Tracker], folder: Path) -> None:
        require_trackers(names)
        self._told = [_CALLBACKS[name]() for name in names]
        for callback in self._told:
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = str(folder / FOLDER)

    def callbacks(self, steps_before: int) -> list[TrainerCallback]:
        """For a round before which so many steps were trained."""
        return [_Onwards(callback, steps_before) for callback in self._told]


class _Onwards(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Hands on what a tracker needs, with the steps of earlier rounds added."""

    def __init__(self, told: Any, before: int) -> None:  # noqa: ANN401 - of transformers
        self._told, self._before = told, before

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ANN401 - as there
        self._told.on_train_begin(args, state, control, **more)

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ANN401
        later = replace(state, global_step=state.global_step + self._before)
        self._told.on_log(args, later, control, **more)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ANN401
        self._told.on_train_end(args, state, control, **more)
