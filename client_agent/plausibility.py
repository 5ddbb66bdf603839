"""Compares a result with this client's own update and the state it trained from. Pure rules that use no server's claim.

A hostile member or a malicious aggregation decides what a result holds. Nobody can say what the honest one would have
been, but its size is bounded: honest members train from the same state, with the same recipe, and are averaged. Results
beyond the bound are refused (matrices) or left out (whole tensors); results within it may still be wrong
(docs/threat-model.md).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import structlog

from client_agent.learning import Weights
from shelora.errors import DomainError, Reason
from shelora.lora.restore import Restored
from shelora.lora.shards import FactoredUpdate, Float32, LoraFactors

ORTHONORMAL = 1e-4
"""Most by which QᵀQ may differ from the identity, an entry: far above the rounding of float32."""
TIMES_OWN = 10.0
"""Most by which a matrix of a result may exceed this client's whole update, in Frobenius norm."""
STEP_MARGIN = 1.5
"""Most by which a tensor's value may move in a round, in learning rates a step. AdamW moves a value by about one."""
WORSE_BY_FACTOR, WORSE_BY = 1.5, 0.25
"""Largest loss on own examples after a result: WORSE_BY_FACTOR times the best one so far, plus WORSE_BY, in nats."""
MUCH_TO_LEARN, LITTLE = 1.0, 0.1
"""If own training lowered the loss on own examples by more than MUCH_TO_LEARN, in nats, a result must lower it by the
share LITTLE of that."""
FEW = 4
"""Contributors up to which MUCH_TO_LEARN and LITTLE hold. The honest first mean of more clients with unlike labels may
teach one nothing: of 20 on R8, divided by Dirichlet(0.3), nearly half would refuse it."""
AGREEMENT, AGREEMENT_SERVED = 0.6, 0.4
"""Least agreement of a sum with this client's own step, as a share of what that step alone brings into the sum; and of
one that serves this client: honest steps of small models, and of those with nothing left to learn, differ more."""
FEWEST = 3
"""Contributors from which sums are judged by their direction. Of two, one cannot have a result taken back, and both
only object together if their updates are opposite, as honest ones with one label each are."""
CLEARLY_LESS, LITTLE_LEFT = 0.75, 0.05
"""A result serves a client with whose loss on own examples it leaves at most the share CLEARLY_LESS, or at most
LITTLE_LEFT nats. A hostile one may serve some of them."""
NEGLIGIBLE = 1e-3
"""An own step, over the matrices that it began from, that is too small to judge a direction by: rounding and noise of
the sum may be as long."""
NOISE_DEVIATIONS = 8.0
"""What a value of a sum may be off, in standard deviations of its noise."""
JUDGING_EXAMPLES = 32
"""Own examples that a result is judged by."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What a client knows of a round before it sees the result."""

    base: Weights
    """The state that the round started from."""
    trained: Weights | None
    """What this client made of it; None if it did not take part, and then little can be said."""
    scaling: float
    """The s of its ΔW = s B A."""
    step: float
    """How far the recipe moves a value: learning rate times steps, of all rounds from `since` on."""
    missed: float = 0.0
    """The same of rounds that this client missed, as far as servers say; it missed none whose sum it is in."""
    since: int = 1
    """The first training round that moved tensors away from those of `base`."""
    doubts: list[str] = field(default_factory=list)
    """Filled by the checks: what no honest members can have led to, in words."""
    left_out: set[str] = field(default_factory=set)
    """Filled by the checks: tensors that stay as they were."""


def plausible(parts: Iterable[Restored], expected: Expectation) -> Iterator[Restored]:
    """The parts of a result, each checked before it is handed on; tensors that moved too far stay as they were.

    How far matrices move that were summed under encryption is bounded elsewhere (`client_agent.moderating`), and so is
    all of a result whose clients added noise (`shelora.lora.noise`).

    Raises: RESULT_REFUSED, naming the matrix and both norms.
    """
    own = update_norm(expected.trained.factors, expected.scaling) if expected.trained else 0.0
    for part in parts:
        if part.noisy:
            yield part
            continue
        for name, update in part.matrices.items() if not part.summed else ():
            _require_plausible(name, update, own)
        missed = expected.missed if part.summed and not part.own_share else 0.0
        part.tensors.update(believed_tensors(part.tensors, expected, missed, part.tensor_noise))
        yield part


def update_norm(factors: Mapping[str, LoraFactors], scaling: float) -> float:
    """The Frobenius norm of s B A over all matrices."""
    squares = 0.0
    for factor in factors.values():
        A, B = factor.A.astype(np.float64), factor.B.astype(np.float64)
        squares += float(np.sum((B.T @ B) * (A @ A.T)))
    return scaling * float(np.sqrt(max(squares, 0.0)))


