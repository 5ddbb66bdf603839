"""The real agent with a few lines changed: what a member can do that wants to spoil the model.

python -m tests.insiders.hostile_agent claim+boost run --config agent.yaml
"""

import sys
from dataclasses import replace
from typing import Any

import numpy as np

from client_agent.learner import Learner
from client_agent.learning import Trained, Weights
from client_agent.plausibility import Losses, objection_to
from client_agent.session import Session
from shelora.lora.moderation import MULTIPLE
from shelora.lora.shards import LoraFactors

CLAIM = 10**9
SHARE = 1 / 4
"""Of the sum, for who claims most among four."""
WAYS = (0.4, 0.2, 0.1, 0.0, -0.2, -0.4, -0.8, -1.6)
"""How far the result of a round may be, in own steps from where it began: honest ones are at 1."""
LEAST_WAY = 0.3
"""Of those, what honest members do not object to by its direction: they ask for AGREEMENT times their share."""
MARGIN = 0.95
"""Of the loss that honest members object to: their examples are others."""


def claim() -> None:
    """Says that it trains on a billion examples."""
    join, report = Session.join, Session._report

    async def joined(self: Session, model: Any, _count: int) -> None:
        await join(self, model, CLAIM)

    def reported(self: Session, *arguments: Any) -> Any:
        said = report(self, *arguments)
        if said.example_count > 1:
            said.example_count = CLAIM
        return said

    Session.join, Session._report = joined, reported  # type: ignore[method-assign]


def factors(by: float) -> None:
    """Sends B times a number."""
    train = Learner._train

    def trained(self: Learner, *arguments: Any) -> Trained:
        honest = train(self, *arguments)
        changed = {
            n: LoraFactors((by * f.B).astype(np.float32), f.A) for n, f in honest.weights.factors.items()
        }
        return replace(honest, weights=replace(honest.weights, factors=changed))

    Learner._train = trained  # type: ignore[method-assign]


def head(bound: float) -> None:
    """Sends tensors at their bound, against what it learned."""
    train = Learner._train

    def trained(self: Learner, *arguments: Any) -> Trained:
        honest = train(self, *arguments)
        changed = {n: (-bound * np.sign(v)).astype(np.float32) for n, v in honest.weights.tensors.items()}
        return replace(honest, weights=replace(honest.weights, tensors=changed))

    Learner._train = trained  # type: ignore[method-assign]


def along(start: Weights, trained: Weights, scaling: float, way: float) -> Weights:
    """What lies on the line from the start of a round through what was trained from it, at `way` times the step."""

    def frozen(name: str) -> LoraFactors:
        B, A = (1 - way) * scaling * start.factors[name].B, start.factors[name].A
        kept = start.frozen.get(name)
        parts = (B, A) if kept is None else (np.hstack([B, kept.B]), np.vstack([A, kept.A]))
        return LoraFactors(*(part.astype(np.float32) for part in parts))

    return Weights(
        factors={n: LoraFactors((way * f.B).astype(np.float32), f.A) for n, f in trained.factors.items()},
        tensors={
            n: (v + way * (trained.tensors[n] - v)).astype(np.float32) for n, v in start.tensors.items()
        },
        frozen={name: frozen(name) for name in start.factors},
        exponents=start.exponents,
    )


def farthest(start: Weights, trained: Weights, scaling: float, share: float) -> Weights:
    """What moves a sum against what was learned as far as agents take it over, and no value beyond a bound.

    Tensors farther back than they were moved would be objected to at once; so they stay as they are.

    Args: share: of the sum.
    """
    others = 1 - share
    thrown = along(start, trained, scaling, (-MULTIPLE - others) / share)
    return replace(thrown, tensors=along(start, trained, scaling, (-1 - others) / share).tensors)


def within() -> None:
    """Knows how much of a sum agents take over, and sends as much, in every round."""
    train = Learner._train

    def trained(self: Learner, *arguments: Any) -> Trained:
        honest = train(self, *arguments)
        sent = farthest(self.model.weights(), honest.weights, self.model.scaling, SHARE)
        return replace(honest, weights=sent)

    Learner._train = trained  # type: ignore[method-assign]


def quietest(
    learner: Learner, honest: Weights, best: float, share: float, least: float = WAYS[-1]
) -> tuple[Weights, float]:
    """What takes back what the others learn, and more, as far as nobody objects by its own loss; and the best loss.

    It takes the others' mean for its own update, and tries on its own examples what they will see.

    Args: best: the smallest loss so far. share: of the sum. least: way that it goes no further back than.
    """
    start, scaling = learner.model.weights(), learner.model.scaling
    before, own = learner._loss_with(start), learner._loss_with(honest)
    best, chosen = min(best, before), 1.0
    for way in (way for way in WAYS if way >= least):
        after = learner._loss_with(along(start, honest, scaling, way))
        if objection_to(Losses(best=best, before=before, own=own, after=after / MARGIN)):
            break
        chosen = way
    learner.model.load(start)
    return along(start, honest, scaling, (chosen - (1 - share)) / share), best


def quiet(least: float = WAYS[-1]) -> None:
    """Knows by which losses agents object to sums, and stays below them."""
    train, best = Learner._train, [float("inf")]

    def trained(self: Learner, *arguments: Any) -> Trained:
        honest = train(self, *arguments)
        weights, best[0] = quietest(self, honest.weights, best[0], SHARE, least)
        return replace(honest, weights=weights)

    Learner._train = trained  # type: ignore[method-assign]


CHANGES = {
    "flip": lambda: None,  # the data has other labels
    "claim": claim,
    "boost": lambda: factors(-9.0),
    "reverse": lambda: factors(-1.0),
    "head": lambda: head(1.0),
    "within": within,
    "quiet": quiet,
    "quieter": lambda: quiet(LEAST_WAY),
}

if __name__ == "__main__":
    for change in sys.argv.pop(1).split("+"):
        CHANGES[change]()
    from client_agent.main import app

    app()
