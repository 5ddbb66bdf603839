"""An example strategy, public half: only B is trained and summed, under one frozen A that agents alone know.

Related: FFA-LoRA (Sun et al., ICLR 2024). With `frozen_a_agents` this is all that a new strategy takes.
"""

from dataclasses import dataclass

from shelora.lora.layout import Layout, Tensor, build_layout
from shelora.strategies.port import RoundTerms, Shapes, Terms


@dataclass(frozen=True)
class FrozenA:
    name: str = "frozen-a"
    needs_keys: bool = True
    needs_plan: bool = False
    needs_committee: bool = False
    most_updates: int = 0
    shows_factors: bool = False
    summary: str = "B encrypted, A frozen"
    servers_see: str = "Ciphertexts of B. A is the same for all and never travels."

    def encrypts(self, budget: float) -> str:
        return "everything"

    def accepts(self, terms: Terms) -> None:
        """Any terms."""

    def layout(self, model: Shapes, terms: Terms, round_: RoundTerms) -> Layout:
        """One whole tensor s B [out, max_rank] a matrix, beside the model's tensors."""
        shapes = [(f"{m.name}/B", (m.out_features, round_.max_rank)) for m in model.matrices]
        shapes += [(t.name, t.shape) for t in model.tensors]
        return build_layout(
            parameters=terms.parameters,
            key_id=round_.key_id,
            matrices=(),
            tensors=[Tensor(name, shape, terms.tensor_bound) for name, shape in shapes],
            tiers=(),
            encrypt_tensors=True,
            max_rank=round_.max_rank,
            max_directions=1,
        )


STRATEGY = FrozenA()
