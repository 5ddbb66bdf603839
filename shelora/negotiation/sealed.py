"""The default negotiation: votes are added up under encryption, and agents rank the sums.

The coordinator learns how many columns of each matrix lie in each tier, and aggregation ciphertexts only.
"""

from collections.abc import Mapping, Sequence

from shelora.lora.layout import Matrix
from shelora.lora.shards import Float32, Float64
from shelora.negotiation.plan import Plan, make_plan
from shelora.negotiation.protocol import Stake
from shelora.negotiation.votes import cast_votes


class Sealed:
    """The protocol `sealed` for one vote."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self._matrices = tuple(matrices)

    def cast(self, scores: Mapping[str, Float64], stake: Stake) -> dict[str, Float32]:
        """Tensors to encrypt, of sum weight over largest weight: within the bound that everyone's vote has."""
        return cast_votes(self._matrices, scores, stake.weight / stake.largest)

    def plan(self, outcome: Mapping[str, Float64], tiers: Sequence[float]) -> Plan:
        """The ranking of the decrypted sums."""
        return make_plan(outcome, self._matrices, tiers)
