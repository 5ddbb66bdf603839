"""Every strategy of products, and one that two files add, through a whole round."""

from dataclasses import dataclass

import numpy as np
import pytest

from shelora.ckks.parameters import INSECURE_TOY
from shelora.errors import DomainError, Reason
from shelora.lora.noise import ClientNoise
from shelora.obfuscation import Obfuscation
from shelora.strategies import plain, she_lora
from shelora.strategies.agents import registry as agents
from shelora.strategies.agents.she_lora import PLAIN, SHE_LORA
from shelora.strategies.port import RoundTerms
from shelora.strategies.registry import register, strategy_of
from tests.unit.strategies import frozen_a, frozen_a_agents
from tests.unit.strategies.runs import Model, client, run, sums

register(frozen_a.STRATEGY)
agents.register(frozen_a_agents.STRATEGY)
OBFUSCATION = Obfuscation(bytes(range(32)), 1)


@dataclass(frozen=True)
class Terms:
    parameters: str = INSECURE_TOY.name
    tensor_bound: float = 4.0
    max_directions: int = 64
    clear_bits: int = 32
    noise: ClientNoise | None = None
    mean_figures: bool = False
    ckks = INSECURE_TOY


def frozen(matrix, rank):
    return OBFUSCATION.initial_A(matrix.name, rank, matrix.in_features)


def clients(A=None):
    return [
        client(seed, rank, weight, A=A) for seed, rank, weight in ((1, 2, 0.5), (2, 4, 0.25), (3, 3, 0.25))
    ]


@pytest.mark.parametrize(
    ("public", "secret", "A"),
    [
        (she_lora.STRATEGY, SHE_LORA, None),
        (plain.STRATEGY, PLAIN, None),
        (strategy_of("frozen-a"), agents.agent_strategy_of("frozen-a"), frozen),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_round_of_every_strategy_gives_the_sum(public, secret, A):
    members = clients(A)
    key_id = None if public.needs_keys else b""
    round_ = None if key_id is None else RoundTerms(key_id=key_id, max_rank=1)
    restored = run(public, secret, members, Terms(), OBFUSCATION, round_=round_)
    matrices, tensors = sums(members)
    assert restored.matrices.keys() == matrices.keys()
    for name, update in restored.matrices.items():
        np.testing.assert_allclose(update.Q @ update.M, matrices[name], atol=1e-4)
        np.testing.assert_allclose(update.Q.T @ update.Q, np.eye(update.Q.shape[1]), atol=1e-6)
    for name, value in restored.tensors.items():
        np.testing.assert_allclose(value, tensors[name], atol=1e-3)


def test_the_added_strategy_refuses_a_layout_that_is_not_its_own():
    model = Model(rank=2, scaling=2.0)
    other = she_lora.STRATEGY.layout(model, Terms(), RoundTerms(key_id=bytes(16), max_rank=2))
    with pytest.raises(DomainError, match="this model's B") as refused:
        frozen_a_agents.STRATEGY.check(other, model, Terms(), None, 1.0)
    assert refused.value.reason is Reason.LAYOUT_MISMATCH
