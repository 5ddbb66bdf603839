"""What sums have revealed about this client. The client counts them itself, so servers get no more than were planned.

A round's number is certified once (`shelora.committee`), so an update that was dealt under it, however often, is in one
opened sum at most. Each number counts from the moment that something is dealt under it, opened or not. Other
federations of the same name count, too: their sums are about the same client.
"""

import json
from pathlib import Path
from typing import Any, Final

from shelora import files
from shelora.accounting import epsilon_of
from shelora.configuration import invalid
from shelora.errors import DomainError, Reason
from shelora.federation import ClientPrivacySpec

LEDGER: Final = "sums.json"
_FORMAT: Final = 1
_ROUNDING: Final = 1 + 1e-9


class SumBudget:
    """The noise multipliers of the sums that this client has dealt updates for, in its state folder."""

    def __init__(self, folder: Path, promised: ClientPrivacySpec) -> None:
        """Args: promised: what the federation promises of all its sums."""
        self._path = folder / LEDGER
        self._promised = promised

    def spent(self) -> float:
        """Epsilon of all sums so far. Raises: as `take`."""
        return epsilon_of(self._read().values(), self._promised.delta)

    def require(self, instance: str, number: int) -> None:
        """Raises: PRIVACY_EXHAUSTED if the sum of that number would tell more than was promised; as `take`."""
        self._with(instance, number)

    def take(self, instance: str, number: int) -> None:
        """Counts the sum of that number, durably, before an update for it is dealt. Again, it costs nothing.

        Raises: PRIVACY_EXHAUSTED; CONFIGURATION_INVALID if the ledger cannot be read.
        """
        content = {"format": _FORMAT, "sums": self._with(instance, number)}
        files.replace(self._path, json.dumps(content, indent=1).encode())
        files.sync_folder(self._path.parent)

    def _with(self, instance: str, number: int) -> dict[str, float]:
        sums = self._read()
        sums[f"{instance}/{number}"] = self._promised.multiplier
        if epsilon_of(sums.values(), self._promised.delta) > self._promised.promised * _ROUNDING:
            raise DomainError(
                Reason.PRIVACY_EXHAUSTED,
                f"the budget of client privacy is spent: this client was in {len(sums) - 1} sums, and another one "
                "would tell more of it than the federation promised. Rounds that were lost after their updates were "
                "agreed on count: plan more sums for the next federation (protection.client_privacy.sums)",
            )
        return sums

    def _read(self) -> dict[str, float]:
        try:
            sums = _parsed(**json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise invalid(
                f"state_dir: {self._path} cannot be read, and it says what sums have told of this client: restore it "
                "from a backup; without it, a new budget can only begin for another client"
            ) from error
        return sums


def _parsed(format: int, sums: Any) -> dict[str, float]:  # noqa: A002, ANN401 - JSON
    """Noise multiplier by sum. Raises: ValueError, TypeError, AttributeError."""
    found = {str(name): float(multiplier) for name, multiplier in sums.items()}
    if format != _FORMAT or not all(0 < multiplier < float("inf") for multiplier in found.values()):
        raise ValueError(format)
    return found
