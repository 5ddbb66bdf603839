"""How much of an example's privacy rounds cost, and how much may be spent: the accountant and its ledger.

Rounds of DP-SGD are the sampled Gaussian mechanism, `steps` times. Its Rényi divergences add up over steps and rounds
(Mironov, Talwar and Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", 2019) and give an epsilon at
a delta. Opacus computes both. Neighbours are data sets of which one has one example more.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier

from client_agent.config import AgentConfig, PrivacyConfig
from shelora import files
from shelora.configuration import invalid
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec

LEDGER: Final = "privacy.json"
_FORMAT: Final = 1
ORDERS: Final = (1.1, 1.25, 1.5, 1.75, 2.25, 2.5, 2.75, 3.5, *range(2, 64), 64, 96, 128, 256, 512)
"""Rényi orders among which the best is taken; large ones serve small budgets. Fractions take long to compute."""
_TOLERANCE: Final = 1e-3
"""Share of epsilon that the search for the noise may leave unused."""
MOST_ROUNDS: Final = 100_000
"""Rounds above which it is not counted how many a budget buys."""

Spending: TypeAlias = tuple[float, float, int]
"""Noise multiplier, sample rate, steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """How a step hides an example."""

    noise_multiplier: float
    """Standard deviation of the noise over `max_gradient_norm`, above 0."""
    sample_rate: float
    """Probability that a step takes an example, above 0 to 1."""
    max_gradient_norm: float
    """L2 norm that each example's gradient is scaled down to."""

    def __str__(self) -> str:
        return f"σ={self.noise_multiplier!r} q={self.sample_rate!r} C={self.max_gradient_norm!r}"


@dataclass(frozen=True, slots=True)
class NoisePlan:
    """What the noise was chosen for."""

    federation: str
    settings: str
    """The configuration's, as JSON."""
    noise_multiplier: float


