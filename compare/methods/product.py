"""`complete` and `selective` by the product's own code: its layouts, protection, codecs, aggregation and restoration.

What is left out is what does not touch a value: services, and the committee, whose sum of secrets is known here. Its
messages, 10 to 14 KB a client and round, are not in the bytes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import numpy as np

from client_agent.learning import Weights
from client_agent.moderating import Moderator
from client_agent.results import cut_to_rank
from compare.methods.port import Outcome
from compare.state import Held, World
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey as SummandKey
from shelora.additive.secret import SumOpener
from shelora.ckks.parameters import STANDARD
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.codec import decode_result, encode_update, validate_update
from shelora.lora.kind import Contribution
from shelora.lora.layout import Layout, Matrix, Tensor
from shelora.lora.restore import Restored, merged
from shelora.lora.shards import ResultShardContent
from shelora.lora.sums import terms_of
from shelora.negotiation.plan import Plan
from shelora.strategies import complete, she_lora
from shelora.strategies.agents.complete import COMPLETE
from shelora.strategies.agents.port import AgentContext, OpenedSum, Summand, mean_noise
from shelora.strategies.agents.she_lora import SHE_LORA
from shelora.strategies.port import RoundTerms

MOST_WEIGHT: Final = 256
"""Weights travel as whole numbers up to that."""
CONTEXT: Final = bytes(32)
"""Of a round; secrets are fresh in each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """The terms of a federation."""

    parameters: str = STANDARD.name
    tensor_bound: float = 4.0
    max_directions: int = 512
    clear_bits: int = 32
    """As published: the methods are compared at the same precision."""
    noise: None = None
    mean_figures: bool = False


TERMS: Final = Protection()


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A client's model as the product sees it."""

    rank: int
    scaling: float
    matrices: tuple[Matrix, ...]
    tensors: tuple[Tensor, ...]


@dataclass(slots=True)
class Traffic:
    """What a round moved and cost."""

    updates: list[list[bytes]] = field(default_factory=list)
    results: list[bytes] = field(default_factory=list)
    server_s: float = 0.0


class _Product:
    """What the two modes share."""

    pooled = False
    _world: World
    _held: list[Weights]

    def begin(self, world: World) -> Sequence[Held]:
        """As of `Method`."""
        self._world = world
        self._models = [
            Model(rank=rank, scaling=world.scaling, matrices=world.matrices, tensors=world.tensors)
            for rank in world.ranks
        ]
        initial = [world.initial(rank) for rank in world.ranks]
        self._held = [Weights(factors=h.factors, tensors=h.head) for h in initial]
        return initial

    def trains(self, number: int) -> tuple[bool, bool]:  # noqa: ARG002 - the same in every round
        """Both factors."""
        return True, True

    def _sent(self, trained: Sequence[Held]) -> list[Weights]:
        return [
            replace(held, factors=own.factors, tensors=own.head)
            for held, own in zip(self._held, trained, strict=True)
        ]

    def _outcome(self, traffic: Traffic) -> Outcome:
        """What clients hold now."""
        held = [_as_held(weights) for weights in self._held]
        largest = self._world.ranks.index(self._world.largest)
        return Outcome(
            held=held,
            models=[held[largest]],
            up=float(np.mean([sum(map(len, shards)) for shards in traffic.updates])),
            down=float(sum(map(len, traffic.results))),
            server_s=traffic.server_s,
        )


def _as_held(weights: Weights) -> Held:
    beside = {name: (f.B.astype(np.float64) @ f.A).astype(np.float32) for name, f in weights.frozen.items()}
    return Held(factors=weights.factors, head=weights.tensors, beside=beside)


def _aggregated(
    layout: Layout, traffic: Traffic, members: Sequence[Contribution]
) -> list[ResultShardContent]:
    """The servers' part: checks and aggregation of every shard."""
    began = time.process_time()
    for shards in traffic.updates:
        for index, data in enumerate(shards):
            validate_update(layout, index, data)
    traffic.results = [
        aggregate_shard(layout, index, members, partial(_load, traffic.updates, index))
        for index in range(len(layout.shards))
    ]
    traffic.server_s = time.process_time() - began
    return [decode_result(layout, index, data) for index, data in enumerate(traffic.results)]


def _load(updates: Sequence[Sequence[bytes]], index: int, client: str) -> bytes:
    return updates[int(client)][index]


