"""Metrics of a user's own: functions that say how good the model is on this client's test examples.

They are called as `compute_metrics` of `transformers.Trainer` is, and run on this machine with its data. What they
return stays here: in the log, and on the adapter's card.
"""

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from transformers import EvalPrediction

from client_agent.tables import first_line
from shelora.configuration import invalid

Metric = Callable[[EvalPrediction], Mapping[str, float]]
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.@-]{0,39}")
_MOST: Final = 50
"""Values that one function may return."""

_log = structlog.get_logger(__name__)


def metrics_of(names: Sequence[str]) -> tuple[Metric, ...]:
    """The functions of these names, `module:attribute` each. Raises: DomainError CONFIGURATION_INVALID."""
    return tuple(_metric_of(name) for name in names)


def _metric_of(name: str) -> Metric:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise invalid(f"metrics = {name}: name a function as module:attribute")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module does when it is imported
        raise invalid(
            f"metrics = {name}: it cannot be loaded: {first_line(error)}; install its package beside the agent, or "
            "name its folder in PYTHONPATH"
        ) from error
    if not callable(found):
        raise invalid(f"metrics = {name}: it is a {type(found).__name__}; name a function")
    metric: Metric = found
    return metric


class Predictions:
    """What a model predicted of test examples, kept for metrics of the user's own.

    Args:
        metrics: What takes it; without any, nothing is kept.
        classes: Whether logits are of classes. They are kept whole then; of a vocabulary, the likeliest tokens alone.
    """

    def __init__(self, metrics: Sequence[Metric], *, classes: bool) -> None:
        self._metrics, self._classes = metrics, classes
        self._predicted: list[NDArray[Any]] = []
        self._targets: list[NDArray[Any]] = []

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Keeps a batch. Args: logits: [k, classes]; targets: [k]."""
        if self._metrics:
            predicted = logits.float() if self._classes else logits.argmax(dim=-1)
            self._predicted.append(predicted.cpu().numpy())
            self._targets.append(targets.cpu().numpy())

    def figures(self) -> dict[str, float]:
        """What the metrics say, by name. One that fails says nothing; why goes into the log."""
        found: dict[str, float] = {}
        if not self._predicted:
            return found
        seen = EvalPrediction(np.concatenate(self._predicted), np.concatenate(self._targets))
        for metric in self._metrics:
            try:
                found |= _checked(metric(seen))
            except Exception as error:  # noqa: BLE001 - whatever the user's function does
                name = getattr(metric, "__qualname__", str(metric))
                _log.warning("metric_not_computed", metric=name, why=first_line(error))
        return found


def _checked(returned: Any) -> dict[str, float]:  # noqa: ANN401 - whatever the function returned
    """Raises: TypeError or ValueError for what is no set of named numbers."""
    if not isinstance(returned, Mapping) or len(returned) > _MOST:
        raise TypeError(f"it must return a dictionary of at most {_MOST} numbers by name")
    values = {str(name): float(value) for name, value in returned.items()}
    if odd := [name for name in values if not _NAME.fullmatch(name)]:
        raise ValueError(f"a name must be of letters, digits, _, ., @ and -, at most 40: {odd[0]!r}")
    return {name: value for name, value in values.items() if math.isfinite(value)}
