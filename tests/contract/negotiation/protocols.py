"""All protocols, run from scores to a plan through everything that happens to votes in between."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from shelora.ckks.parameters import INSECURE_TOY
from shelora.ckks.secret import Decryptor, Encryptor, SecretKey
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.codec import decode_result, encode_update, validate_update
from shelora.lora.kind import Contribution
from shelora.lora.layout import Matrix
from shelora.lora.protect import protect
from shelora.lora.restore import restore
from shelora.negotiation.ballots import Ballot, Tally
from shelora.negotiation.ope import Ope
from shelora.negotiation.plan import Plan, check_plan, open_plan, plan_context, seal_plan
from shelora.negotiation.protocol import Stake
from shelora.negotiation.ranking import Ranking, tier_ends, total_columns
from shelora.negotiation.sealed import Sealed
from shelora.negotiation.votes import summed_scores, vote_layout
from shelora.obfuscation import Obfuscation

MATRICES = (Matrix("layer.0.query", 8, 24), Matrix("layer.0.value", 8, 16))
COLUMNS = total_columns(MATRICES)
KEY = SecretKey.generate(INSECURE_TOY)
CONTEXT = plan_context("fed", 1)


@dataclass(frozen=True)
class Client:
    scores: Mapping[str, np.ndarray]
    stake: Stake = field(default_factory=Stake)


@dataclass(frozen=True)
class Negotiated:
    plans: list[Plan]
    """By client."""
    seen: list[bytes]
    """Everything that passed a server."""


def split(joined: np.ndarray) -> dict[str, np.ndarray]:
    parts = np.split(np.asarray(joined, dtype=np.float64), [MATRICES[0].in_features])
    return {m.name: part for m, part in zip(MATRICES, parts, strict=True)}


def joined(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([scores[m.name] for m in MATRICES])


def sealed(clients: Sequence[Client], tiers: Sequence[float], secret: bytes = bytes(32)) -> Negotiated:
    key = Obfuscation(secret, 1).plan_key()
    negotiators = [Sealed(MATRICES) for _ in clients]
    layout = vote_layout(MATRICES, KEY.parameters.name, KEY.key_id)
    updates = []
    for negotiator, client in zip(negotiators, clients, strict=True):
        vote = negotiator.cast(client.scores, client.stake)
        updates.append([encode_update(layout, c) for c in protect(layout, {}, vote, 0, {}, Encryptor(KEY))])
        for index, data in enumerate(updates[-1]):
            validate_update(layout, index, data)
    members = [Contribution(str(i), 1 / len(clients), 1.0) for i in range(len(clients))]
    results = [
        aggregate_shard(layout, index, members, lambda c, i=index: updates[int(c)][i])
        for index in range(len(layout.shards))
    ]
    contents = [decode_result(layout, index, data) for index, data in enumerate(results)]
    sums = summed_scores(MATRICES, restore(layout, contents, {}, Decryptor(KEY)).tensors)
    published = seal_plan(negotiators[0].plan(sums, tiers), key, CONTEXT)
    plans = [open_plan(published, key, CONTEXT) for _ in clients]
    for plan in plans:
        check_plan(plan, sums, MATRICES, tiers)
    return Negotiated(plans, [*(data for update in updates for data in update), *results, published])


def by_ballots(
    clients: Sequence[Client], tiers: Sequence[float], secret: bytes = bytes(32), *, refine: bool
) -> Negotiated:
    negotiators = [Ope(MATRICES, Obfuscation(secret, 1), "fed.1") for _ in clients]
    sent = [
        n.cast(client.scores, client.stake).encode() for n, client in zip(negotiators, clients, strict=True)
    ]
    tally = Tally([m.in_features for m in MATRICES])
    for data, client in zip(sent, clients, strict=True):
        tally.add(Ballot.decode(data, COLUMNS, tier_ends([client.stake.budget], COLUMNS)[0]))
    published = tally.rank(tiers, refine=refine).encode()
    return Negotiated([n.plan(Ranking.decode(published), tiers) for n in negotiators], [*sent, published])


PROTOCOLS = {
    "sealed": sealed,
    "ope": partial(by_ballots, refine=False),
    "ope-refined": partial(by_ballots, refine=True),
}