class Complete(_Product):
    """Encrypted sums of sketches; what lies beyond a client's rank stays in its model."""

    def combine(self, trained: Sequence[Held], number: int) -> Outcome:
        """As of `Method`."""
        world, traffic = self._world, Traffic()
        round_ = RoundTerms(key_id=b"", max_rank=world.largest)
        layout = complete.STRATEGY.layout(self._models[0], TERMS, round_)
        weights = (
            np.maximum(1, np.rint(MOST_WEIGHT * world.weights / world.weights.max())).astype(int).tolist()
        )
        parameters, secrets, sent = terms_of(layout).additive, [], self._sent(trained)
        for model, update, weight in zip(self._models, sent, weights, strict=True):
            key = SummandKey.draw(parameters, Csprng.fresh())
            secrets.append(key.coefficients)
            encryption = key.encryption(CONTEXT, world.clients, Csprng.fresh())
            context = self._context(
                model, number, summand=Summand(encryption=encryption, share=weight / MOST_WEIGHT)
            )
            traffic.updates.append(
                [encode_update(layout, c) for c in COMPLETE.protect(layout, update, context)]
            )
        contents = _aggregated(layout, traffic, [Contribution(str(i), 1.0) for i in range(world.clients)])
        shares = sum(weights) / MOST_WEIGHT
        opened = OpenedSum(
            opener=SumOpener(parameters, np.sum(secrets, axis=0), CONTEXT, world.clients, world.clients),
            shares=shares,
            noise=mean_noise(parameters, world.clients, world.clients, shares),
        )
        context = self._context(self._models[0], number, opened=opened)
        restored = merged(COMPLETE.restored(layout, contents, context))
        self._held = [
            self._applied(model, before, own, restored)
            for model, before, own in zip(self._models, self._held, sent, strict=True)
        ]
        return self._outcome(traffic)

    def _context(
        self, model: Model, number: int, *, summand: Summand | None = None, opened: OpenedSum | None = None
    ) -> AgentContext:
        return AgentContext(
            model=model,
            obfuscation=self._world.obfuscation,
            round_number=number,
            largest_move=self._world.learning_rate * self._world.steps_per_round,
            summand=summand,
            opened=opened,
        )

    def _applied(self, model: Model, before: Weights, own: Weights, restored: Restored) -> Weights:
        """What an agent makes of a result: bounded by what it trained itself, cut to its rank."""
        moderator = Moderator(before=before, own=own, scaling=model.scaling)
        after = cut_to_rank(moderator.parts([restored]), model.rank, model.scaling, self._world.obfuscation)
        return replace(after, changes=moderator.changes)


class Selective(_Product):
    """SHE-LoRA: products, every column of A and the head under CKKS."""

    def begin(self, world: World) -> Sequence[Held]:
        """As of `Method`."""
        self._key = SecretKey.generate(STANDARD)
        return super().begin(world)

    def combine(self, trained: Sequence[Held], number: int) -> Outcome:
        """As of `Method`."""
        world, traffic = self._world, Traffic()
        columns = tuple((m.in_features,) for m in world.matrices)
        round_ = RoundTerms(
            key_id=self._key.key_id, tiers=(1.0,), tier_columns=columns, max_rank=world.largest
        )
        layout = she_lora.STRATEGY.layout(self._models[0], TERMS, round_)
        total = sum(m.in_features for m in world.matrices)
        plan = Plan((1.0,), np.arange(total, dtype=np.uint32))
        contexts = [self._context(model, number, plan) for model in self._models]
        for context, update in zip(contexts, self._sent(trained), strict=True):
            traffic.updates.append(
                [encode_update(layout, c) for c in SHE_LORA.protect(layout, update, context)]
            )
        members = [Contribution(str(i), float(w), world.scaling) for i, w in enumerate(world.weights)]
        restored = merged(SHE_LORA.restored(layout, _aggregated(layout, traffic, members), contexts[0]))
        self._held = [cut_to_rank([restored], m.rank, m.scaling, world.obfuscation) for m in self._models]
        return self._outcome(traffic)

    def _context(self, model: Model, number: int, plan: Plan) -> AgentContext:
        return AgentContext(
            model=model,
            obfuscation=self._world.obfuscation,
            encryptor=Encryptor(self._key),
            decryptor=Decryptor(self._key),
            plan=plan,
            encrypted_tiers=1,
            round_number=number,
        )
