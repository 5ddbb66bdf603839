"""Adapters in an agent's state folder: that of the newest result, and the best one by this client's own test examples.

A result can be taken back until another one was made from it (docs/protocol.md). So the best adapter counts as settled
only then, and the one it replaced is kept beside it until then. A note in an adapter's folder says which result it is
of; folders are renamed as a whole, so whatever an agent dies of, both belong together.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from shelora import files
from shelora.rounds import federation_of

CARD: Final = "README.md"
"""Model card in an adapter's folder."""
ADAPTER: Final = "adapter"
BEST: Final = "adapter-best"
ORIGIN: Final = "origin.json"
"""Note in an adapter's folder: which result it is of, and of the best one how good that is."""
_FORMAT: Final = 1
_UNREADABLE: Final = (OSError, ValueError, TypeError, RecursionError)
"""What reading a damaged note may raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """The result that an adapter is of, and how good it is."""

    round_id: str
    number: int
    """Training round, from 1."""
    digest: str
    """Of the result, in hex; the next round's context names it (`shelora.committee.context`)."""
    loss: float
    """Mean loss on this client's own test examples, nats."""
    settled: bool
    """Whether the result cannot be taken back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest:
    """The result that a federation goes on from."""

    round_id: str
    """Of the result; for the common start, of the round that begins from it."""
    number: int
    """Training round; 0 for the common start."""
    start: str = ""
    """Digest in hex of the result that this one was made from; "" if it is not known."""


class Adapters:
    """The adapters of one client. Not thread-safe.

    Args: folder: The agent's state folder.
    """

    def __init__(self, folder: Path) -> None:
        self.newest, self.best = folder / ADAPTER, folder / BEST
        self._before = folder / f"{BEST}.before"
        for adapter in (self.newest, self.best):
            _recover(adapter)
        if self._before.is_dir() and not self.best.exists():
            self._before.rename(self.best)

    def save(self, round_id: str, write: Callable[[Path], None]) -> None:
        """Replaces the newest adapter by what is written into the folder that `write` is given: of a round's result."""
        draft = _draft_of(self.newest)
        write(draft)
        _note(draft, {"round_id": round_id})
        _install(draft, self.newest)

    def is_beside(self, round_id: str) -> bool:
        """Whether the newest adapter is known to be of a result of the same federation as that round."""
        return _noted(self.newest, round_id) is not None

    def replace_card(self, card: str) -> None:
        """Replaces the card of the newest adapter, if there is one."""
        if card and self.newest.is_dir():
            files.replace(self.newest / CARD, card.encode())

    def keep_if_best(self, ranked: Ranked) -> bool:
        """Keeps the newest adapter as the best one if its loss is smaller than that of the best of this federation.

        Returns: whether it is.
        """
        held = _ranked(self.best, ranked.round_id)
        if not ranked.loss < (held.loss if held else math.inf) or not self.newest.is_dir():  # NaN is not
            return False
        draft = _draft_of(self.best)
        shutil.copytree(self.newest, draft, dirs_exist_ok=True)
        _note(draft, asdict(ranked))
        shutil.rmtree(self._before, ignore_errors=True)
        if held and not ranked.settled and held.round_id != ranked.round_id:
            self.best.rename(self._before)
        _install(draft, self.best)
        return True

    def follow(self, newest: Newest) -> bool:
        """Settles the best adapter once another result was made from its own; gives it up if that was taken back.

        Then the best one is that from before. If there is none, the next one that is ranked takes its place. An adapter
        whose result may have been taken back while this client was away is given up, too.

        Returns: whether it was given up.
        """
        held = _ranked(self.best, newest.round_id)
        if held is None or held.round_id == newest.round_id:
            return False
        if held.number < newest.number and (held.settled or held.digest == newest.start):
            _note(self.best, asdict(replace(held, settled=True)))
            shutil.rmtree(self._before, ignore_errors=True)
            return False
        self._go_back(newest.round_id)
        return True

    def _go_back(self, round_id: str) -> None:
        if _ranked(self._before, round_id) is None:
            (self.best / ORIGIN).unlink()
            return
        shutil.rmtree(self.best)
        self._before.rename(self.best)
        files.sync_folder(self.best.parent)


def _note(adapter: Path, fields: Mapping[str, Any]) -> None:
    files.replace(adapter / ORIGIN, json.dumps({"format": _FORMAT, **fields}).encode())


def _noted(adapter: Path, round_id: str) -> dict[str, Any] | None:
    """What is noted of an adapter; None if nothing is that can be read, or it is of another federation than that round.

    Another federation may have had the same name; its rounds are named by its instance, too.
    """
    try:
        note: dict[str, Any] = json.loads((adapter / ORIGIN).read_bytes())
        ours = note.pop("format") == _FORMAT and federation_of(note["round_id"]) == federation_of(round_id)
    except (*_UNREADABLE, KeyError, AttributeError):
        return None
    return note if ours else None


def _ranked(adapter: Path, round_id: str) -> Ranked | None:
    """The same, of an adapter that is ranked."""
    note = _noted(adapter, round_id)
    try:
        typed = {name: kind((note or {})[name]) for name, kind in Ranked.__annotations__.items()}
        return Ranked(**typed) if note == typed else None
    except (*_UNREADABLE, KeyError):
        return None


def _draft_of(adapter: Path) -> Path:
    """An empty folder beside an adapter's."""
    draft = adapter.with_name(f"{adapter.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    return draft


def _install(draft: Path, adapter: Path) -> None:
    """Puts a finished draft in an adapter's place. After a death between the two renames, `_recover` repairs it."""
    old = adapter.with_name(f"{adapter.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    files.sync_tree(draft)
    if adapter.exists():
        adapter.rename(old)
    draft.rename(adapter)
    files.sync_folder(adapter.parent)
    shutil.rmtree(old, ignore_errors=True)


def _recover(adapter: Path) -> None:
    """Puts back what was taken away for a draft that did not come, and deletes the draft."""
    old = adapter.with_name(f"{adapter.name}.old")
    if old.is_dir() and not adapter.exists():
        old.rename(adapter)
    for left in (old, adapter.with_name(f"{adapter.name}.draft")):
        shutil.rmtree(left, ignore_errors=True)
