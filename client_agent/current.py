"""Which state the model holds, and which of those on disk belong to it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from client_agent.learning import Weights
from client_agent.model import AdaptedModel
from client_agent.state import AgentState
from shelora.obfuscation import Obfuscation
from shelora.rounds import federation_of

_INITIAL: Final = "initial/"
"""The state in which every agent starts is named by this and the epoch's key, others by the round they result from."""
_OBJECTION: Final = "objection"
_LEFT_OUT_SINCE: Final = "tensors_left_out_since"


class CurrentState:
    """The model's states by the round they result from. Not thread-safe.

    Args:
        model: What is loaded.
        state: Where the last applied and the last trained weights are kept.
        identity: What kept weights must agree in with this model to be loaded.
    """

    def __init__(self, model: AdaptedModel, state: AgentState, identity: Mapping[str, str]) -> None:
        self._model = model
        self._state = state
        self._identity = dict(identity)
        self.round_id: str | None = None
        """The round that the model's weights result from; None if that is not known yet."""
        self.objection = ""
        """Why they serve this client badly, in words; "" if they do not."""
        self.left_out_since = 0
        """The first training round whose result's tensors were left out, and all since; 0 for none."""

    def key(self) -> dict[str, str]:
        """What saved weights must agree in to stand for the present state, or to be trained from it."""
        return self._key(self.round_id or "")

    def holds(self, round_id: str) -> bool:
        """Makes that round's result current if it was applied before, also before a restart; says whether it was."""
        if self.round_id == round_id or self._load(self._state.applied(), round_id):
            return True
        if not self._load(self._state.applied_before(), round_id):
            return False
        self._state.take_back()
        return True

    def _reloaded(self) -> bool:
        """What the disk holds, after it refused a newer result."""
        saved = self._state.applied()
        return saved is not None and self.holds(saved[0].get("round", ""))

    def _load(self, saved: tuple[dict[str, str], Weights] | None, round_id: str) -> bool:
        if saved is None or not self._key(round_id).items() <= saved[0].items():
            return False
        self._model.load(saved[1])
        self.round_id, self.objection = round_id, saved[0].get(_OBJECTION, "")
        self.left_out_since = int(saved[0].get(_LEFT_OUT_SINCE, "0"))
        return True

    def start(self, key_id: bytes, values: Obfuscation) -> None:
        """Makes the initial state current; a result that was applied before has been taken back.

        Args: key_id: of the epoch; values: what initial factors follow from.
        """
        initial = _INITIAL + key_id.hex()
        if self.round_id != initial:
            self._state.forget_applied()
            self._model.initialise(values)
            self.round_id, self.objection, self.left_out_since = initial, "", 0

    def resume(self, round_id: str) -> bool:
        """Makes the last applied result current, if it is of that round's federation; says whether there is one.

        A federation that was deleted may have had the same name.
        """
        if self.round_id is not None and not self.round_id.startswith(_INITIAL):
            return True
        saved = self._state.applied()
        last = saved[0].get("round", "") if saved else ""
        return federation_of(last) == federation_of(round_id) and self.holds(last)

    def applied(self, round_id: str, weights: Weights, objection: str = "", left_out_since: int = 0) -> None:
        """Keeps the result of a round, which the model holds now, what speaks against it, and what it lacks."""
        self.round_id = None  # if the disk refuses it, what is there is loaded anew
        kept = {_OBJECTION: objection, _LEFT_OUT_SINCE: str(left_out_since)}
        self._state.save_applied(self._key(round_id) | kept, weights)
        self.round_id, self.objection, self.left_out_since = round_id, objection, left_out_since

    def trained_here(self) -> tuple[dict[str, str], Weights] | None:
        """What was trained from the state that this client holds, and how; None if it trained nothing from there."""
        if self.round_id is None and not self._reloaded():
            return None
        trained = self._state.trained()
        if trained is None or not self.key().items() <= trained[0].items():
            return None
        return trained

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the model's weights at its end, whatever changed them meanwhile."""
        round_id, self.round_id = self.round_id, None
        before = self._model.weights()
        try:
            yield
        finally:
            self._model.load(before)
            self.round_id = round_id

    def _key(self, round_id: str) -> dict[str, str]:
        return {"round": round_id, **self._identity}
