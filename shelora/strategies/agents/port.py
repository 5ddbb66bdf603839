"""The port of a strategy's secret half: how a client's update is protected and a result opened.

A client goes through three steps, in this order: `check` refuses a layout that protects less than was promised;
`protect` yields the shards of an update, one in memory at a time; `restored` yields what the shards of a result hold,
part by part.
What agents know of a round and servers do not comes in a `RoundContext`; a strategy takes from it what it needs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from shelora.errors import DomainError, Reason
from shelora.lora.layout import Layout
from shelora.lora.protect import Encrypts
from shelora.lora.restore import Decrypts, Restored
from shelora.lora.shards import Float32, LoraFactors, ResultShardContent, UpdateShardContent
from shelora.negotiation.plan import Plan
from shelora.obfuscation import Obfuscation
from shelora.strategies.port import Shapes, Terms


class Adapted(Shapes, Protocol):
    """A model's shapes with its client's own."""

    @property
    def rank(self) -> int:
        """Rank r of the factors."""

    @property
    def scaling(self) -> float:
        """The s of ΔW = s B A."""


class Update(Protocol):
    """What a client trained."""

    @property
    def factors(self) -> Mapping[str, LoraFactors]:
        """By matrix name."""

    @property
    def tensors(self) -> Mapping[str, Float32]:
        """By tensor name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundContext:
    """What an agent brings to a round: its model's shapes, and what it knows and servers do not."""

    model: Adapted
    obfuscation: Obfuscation
    """Of the epoch."""
    encryptor: Encrypts | None = None
    decryptor: Decrypts | None = None
    """Under the epoch's CKKS key; None if the layout encrypts nothing under it."""
    plan: Plan | None = None
    """The plan that the round's layout is under."""
    encrypted_tiers: int = 0
    """Tiers of the layout that this client encrypts."""


class AgentStrategy(Protocol):
    """The secret half of a strategy. One stateless object, of the same name as its public half."""

    @property
    def name(self) -> str:
        """That of the public half."""

    def check(self, layout: Layout, model: Adapted, terms: Terms, plan: Plan | None, budget: float) -> None:
        """Refuses a layout that is of another model, or that protects less than the federation promised.

        Raises: LAYOUT_MISMATCH; PLAN_REFUSED if its column counts are not the plan's.
        """

    def check_result(self, layout: Layout, model: Adapted) -> None:
        """Refuses a result of another model. Raises: LAYOUT_MISMATCH."""

    def protect(self, layout: Layout, update: Update, context: RoundContext) -> Iterator[UpdateShardContent]:
        """The shards of an update, in order. Raises: SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE."""

    def restored(
        self, layout: Layout, results: Iterable[ResultShardContent], context: RoundContext
    ) -> Iterator[Restored]:
        """What result shards hold, part by part. Raises: TOO_FEW_CONTRIBUTORS, CIPHERTEXT_*."""


def require_layout(condition: bool, what: str) -> None:  # noqa: FBT001 - reads as a sentence at the call
    """Raises LAYOUT_MISMATCH unless the condition holds."""
    if not condition:
        raise DomainError(Reason.LAYOUT_MISMATCH, f"the layout is refused: {what}")


def check_model(layout: Layout, model: Shapes) -> None:
    """Raises LAYOUT_MISMATCH unless matrices and tensors are the model's."""
    require_layout(
        tuple(replace(m, tier_columns=()) for m in layout.matrices) == model.matrices, "it has other matrices"
    )
    asked = [(t.name, t.shape) for t in layout.tensors]
    require_layout(asked == [(t.name, t.shape) for t in model.tensors], "it has other tensors")
