"""The example strategy, secret half."""

from collections.abc import Iterable, Iterator

import numpy as np

from shelora.lora.layout import Layout
from shelora.lora.protect import protect
from shelora.lora.restore import Restored, restored_parts
from shelora.lora.shards import FactoredUpdate, ResultShardContent, UpdateShardContent
from shelora.negotiation.plan import Plan
from shelora.strategies.agents.port import Adapted, AgentContext, Update, require_layout
from shelora.strategies.port import RoundTerms, Terms
from tests.unit.strategies import frozen_a


class FrozenA:
    name = frozen_a.STRATEGY.name

    def check(self, layout: Layout, model: Adapted, terms: Terms, plan: Plan | None, budget: float) -> None:
        round_ = RoundTerms(key_id=layout.key_id, max_rank=layout.max_rank)
        expected = frozen_a.STRATEGY.layout(model, terms, round_)
        require_layout(layout.digest == expected.digest, "it is not that of this model's B")

    def check_result(self, layout: Layout, model: Adapted) -> None:
        names = [f"{m.name}/B" for m in model.matrices] + [t.name for t in model.tensors]
        require_layout([t.name for t in layout.tensors] == names, "it is of another model")

    def protect(self, layout: Layout, update: Update, context: AgentContext) -> Iterator[UpdateShardContent]:
        padding = layout.max_rank - context.model.rank
        padded = {
            f"{name}/B": np.pad(context.model.scaling * f.B, ((0, 0), (0, padding))).astype(np.float32)
            for name, f in update.factors.items()
        }
        return protect(layout, {}, {**padded, **update.tensors}, 0, {}, context.encryptor)

    def restored(
        self, layout: Layout, results: Iterable[ResultShardContent], context: AgentContext
    ) -> Iterator[Restored]:
        columns = {f"{m.name}/B": m for m in context.model.matrices}
        for part in restored_parts(layout, results, {}, context.decryptor):
            for name, value in part.tensors.items():
                matrix = columns.get(name)
                if matrix is None:
                    yield Restored(tensors={name: value})
                    continue
                A = context.obfuscation.initial_A(matrix.name, layout.max_rank, matrix.in_features)
                Q, R = np.linalg.qr(value.astype(np.float64))
                yield Restored(matrices={matrix.name: FactoredUpdate(Q, R @ A)})


STRATEGY = FrozenA()
