"""What this client measured of each result, and what the results' sums told of all, on disk: for people and programs.

    {"format": 1, "results": {"<round>": {
        "number": 3,
        "own": {"count": 128, "correct": 119, "loss": 0.21, "figures": {"macro_f1": 0.9}},
        "means": {"accuracy": 0.91, "loss": 0.24, "train_loss": 0.35},
        "told_in": "<digest>"}}}

`own` is this client's evaluation of the result; absent if it made none. `means` are over the clients whose updates are
in the result's sum, where sums hold such figures (`shelora.lora.figures`): accuracy and loss of the result that the
round began from, and the training loss of the round; null for what is not told. `told_in` names the sum that this
client put its figures of that result into (`Attempt.variant`): they go into no other.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from client_agent.learning import Evaluation
from shelora import files
from shelora.lora.figures import NOTHING, Figures

FILE: Final = "figures.json"
_FORMAT: Final = 1
_MOST: Final = 1000
"""Results that are kept, the newest."""
_OWN: Final = ("count", "correct", "loss", "figures")


class Measured:
    """The file in a state folder; also for programs that read it while an agent runs."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def note_own(self, round_id: str, number: int, measured: Evaluation) -> None:
        """Keeps this client's evaluation of a result."""
        fields = asdict(measured)
        self._note(round_id, {"number": number, "own": {name: fields[name] for name in _OWN}})

    def note_means(self, round_id: str, number: int, means: Figures) -> None:
        """Keeps what a result's sum told."""
        self._note(round_id, {"number": number, "means": asdict(means)})

    def once(self, base: str, variant: str, figures: Figures) -> Figures:
        """What this client tells in the sum of a round that begins from that result: nothing if it did in another.

        A round may be tried again, or taken back and repeated, without one of its clients. The means with and without
        that client would be its own figures. So would those of a training that begins from the same weights.

        Args: variant: What the update's one set is named by (`Attempt.variant`). Attempts that share it open one sum
            between them; a round's name is whatever a server says, and two sums may bear the same.
        """
        if self._of(base).get("told_in", variant) != variant:
            return NOTHING
        self._note(base, {"told_in": variant})
        return figures

    def means(self, round_id: str) -> Figures | None:
        """What a result's sum told; None if it told nothing, or that cannot be read any more."""
        try:
            found = self._of(round_id)["means"]
            means = Figures(
                **{name: None if value is None else float(value) for name, value in found.items()}
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        told = [value for value in asdict(means).values() if value is not None]
        return means if all(map(math.isfinite, told)) else None

    def results(self) -> dict[str, Any]:
        """By round, the newest last; empty if nothing is kept, or nothing that can be read."""
        try:
            results = json.loads(self._path.read_bytes())["results"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return {}
        return results if isinstance(results, dict) else {}

    def newest(self) -> Mapping[str, Any] | None:
        """The evaluation of the newest result that this client evaluated; None if there is none."""
        own = [one["own"] for one in self.results().values() if isinstance(one, dict) and "own" in one]
        return own[-1] if own else None

    def _of(self, round_id: str) -> dict[str, Any]:
        found = self.results().get(round_id)
        return found if isinstance(found, dict) else {}

    def _note(self, round_id: str, fields: Mapping[str, Any]) -> None:
        results, known = self.results(), self._of(round_id)
        results.pop(round_id, None)
        results[round_id] = {**known, **fields}
        newest = dict(list(results.items())[-_MOST:])
        files.replace(self._path, json.dumps({"format": _FORMAT, "results": newest}, indent=1).encode())