def believed_tensors(
    tensors: Mapping[str, Float32], expected: Expectation, missed: float = 0.0, noise: float = 0.0
) -> dict[str, Float32]:
    """Tensors of a result, or those that the round started from if some moved as no mean of honest members can.

    That is: further than the recipe moves a value, or against this client's own step. One that did not train takes
    the result's. Rounds that it missed may have moved a value by `missed` more; the sum's noise has the standard
    deviation `noise`.
    """
    if expected.trained is None or not tensors:
        return dict(tensors)
    steps = {name: np.float64(value) - expected.base.tensors[name] for name, value in tensors.items()}
    own = {name: np.float64(expected.trained.tensors[name]) - expected.base.tensors[name] for name in tensors}
    farthest = max(float(np.abs(step).max(initial=0)) for step in steps.values())
    along = sum(float(np.sum(steps[name] * own[name])) for name in tensors)
    most = STEP_MARGIN * (expected.step + missed) + NOISE_DEVIATIONS * noise
    too_far = farthest > most
    if not too_far and along >= 0:
        return dict(tensors)
    if too_far:
        expected.doubts.append(
            f"{min(tensors)} moved farther than honest members can move it: a member is hostile"
        )
    _log.warning(
        "tensors_left_out",
        tensors=sorted(tensors),
        moved=farthest,
        most=most,
        against_own=along < 0,
        then="keeps the values that the round started from; some member may be hostile",
    )
    expected.left_out.update(tensors)
    return {name: expected.base.tensors[name] for name in tensors}


@dataclass(slots=True, kw_only=True)
class Motion:
    """How a sum changes the matrices, beside how this client's own update would have changed them."""

    along: float = 0.0
    """Inner product of the two changes of ΔW."""
    change: float = 0.0
    """Squared Frobenius norm of the sum's."""
    own: float = 0.0
    """Of the own one."""
    held: float = 0.0
    """Of the ΔW that both began from."""

    def add(self, along: float, change: float, own: float, held: float) -> None:
        """Counts a matrix. Args: along: inner product; change, own, held: norms."""
        self.along += along
        self.change += change**2
        self.own += own**2
        self.held += held**2


def turned(motion: Motion, share: float, contributors: int, agreement: float = AGREEMENT) -> str:
    """Why a sum cannot be a mean of honest updates, by its direction; "" if it can. Without figures: others read it.

    A mean S = Σ w_j u_j of K updates has, along this client's own u_i,

        <S, u_i> / ‖u_i‖² = w_i + Σ_{j≠i} w_j <u_j, u_i> / ‖u_i‖²,

    and clients with similar data learn the same from the same state: their updates point the same way or nowhere in
    particular, so the sum on the right takes little of w_i back. Then S is about as long as ‖u_i‖ / √K at least, and
    its cosine with u_i at least w_i √K. A sum that has less than `agreement` times either is led by an update that is
    long and points elsewhere, or takes back what the others learned. Honest clients with opposite labels look the same
    (`client_agent.judging` says what becomes of it).

    Args:
        motion: How the sum and the own update move the matrices.
        contributors: K.
        share: w_i, 0 if this client's update is not in the sum, and then nothing can be said.
        agreement: `agreement_of` its losses.
    """
    if not share or contributors < FEWEST or motion.own <= NEGLIGIBLE**2 * motion.held:
        return ""
    if not motion.change:
        return ""
    step = motion.along / motion.own
    cosine = motion.along / math.sqrt(motion.change * motion.own)
    least = agreement * share
    if step >= least and cosine >= least * math.sqrt(contributors):
        return ""
    return "the result takes back what this client learned, or moves elsewhere: a member may be hostile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Mean losses on some of this client's own training examples, in nats."""

    best: float
    """The smallest that a result had so far, or the state that the round began with; after an objection that most did
    not share, of the results from that one on."""
    before: float
    """Of the state that the round began with."""
    own: float | None
    """Of what this client trained from there; None where `before` leaves no more than MUCH_TO_LEARN to be learned, more
    than FEW clients contributed, or most did not share an objection of this client's."""
    after: float
    """With the result."""


def agreement_of(losses: Losses) -> float:
    """How far a result with these losses must agree with this client's own step."""
    serves = losses.after <= max(CLEARLY_LESS * losses.before, LITTLE_LEFT)
    return AGREEMENT_SERVED if serves else AGREEMENT


def objection_to(losses: Losses) -> str:
    """Why a result serves this client badly; "" if it does not. Without figures: others read it.

    That is: it makes the model worse, or learns less, than it does with honest members. Where honest members' labels
    differ much, honest results can be beyond both bounds. A hostile member can stay within them.
    """
    worse = not losses.after <= WORSE_BY_FACTOR * losses.best + WORSE_BY  # NaN is not
    learned = 0.0 if losses.own is None else losses.before - losses.own
    idle = learned > MUCH_TO_LEARN and losses.after > losses.before - LITTLE * learned
    if not (worse or idle):
        return ""
    what = "is much larger than it was" if worse else "falls much less than by own training"
    return f"the loss on this client's own examples {what}: a member may be hostile, or the learning rate too high"


def _require_plausible(name: str, update: FactoredUpdate, own: float) -> None:
    gram = update.Q.T @ update.Q
    if gram.size and np.abs(gram - np.eye(len(gram))).max() > ORTHONORMAL:
        raise DomainError(Reason.RESULT_REFUSED, f"the result is not applied: Q of {name} is not orthonormal")
    norm = float(np.linalg.norm(update.M))
    if own and not norm <= TIMES_OWN * own:
        raise DomainError(
            Reason.RESULT_REFUSED,
            f"the result is not applied: its {name} has norm {norm:.3g}, and this client's whole update had {own:.3g}: "
            "tell the federation's operator, a server or a member may be hostile",
        )
