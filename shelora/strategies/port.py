"""The port of a strategy's public half: what a federation asks of it, and the layout of its rounds. No secret.

The model is a verifiable aggregation scheme's split into the roles of client, aggregator and collector, with one
dispatch by name (libprio-rs, `vdaf`). The public half here names the kinds of shards (`shelora.lora.kind`), the
aggregator's part; the client's and the collector's are the secret half's (`shelora.strategies.agents.port`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shelora.lora.layout import Layout, Matrix, Tensor
from shelora.lora.noise import ClientNoise


class Terms(Protocol):
    """What a federation fixed of protection: `shelora.federation.ProtectionSpec`."""

    @property
    def parameters(self) -> str:
        """CKKS profile by name."""

    @property
    def tensor_bound(self) -> float:
        """Largest absolute value in a tensor."""

    @property
    def max_directions(self) -> int:
        """Most directions in an aggregate of products."""

    @property
    def clear_bits(self) -> int:
        """Bits in which clear values of factors travel where some are encrypted."""

    @property
    def noise(self) -> ClientNoise | None:
        """How sums hide a client; None: they do not."""

    @property
    def mean_figures(self) -> bool:
        """Whether encrypted sums hold what clients tell of their examples."""


class Shapes(Protocol):
    """A model's matrices, without tier_columns, and its tensors."""

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The adapted matrices."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors trained whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTerms:
    """What a training round's layout rests on beside the model and the federation's terms."""

    key_id: bytes
    """The epoch's CKKS key, 16 bytes; empty without keys."""
    tiers: tuple[float, ...] = ()
    """Budgets of the plan's tiers; none without a plan."""
    tier_columns: Sequence[tuple[int, ...]] = ()
    """Protected columns by matrix and tier; empty without a plan."""
    max_rank: int
    """Largest rank of a client."""


class Strategy(Protocol):
    """The public half of a strategy. One stateless object; `protection.mode` names it."""

    @property
    def name(self) -> str:
        """What `protection.mode` names it by."""

    @property
    def needs_keys(self) -> bool:
        """Whether it rests on the epoch's secrets: without them nothing is secret, and nothing is protected."""

    @property
    def needs_plan(self) -> bool:
        """Whether clients agree on columns to encrypt before they train."""

    @property
    def needs_committee(self) -> bool:
        """Whether a committee of each training round's clients opens its sum; nobody else can."""

    @property
    def most_updates(self) -> int:
        """Most updates in one round's result; more clients than that are not asked. 0 for no limit of its own."""

    @property
    def shows_factors(self) -> bool:
        """Whether servers see factors of a single client's update, or parts of them."""

    @property
    def summary(self) -> str:
        """What it protects, in some words, for a status line."""

    @property
    def servers_see(self) -> str:
        """What servers see of a client's update, and what not, in a sentence or two for an operator."""

    def encrypts(self, budget: float) -> str:
        """What a client of that budget encrypts, in a word or a percentage."""

    def accepts(self, terms: Terms) -> None:
        """Raises INVALID_ARGUMENT, naming the field and the remedy, if it cannot run under those terms."""

    def layout(self, model: Shapes, terms: Terms, round_: RoundTerms) -> Layout:
        """The layout of a training round. Deterministic. Raises INVALID_ARGUMENT."""
