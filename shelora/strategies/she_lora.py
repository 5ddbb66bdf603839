"""`selective`: SHE-LoRA (arXiv 2505.21051). Each client encrypts its budget of columns of A, and all tensors.

B travels in the clear, and every client has the same key: docs/threat-model.md says what that gives away.
"""

from dataclasses import replace
from typing import Final

from shelora.lora.layout import CLEAR_BITS, Layout, build_layout
from shelora.strategies.port import RoundTerms, Shapes, Terms


class SheLora:
    """The public half."""

    name: Final = "selective"
    needs_keys: Final = True
    needs_plan: Final = True
    needs_committee: Final = False
    most_updates: Final = 0
    shows_factors: Final = True
    summary: Final = "every agent's budget encrypted"
    servers_see: Final = (
        "All of B, and the columns of A beyond each agent's budget, in secret order. The rest is encrypted with CKKS "
        "under a key that all agents of the federation share and servers never hold."
    )

    def encrypts(self, budget: float) -> str:
        """The share of columns."""
        return f"{budget:.0%}"

    def accepts(self, terms: Terms) -> None:
        """Any terms."""

    def layout(self, model: Shapes, terms: Terms, round_: RoundTerms) -> Layout:
        """Products under the plan's tiers, tensors whole; all columns clear without a plan."""
        return products_layout(model, terms, round_, encrypted=True)


def products_layout(model: Shapes, terms: Terms, round_: RoundTerms, *, encrypted: bool) -> Layout:
    """A layout of products and whole tensors, with or without encryption."""
    columns = round_.tier_columns or ((),) * len(model.matrices)
    return build_layout(
        parameters=terms.parameters,
        key_id=round_.key_id if encrypted and (round_.tiers or model.tensors) else b"",
        matrices=[replace(m, tier_columns=c) for m, c in zip(model.matrices, columns, strict=True)],
        tensors=[replace(t, bound=terms.tensor_bound) for t in model.tensors],
        tiers=round_.tiers,
        encrypt_tensors=encrypted,
        max_rank=round_.max_rank,
        max_directions=terms.max_directions,
        clear_bits=terms.clear_bits if encrypted else CLEAR_BITS[-1],
    )


STRATEGY: Final = SheLora()
