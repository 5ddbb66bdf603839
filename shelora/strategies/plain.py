"""`none`: nothing is encrypted and nothing is secret. For comparison only."""

from typing import Final

from shelora.lora.layout import Layout
from shelora.strategies.port import RoundTerms, Shapes, Terms
from shelora.strategies.she_lora import products_layout


class Plain:
    """The public half."""

    name: Final = "none"
    needs_keys: Final = False
    needs_plan: Final = False
    needs_committee: Final = False
    most_updates: Final = 0
    shows_factors: Final = True
    summary: Final = "UNPROTECTED"
    servers_see: Final = "Everything: updates travel in the clear. For comparison only."

    def encrypts(self, budget: float) -> str:
        """Whatever the budget."""
        return "nothing"

    def accepts(self, terms: Terms) -> None:
        """Any terms."""

    def layout(self, model: Shapes, terms: Terms, round_: RoundTerms) -> Layout:
        """Products and tensors, all in the clear."""
        return products_layout(model, terms, round_, encrypted=False)


STRATEGY: Final = Plain()
