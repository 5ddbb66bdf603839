"""What is measured of a model, and how it is compared and shown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure of a model on test examples: a mean over what it predicts."""

    name: str
    """Of the figure in a cell's result."""
    words: str
    """In a sentence."""
    axis: str
    lower_is_better: bool
    unit: str
    """Of differences."""
    factor: float
    """From the figure to its unit."""
    decimals: int

    def merit(self, value: float) -> float:
        """Larger for better values."""
        return -value if self.lower_is_better else value

    def worst(self, values: Iterable[float]) -> float:
        """The worst of some values."""
        return min(values, key=self.merit)

    def shown(self, value: float) -> str:
        """A value, in the unit and without its name."""
        return f"{self.factor * value:.{self.decimals}f}"

    def with_error(self, value: float, error: float) -> str:
        """A value and its standard error."""
        return f"{self.shown(value)} ± {self.shown(error)}"

    def difference(self, value: float, error: float) -> str:
        """A signed difference, its standard error and the unit."""
        return f"{self.factor * value:+.{self.decimals}f} ± {self.shown(error)} {self.unit}"


ACCURACY: Final = Metric(
    name="accuracy",
    words="accuracy",
    axis="accuracy in percent",
    lower_is_better=False,
    unit="points",
    factor=100.0,
    decimals=1,
)
"""Share of test examples told rightly."""
LOSS: Final = Metric(
    name="loss",
    words="loss (lower is better)",
    axis="loss in nats a token (lower is better)",
    lower_is_better=True,
    unit="nats",
    factor=1.0,
    decimals=3,
)
"""Mean negative log-likelihood of an answer's token, in nats: 0.01 are one percent of perplexity."""


def best(metric: Metric, values: Sequence[float]) -> int:
    """Index of the best value; of equals the last."""
    return max(range(len(values)), key=lambda i: (metric.merit(values[i]), i))
