"""`selective` and, without secrets, `none`: products in column order, the budget's columns and tensors under CKKS."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shelora.errors import DomainError, Reason
from shelora.lora.layout import Layout, tiers_reaching
from shelora.lora.protect import protect
from shelora.lora.restore import Restored, restored_parts
from shelora.lora.shards import ResultShardContent, UpdateShardContent
from shelora.negotiation.plan import Plan, check_layout, column_orders
from shelora.strategies import plain, she_lora
from shelora.strategies.agents.port import Adapted, AgentContext, Update, check_model, require_layout
from shelora.strategies.port import Strategy, Terms


class ProductsAgent:
    """The secret half of the strategies whose updates are products."""

    def __init__(self, public: Strategy) -> None:
        self.name: Final = public.name
        self._public = public

    def check(self, layout: Layout, model: Adapted, terms: Terms, plan: Plan | None, budget: float) -> None:
        """As of `AgentStrategy`."""
        check_model(layout, model)
        require_layout(
            all(shard.kind == shard.usual_kind for shard in layout.shards),
            "it has shards of another strategy",
        )
        require_layout(
            all(t.bound == terms.tensor_bound for t in layout.tensors), "it has another bound of tensors"
        )
        require_layout(
            model.rank <= layout.max_rank,
            f"its largest rank is {layout.max_rank}, this client's is {model.rank}",
        )
        require_layout(
            (plan is None) == (not layout.tiers), "it has tiers without a plan, or a plan without tiers"
        )
        if plan is not None:
            check_layout(plan, layout.matrices)
        if self._public.needs_keys:
            if not layout.encrypt_tensors:
                raise DomainError(Reason.PROTECTION_REFUSED, "the round asks for whole tensors in the clear")
            tiers_reaching(layout.tiers, budget)
            require_layout(layout.parameters == terms.parameters, "it names another CKKS profile")
            if layout.clear_bits > terms.clear_bits:
                raise DomainError(
                    Reason.PROTECTION_REFUSED,
                    f"the round asks for clear parts in {layout.clear_bits} bits, and the federation promised "
                    f"{terms.clear_bits}",
                )

    def check_result(self, layout: Layout, model: Adapted) -> None:
        """As of `AgentStrategy`."""
        check_model(layout, model)

    def protect(self, layout: Layout, update: Update, context: AgentContext) -> Iterator[UpdateShardContent]:
        """As of `AgentStrategy`."""
        return protect(
            layout,
            update.factors,
            update.tensors,
            context.encrypted_tiers,
            self.orders(layout, context),
            context.encryptor,
        )

    def restored(
        self, layout: Layout, results: Iterable[ResultShardContent], context: AgentContext
    ) -> Iterator[Restored]:
        """As of `AgentStrategy`."""
        return restored_parts(layout, results, self.orders(layout, context), context.decryptor)

    def orders(self, layout: Layout, context: AgentContext) -> Mapping[str, NDArray[np.int64]]:
        """Column order by matrix; the true order only where nothing is secret."""
        obfuscation = context.obfuscation if self._public.needs_keys else None
        return column_orders(context.plan, layout.matrices, obfuscation)


SHE_LORA: Final = ProductsAgent(she_lora.STRATEGY)
PLAIN: Final = ProductsAgent(plain.STRATEGY)
