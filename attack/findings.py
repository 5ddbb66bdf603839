"""What one attacker achieved in one setting: a row of the table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

MOST_ERRORS: Final = 4
"""Standard errors above chance that are taken for chance: of 100 honest figures one in 300 runs is above."""
UNPROTECTED: Final = "none"
"""The column that the others are shown beside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row."""

    setting: str
    """Mode, steps, batch, round."""
    attacker: str
    data: str
    attack: str
    """What is tried, whatever the mode: text, membership, ..."""
    terms: str
    """In which terms, whatever the mode: steps, batch, round."""
    column: str
    """Which of the forms that an attack is tried on, in a word: a mode, for the most part."""
    variant: str = ""
    """What else the federation has that the row beside it, under `none`, has not."""
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
    def beside(self) -> tuple[str, str, str]:
        """What the rows of all modes have in common."""
        return self.attack, self.terms, self.data

    @property
    def _what(self) -> str:
        return f"{self.setting}, {self.attacker}, {self.data}"

    @property
    def can_leak(self) -> bool:
        """Whether there is a figure that would be beyond chance: of few members no AUC is."""
        return any(self.chance[name] + MOST_ERRORS * error < 1 for name, error in self.error.items())

    def problems(self) -> list[str]:
        """What contradicts the control or the claim, in words."""
        weak = [
            f"{self._what}: {name} is {self.figures[name]:.3f}, a control must reach {least}"
            for name, least in self.at_least.items()
            if not self.figures[name] >= least  # nor is it a number
        ]
        return weak + (self._leaks() if self.no_better_than_chance else [])

    def _leaks(self) -> list[str]:
        return [
            f"{self._what}: {name} is {value:.3f}, and chance {self.chance[name]:.3f} ± {self.error[name]:.3f}"
            for name, value in self.figures.items()
            if name in self.error and not value <= self.chance[name] + MOST_ERRORS * self.error[name]
        ]


def bare(findings: Sequence[Finding]) -> dict[tuple[str, str, str], Finding]:
    """The rows of unprotected federations, by what they have in common with those of other modes."""
    return {finding.beside: finding for finding in findings if finding.column == UNPROTECTED}


def problems(findings: Sequence[Finding]) -> list[str]:
    """Of all rows."""
    return [problem for finding in findings for problem in finding.problems()]


def verdict(findings: Sequence[Finding]) -> list[str]:
    """What a run came to, in sentences: of the controls, and of the claims."""
    controls = [finding for finding in findings if finding.at_least]
    claims = [finding for finding in findings if finding.no_better_than_chance and finding.can_leak]
    return [
        _outcome(
            controls,
            "{all} controls (attacks that must succeed): every one succeeded.",
            "{bad} of {all} controls failed: these attacks are broken, and what else they find says nothing.",
        ),
        _outcome(
            claims,
            "{all} attacks on what servers hold under complete: none did better than chance.",
            "{bad} of {all} attacks on what servers hold under complete did better than chance.",
        ),
    ]


def _outcome(findings: Sequence[Finding], good: str, bad: str) -> str:
    failed = sum(bool(finding.problems()) for finding in findings)
    return (bad if failed else good).format(all=len(findings), bad=failed)
