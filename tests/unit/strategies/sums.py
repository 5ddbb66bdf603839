"""A round of complete mode with real encryption and without its committee: the sum of the secrets is simply known."""

import numpy as np

from shelora.additive.parameters import INSECURE_TOY
from shelora.additive.sampler import Csprng
from shelora.additive.secret import SecretKey, SumOpener
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.codec import decode_result, encode_update, validate_update
from shelora.lora.figures import NOTHING
from shelora.lora.kind import Contribution
from shelora.lora.kinds import kind_of
from shelora.lora.restore import merged
from shelora.lora.sketches import Clipping
from shelora.strategies import complete
from shelora.strategies.agents.complete import CompleteAgent
from shelora.strategies.agents.port import AgentContext, OpenedSum, Summand, mean_noise
from shelora.strategies.port import RoundTerms

PUBLIC = complete.Complete(profile=INSECURE_TOY.name)
SECRET = CompleteAgent(PUBLIC)
CONTEXT = bytes(32)
MOST_WEIGHT = 256


class Round:
    """What clients send and what agents open, of clients with integer weights up to MOST_WEIGHT."""

    def __init__(
        self,
        clients,
        terms,
        obfuscation,
        *,
        number=1,
        most=8,
        largest_move=0.05,
        references=None,
        draws=None,
        figures=None,
    ):
        self.layout = PUBLIC.layout(
            clients[0].model, terms, RoundTerms(key_id=b"", max_rank=max(c.model.rank for c in clients))
        )
        self.clients, self.obfuscation, self.number, self.most = clients, obfuscation, number, most
        self.largest_move = largest_move
        self.references, self.draws = references or {}, draws or {}
        self.figures = figures or {}
        self.most_weight = 1 if terms.noise else MOST_WEIGHT
        self.clipping = Clipping()
        self.secrets, self.updates = [], []
        for client in clients:
            SECRET.check(self.layout, client.model, terms, None, 0.0)
            key = SecretKey.draw(INSECURE_TOY, Csprng.fresh())
            self.secrets.append(key.coefficients)
            encryption = key.encryption(CONTEXT, most, Csprng.fresh())
            context = self.context(
                client,
                summand=Summand(
                    encryption=encryption, share=client.weight / self.most_weight, most_contributors=most
                ),
            )
            self.updates.append(
                [encode_update(self.layout, c) for c in SECRET.protect(self.layout, client, context)]
            )
            for index, data in enumerate(self.updates[-1]):
                validate_update(self.layout, index, data)
                shard = self.layout.shard(index)
                assert len(data) <= kind_of(shard).largest_update_bytes(
                    self.layout, shard, self.layout.max_rank
                )

    def context(self, client, **fields):
        return AgentContext(
            model=client.model,
            obfuscation=self.obfuscation,
            round_number=self.number,
            largest_move=self.largest_move,
            clipping=self.clipping,
            reference=self.references.get(id(client)),
            figures=self.figures.get(id(client), NOTHING),
            **({"draws": self.draws[id(client)]} if id(client) in self.draws else {}),
            **fields,
        )

    def contents(self, chosen=None):
        chosen = range(len(self.clients)) if chosen is None else chosen
        members = [Contribution(str(i), 1.0) for i in chosen]
        results = [
            aggregate_shard(self.layout, index, members, lambda c, index=index: self.updates[int(c)][index])
            for index in range(len(self.layout.shards))
        ]
        return [decode_result(self.layout, index, data) for index, data in enumerate(results)]

    def opened(self, chosen=None, client=0):
        chosen = range(len(self.clients)) if chosen is None else chosen
        total = np.sum([self.secrets[i] for i in chosen], axis=0)
        weight = sum(self.clients[i].weight for i in chosen)
        shares = weight / self.most_weight
        return OpenedSum(
            opener=SumOpener(INSECURE_TOY, total, CONTEXT, len(chosen), self.most),
            shares=shares,
            noise=mean_noise(INSECURE_TOY, len(chosen), self.most, shares),
            contributors=len(chosen),
            own_share=self.clients[client].weight / weight if client in chosen else 0.0,
            most_contributors=self.most,
        )

    def parts(self, chosen=None, client=0):
        context = self.context(self.clients[client], opened=self.opened(chosen, client))
        return SECRET.restored(self.layout, self.contents(chosen), context)

    def restored(self, chosen=None, client=0):
        """All of it, and the context that it was restored with."""
        context = self.context(self.clients[client], opened=self.opened(chosen, client))
        return merged(SECRET.restored(self.layout, self.contents(chosen), context)), context
