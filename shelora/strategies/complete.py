"""`complete`: nothing travels in the clear, and no key opens one client's update. Sums of sketches under fresh keys.

Matrices travel as sketches that add up whatever the ranks (`shelora.lora.sketches`), tensors whole; both under additive
encryption, whose sums a committee of the round's clients opens (`shelora.additive`, `shelora.committee`). Servers add.
What clients measured on their examples travels there, too, so that its means are known (`shelora.lora.figures`).
"""

from dataclasses import dataclass, replace
from typing import Final

from shelora.additive.parameters import DEFAULT, MAX_CONTRIBUTORS
from shelora.lora.layout import Layout, SumTerms
from shelora.lora.sketches import sketch_sizes
from shelora.lora.sums import build_sums_layout
from shelora.strategies.port import RoundTerms, Shapes, Terms


@dataclass(frozen=True, kw_only=True)
class Complete:
    """The public half. `profile`: the additive parameters."""

    profile: str = DEFAULT.name
    name: str = "complete"
    needs_keys: bool = True
    needs_plan: bool = False
    needs_committee: bool = True
    most_updates: int = MAX_CONTRIBUTORS
    shows_factors: bool = False
    summary: str = "only encrypted sums"
    servers_see: str = (
        "No part of an update: ciphertexts under fresh keys that nobody shares, and their sum. A committee of the "
        "round's agents opens the sum of one certified set, for agents only."
    )

    def encrypts(self, budget: float) -> str:
        """Everything, whatever the budget."""
        return "everything"

    def accepts(self, terms: Terms) -> None:
        """Any terms; those of CKKS and of plans mean nothing here."""

    def layout(self, model: Shapes, terms: Terms, round_: RoundTerms) -> Layout:
        """Sketches of matrices, of one size for all clients, and sums of tensors."""
        columns, rows = sketch_sizes(round_.max_rank)
        return build_sums_layout(
            parameters=terms.parameters,
            matrices=model.matrices,
            tensors=[replace(t, bound=terms.tensor_bound) for t in model.tensors],
            max_rank=round_.max_rank,
            terms=SumTerms(
                profile=self.profile,
                sketch_columns=columns,
                sketch_rows=rows,
                noise=terms.noise,
                figures=terms.mean_figures and terms.noise is None,
            ),
        )


STRATEGY: Final = Complete()
