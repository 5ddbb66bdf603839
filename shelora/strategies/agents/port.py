"""The port of a strategy's secret half: how a client's update is protected and a result opened.

A client goes through three steps, in this order: `check` refuses a layout that protects less than was promised;
`protect` yields the shards of an update, one in memory at a time; `restored` yields what the shards of a result hold,
part by part.
What agents know of a round and servers do not comes in a `AgentContext`; a strategy takes from it what it needs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shelora.additive.noise import noise_sampler
from shelora.additive.parameters import AdditiveParameters
from shelora.additive.sampler import Csprng
from shelora.additive.wire import ShardShape
from shelora.errors import DomainError, Reason
from shelora.lora.figures import NOTHING, Figures
from shelora.lora.layout import Layout
from shelora.lora.protect import Encrypts
from shelora.lora.restore import Decrypts, Restored
from shelora.lora.shards import Float32, Float64, LoraFactors, ResultShardContent, UpdateShardContent
from shelora.lora.sketches import Clipping, Exponents
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

    @property
    def frozen(self) -> Mapping[str, LoraFactors]:
        """By matrix name, what the model holds beside s B A and does not train: ΔW = s B A + frozen.B frozen.A."""

    @property
    def exponents(self) -> Mapping[str, Exponents]:
        """By matrix name, the bounds of sketches that the last result left; none before the first."""


def drawn(deviation: int, count: int) -> NDArray[np.int64]:
    """Noise that nobody predicts: discrete Gaussian integers, [count]."""
    return noise_sampler(deviation).sample(Csprng.fresh(), count)


class EncryptsSummand(Protocol):
    """What `shelora.additive.secret.Encryption` does."""

    def encrypt(self, values: Float64) -> bytes:
        """The next shard, of values in [-1, 1]."""


class OpensSum(Protocol):
    """What `shelora.additive.secret.SumOpener` does."""

    def open(self, data: bytes | memoryview, shape: ShardShape) -> Float64:
        """The sum of the contributors' values. Raises SUM_UNREADABLE, CIPHERTEXT_*."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summand:
    """This client's one encryption in a round."""

    encryption: EncryptsSummand
    share: float
    """Its weight over the largest that a client may have, in (0, 1]; the weight it commits to."""
    most_contributors: int = 0
    """K_max of the round; only asked for where clients add noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSum:
    """A round's sum, opened by its committee."""

    opener: OpensSum
    shares: float
    """The contributors' weights together, over the largest that one may have: by it the sum is divided."""
    noise: float
    """Standard deviation of the noise in an entry of the mean, of values within ±1: `mean_noise`. That which clients
    add comes beside it."""
    contributors: int = 0
    """How many updates the sum has; 0 where nobody asks."""
    own_share: float = 0.0
    """This client's share of the sum, 0 to 1: 0 if its update is not in it."""
    most_contributors: int = 0
    """K_max of the round; only asked for where clients add noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentContext:
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
    round_number: int = 0
    """Number of the training round, the same in all its attempts."""
    largest_move: float = 0.0
    """How far local training can move one value at most: learning rate times local steps."""
    summand: Summand | None = None
    """For an update under additive encryption."""
    opened: OpenedSum | None = None
    """For a result under additive encryption."""
    reference: Update | None = None
    """What this client trained the round's update from, which follows from results alone; None if it took no part."""
    figures: Figures = NOTHING
    """What this client tells of its examples, where sums hold that."""
    draws: Callable[[int, int], NDArray[np.int64]] = drawn
    """Draws the noise that hides a client: so many integers of that deviation."""
    clipping: Clipping = field(default_factory=Clipping)
    """What `protect` cut; read when it has ended."""
    cut: set[str] = field(default_factory=set)
    """First names of the parts of a result that honest clients cannot have sent, and that were cut."""
    means: list[Figures] = field(default_factory=list)
    """The means that a result holds, once all of it was restored; empty if its sum holds none."""


class AgentStrategy(Protocol):
    """The secret half of a strategy. One stateless object, of the same name as its public half."""

    @property
    def name(self) -> str:
        """That of the public half."""

    def check(self, layout: Layout, model: Adapted, terms: Terms, plan: Plan | None, budget: float) -> None:
        """Refuses a layout that is of another model, or that protects less than the federation promised.

        Raises: PROTECTION_REFUSED if it has less encrypted than promised, or than this client's budget;
        LAYOUT_MISMATCH; PLAN_REFUSED if its column counts are not the plan's.
        """

    def check_result(self, layout: Layout, model: Adapted) -> None:
        """Refuses a result of another model. Raises: LAYOUT_MISMATCH."""

    def protect(self, layout: Layout, update: Update, context: AgentContext) -> Iterator[UpdateShardContent]:
        """The shards of an update, in order. Raises: SHAPE_MISMATCH, VALUE_NOT_FINITE, VALUE_OUT_OF_RANGE."""

    def restored(
        self, layout: Layout, results: Iterable[ResultShardContent], context: AgentContext
    ) -> Iterator[Restored]:
        """What result shards hold, part by part. Raises: TOO_FEW_CONTRIBUTORS, CIPHERTEXT_*."""


def mean_noise(
    parameters: AdditiveParameters, contributors: int, most_contributors: int, shares: float
) -> float:
    """Standard deviation of an entry of a mean: errors, dropped bits and rounding of so many clients."""
    dropped = (4.0**parameters.dropped_bits - 1) / 12
    variance = contributors * (parameters.deviation**2 + dropped + 1 / 12)
    return math.sqrt(variance) / (parameters.scale(most_contributors) * shares)


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
