"""The real agent with a few lines changed: what a member can do that wants to spoil the model.

python -m tests.insiders.hostile_agent claim+boost run --config agent.yaml
"""

import sys
from dataclasses import replace
from typing import Any

import numpy as np

from client_agent.learner import Learner
from client_agent.learning import Trained, Weights
from client_agent.session import Session
from shelora.lora.shards import LoraFactors

CLAIM = 10**9


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
        return replace(honest, weights=Weights(changed, honest.weights.tensors))

    Learner._train = trained  # type: ignore[method-assign]


def head(bound: float) -> None:
    """Sends tensors at their bound, against what it learned."""
    train = Learner._train

    def trained(self: Learner, *arguments: Any) -> Trained:
        honest = train(self, *arguments)
        changed = {n: (-bound * np.sign(v)).astype(np.float32) for n, v in honest.weights.tensors.items()}
        return replace(honest, weights=Weights(honest.weights.factors, changed))

    Learner._train = trained  # type: ignore[method-assign]


CHANGES = {
    "flip": lambda: None,  # the data has other labels
    "claim": claim,
    "boost": lambda: factors(-9.0),
    "reverse": lambda: factors(-1.0),
    "head": lambda: head(1.0),
}

if __name__ == "__main__":
    for change in sys.argv.pop(1).split("+"):
        CHANGES[change]()
    from client_agent.main import app

    app()