@dataclass(frozen=True, slots=True)
class Ledger:
    """What was spent on these examples, in order, and the plan that it followed last."""

    plan: NoisePlan | None = None
    spent: tuple[Spending, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The ledger in a state folder; a new one if there is none.

        Raises: DomainError CONFIGURATION_INVALID if it cannot be read: what was spent is not forgotten in silence.
        """
        try:
            fields = json.loads((folder / LEDGER).read_bytes())
            plan, spent = _parsed(**fields)
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise invalid(
                f"state_dir: {folder / LEDGER} cannot be read, and it says how much of the privacy budget is spent: "
                "restore it from a backup; without it, a new budget can only begin with other examples"
            ) from error
        return cls(plan, spent)

    def write(self, folder: Path) -> None:
        """Replaces the ledger in a state folder, durably. Raises: OSError."""
        fields = {"format": _FORMAT, "plan": asdict(self.plan) if self.plan else None, "spent": self.spent}
        files.replace(folder / LEDGER, json.dumps(fields, indent=1).encode())

    def with_round(self, plan: NoisePlan, cost: Spending) -> "Ledger":
        """The ledger after one more round; rounds alike become one entry."""
        return replace(self, plan=plan, spent=added(self.spent, cost))


def added(spent: Sequence[Spending], cost: Spending) -> tuple[Spending, ...]:
    """The spendings with one more; equal ones are merged."""
    *earlier, last = spent or [(*cost[:2], 0)]
    if last[:2] == cost[:2]:
        return (*earlier, (*cost[:2], last[2] + cost[2]))
    return (*spent, cost)


@lru_cache(maxsize=256)
def epsilon_of(spent: tuple[Spending, ...], delta: float) -> float:
    """Epsilon of everything that was spent together, at that delta; 0 for nothing."""
    accountant = RDPAccountant()
    accountant.history = list(spent)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order")  # a looser bound, but a bound
        return float(accountant.get_epsilon(delta, alphas=ORDERS))


class Budget:
    """The privacy budget of one client in one federation, kept in its state folder.

    The noise is chosen so that the federation's rounds, as many as it had when the first of them was trained, spend
    epsilon. It stays so when the federation is extended: then the budget ends before the rounds do.

    Raises: CONFIGURATION_INVALID if the settings do not fit the examples, or the ledger cannot be read.
    """

    def __init__(self, config: AgentConfig, spec: TrainingSpec, *, examples: int, rounds: int) -> None:
        """Args: examples: of this client. rounds: of the federation."""
        settings = config.privacy
        assert settings is not None, "without the section there is no budget"
        if settings.delta * examples >= 1:
            raise invalid(
                f"privacy.delta = {settings.delta:g} promises nothing for {examples:,} examples: it must be below "
                f"1 / {examples:,} = {1 / examples:.2g}, and should be far below"
            )
        self._folder = config.state_dir
        self._delta, self._limit = settings.delta, settings.epsilon
        self._steps = spec.steps(examples)
        self.rounds = rounds
        sample_rate = min(1.0, spec.batch_size / examples)
        ledger = Ledger.read(self._folder)
        self._plan = _planned(config.federation, settings, ledger, sample_rate, self._steps * rounds)
        self.mechanism = Mechanism(
            noise_multiplier=self._plan.noise_multiplier,
            sample_rate=sample_rate,
            max_gradient_norm=settings.max_gradient_norm,
        )

    def spent(self) -> float:
        """Epsilon of what was trained so far."""
        return epsilon_of(Ledger.read(self._folder).spent, self._delta)

    def require_round(self) -> None:
        """Raises: PRIVACY_EXHAUSTED if one more round would spend more than the budget, without any figure."""
        if self._limit is not None and self._after(1) > self._limit:
            raise DomainError(
                Reason.PRIVACY_EXHAUSTED,
                "this client's privacy budget is spent: it no longer trains, but still applies the others' results",
            )

    def spend(self) -> float:
        """Writes down one more round, durably, before anything of it is kept or sent. Returns the epsilon spent."""
        ledger = Ledger.read(self._folder).with_round(self._plan, self._cost(1))
        ledger.write(self._folder)
        files.sync_folder(self._folder)
        return epsilon_of(ledger.spent, self._delta)

    def rounds_left(self) -> int | None:
        """How many more rounds the budget buys, at most `MOST_ROUNDS`; None if it has no end."""
        if self._limit is None:
            return None
        low, high = 0, 1
        while high <= MOST_ROUNDS and self._after(high) <= self._limit:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._after(middle) <= self._limit else (low, middle)
        return min(low, MOST_ROUNDS)

    def __str__(self) -> str:
        """What the budget buys, for people."""
        mechanism, spent = self.mechanism, self.spent()
        noise = (
            f"noise of {mechanism.noise_multiplier:.3g} times the norm {mechanism.max_gradient_norm:g} on the sum of a "
            f"batch, which takes each example with probability {mechanism.sample_rate:.3g}"
        )
        if self._limit is None:
            told = f"epsilon {self._after(self.rounds):.3g} at delta {self._delta:g} after {self.rounds} more rounds"
        else:
            told = (
                f"epsilon {self._limit:g} at delta {self._delta:g} buys {self.rounds_left():,} more rounds of the "
                f"federation's {self.rounds:,}"
            )
        return f"{told}; spent so far: {spent:.3g}; {noise}"

    def _after(self, rounds: int) -> float:
        return epsilon_of(added(Ledger.read(self._folder).spent, self._cost(rounds)), self._delta)

    def _cost(self, rounds: int) -> Spending:
        return self.mechanism.noise_multiplier, self.mechanism.sample_rate, self._steps * rounds


def _planned(
    federation: str, settings: PrivacyConfig, ledger: Ledger, sample_rate: float, steps: int
) -> NoisePlan:
    """The ledger's plan if it is of this federation and these settings; otherwise a new one."""
    written = settings.model_dump_json(include={"epsilon", "delta", "noise_multiplier"})
    if ledger.plan is not None and (ledger.plan.federation, ledger.plan.settings) == (federation, written):
        return ledger.plan
    noise = settings.noise_multiplier
    if noise is None:
        noise = noise_for(settings.epsilon or 0.0, settings.delta, sample_rate, steps)
    return NoisePlan(federation, written, noise)


@lru_cache(maxsize=16)
def noise_for(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier with which that many steps spend epsilon. Raises: CONFIGURATION_INVALID."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Optimal order")
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    accountant="rdp",
                    epsilon_tolerance=_TOLERANCE * epsilon,
                    alphas=ORDERS,
                )
            )
    except ValueError as error:
        raise invalid(
            f"privacy.epsilon = {epsilon:g} at delta {delta:g} cannot be kept for {steps:,} steps with any noise: "
            "raise it"
        ) from error


def _parsed(format: int, plan: Any, spent: Any) -> tuple[NoisePlan, tuple[Spending, ...]]:  # noqa: A002, ANN401 - JSON
    """What a ledger's file holds. Raises: ValueError, TypeError."""
    if format != _FORMAT:
        raise ValueError(format)
    return NoisePlan(**plan), tuple(_spending(*entry) for entry in spent)


def _spending(noise_multiplier: float, sample_rate: float, steps: int) -> Spending:
    """Raises: ValueError, TypeError unless they are in range."""
    if not (0 < noise_multiplier < float("inf") and 0 < sample_rate <= 1 and steps >= 1):
        raise ValueError
    return float(noise_multiplier), float(sample_rate), int(steps)
