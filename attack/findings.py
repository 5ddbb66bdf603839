"""What one attacker achieved in one setting: a row of the table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

MOST_ERRORS: Final = 4
"""Standard errors above chance that are taken for chance: of 100 honest figures one in 300 runs is above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row."""

    setting: str
    """Mode, steps, batch, round."""
    attacker: str
    data: str
    beside: str = ""
    """What is tried, in which terms, whatever the mode: its row under `none` is shown beside. Empty for no such row."""
    figures: dict[str, float]
    """By measure, 0 to 1."""
    counts: dict[str, int] = field(default_factory=dict)
    """What the figures were taken over."""
    chance: dict[str, float] = field(default_factory=dict)
    """What guessing gives, by measure."""
    error: dict[str, float] = field(default_factory=dict)
    """Standard error of the figure if nothing leaks, by measure."""
    at_least: dict[str, float] = field(default_factory=dict)
    """A control: the attack is broken if a figure is less."""
    no_better_than_chance: bool = False
    """A claim: something leaks that must not if a figure exceeds chance by more than `MOST_ERRORS` standard errors."""
    capture: str = ""
    """Digest of the captured updates."""

    @property
    def unprotected(self) -> bool:
        """Whether it is what the same rows of other modes are shown beside."""
        return bool(self.beside) and self.setting.startswith("none,")

    @property
    def _what(self) -> str:
        return f"{self.setting}, {self.attacker}, {self.data}"

    def problems(self) -> list[str]:
        """What contradicts the control or the claim, in words."""
        weak = [
            f"{self._what}: {name} is {self.figures[name]:.3f}, a control must reach {least}"
            for name, least in self.at_least.items()
            if self.figures[name] < least
        ]
        return weak + (self._leaks() if self.no_better_than_chance else [])

    def _leaks(self) -> list[str]:
        return [
            f"{self._what}: {name} is {value:.3f}, and chance {self.chance[name]:.3f} ± {self.error[name]:.3f}"
            for name, value in self.figures.items()
            if name in self.error and value > self.chance[name] + MOST_ERRORS * self.error[name]
        ]


def problems(findings: Sequence[Finding]) -> list[str]:
    """Of all rows."""
    return [problem for finding in findings for problem in finding.problems()]
