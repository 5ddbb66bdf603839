"""What an attacker on the servers' side holds: every command that Redis wrote to its append-only file.

Updates are deleted once their round has ended, but the file tells what was written. A `Tap` copies it while the
servers run, as whoever runs Redis can; `replayed` reads updates, results and layouts out of the copy, `beside` keeps
everything else: what clients told coordinator and committee, and what aggregation noted of their updates.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Self
from urllib.parse import unquote

from coordinator.keys import Keys
from services.aggregation.keys import PREFIX
from shelora.lora.layout import Layout
from shelora.messages import layout_from_proto
from shelora.v1 import common_pb2

POLL_S: Final = 0.05
_FILES: Final = "appendonlydir/*.incr.aof"
_COORDINATOR: Final = Keys().prefix
_CONTENTS: Final = ("update:", "partial:", "result:", "shared:")
"""Places at aggregation of shards' bytes, which `replayed` reads."""


class Tap:
    """Copies the commands that Valkey appends to its files. A context manager."""

    def __init__(self, folder: Path) -> None:
        """Takes the folder of a Valkey server with `appendonly yes`."""
        self._folder = folder
        self._copies: dict[Path, bytearray] = {}
        self._files: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tap", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for file in self._files.values():
            file.close()

    def taken(self) -> bytes:
        """Everything so far, file by file in the order in which they appeared."""
        self._copy()
        return b"".join(bytes(copy) for copy in self._copies.values())

    def _follow(self) -> None:
        while not self._ended.wait(POLL_S):
            self._copy()

    def _copy(self) -> None:
        """Reads on in every file. One that was rewritten is deleted, and read to its end all the same: it is open."""
        with self._lock:
            for path in sorted(self._folder.glob(_FILES), key=_number):
                if path not in self._files:
                    self._files[path] = path.open("rb")
                    self._copies[path] = bytearray()
            for path, file in self._files.items():
                self._copies[path] += file.read()


def _number(path: Path) -> int:
    """Of a file that Redis names `<name>.aof.<number>.incr.aof`; a rewrite begins the next one."""
    return int(path.name.removesuffix(".incr.aof").rpartition(".")[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One shard of one client's update, as it was stored."""

    client: str
    shard: int
    content: bytes
    """Serialized UpdateShard."""


@dataclass(slots=True)
class Round:
    """What is known of one round."""

    layout: Layout
    updates: list[Update] = field(default_factory=list)
    results: dict[int, bytes] = field(default_factory=dict)
    """Serialized ResultShards by shard."""

    def clients(self) -> list[str]:
        """Who sent something, in order of their names."""
        return sorted({update.client for update in self.updates})

    def of(self, client: str) -> dict[int, bytes]:
        """A client's serialized shards."""
        return {update.shard: update.content for update in self.updates if update.client == client}

    @property
    def digest(self) -> str:
        """SHA-256 over all updates, in hex: which capture a figure comes from."""
        parts = sorted((u.client, u.shard, hashlib.sha256(u.content).hexdigest()) for u in self.updates)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def replayed(log: bytes, federation: str) -> list[Round]:
    """The rounds of a federation in order of their opening."""
    rounds: dict[str, Round] = {}
    strings: dict[str, bytes] = {}
    for command in commands(log):
        words = [command[0].upper(), *command[1:]]
        match words:
            case [b"HSET", key, *pairs] if _place(key, federation, "round"):
                values = dict(zip(pairs[::2], pairs[1::2], strict=True))
                if b"layout" in values:
                    layout = layout_from_proto(common_pb2.Layout.FromString(values[b"layout"]))
                    rounds.setdefault(_round(key), Round(layout))
            case [b"SET", key, value, *_]:
                strings[key.decode()] = value
                _keep(rounds, key, value, federation)
            case [b"APPEND", key, value]:
                strings[key.decode()] = strings.get(key.decode(), b"") + value
            case [b"RENAME", old, new]:
                content = strings.pop(old.decode(), b"")
                strings[new.decode()] = content
                _keep(rounds, new, content, federation)
            case [b"UNLINK" | b"DEL", *keys]:
                for key in keys:
                    strings.pop(key.decode(), None)
            case _:
                continue
    return list(rounds.values())


def beside(log: bytes, federation: str) -> bytes:
    """The commands of a federation that `replayed` does not read, as they were written."""
    return b"".join(
        written(words) for words in commands(log) if len(words) > 1 and _is_beside(words[1], federation)
    )


def _is_beside(key: bytes, federation: str) -> bool:
    if key.decode(errors="replace").startswith(f"{_COORDINATOR}:{{{federation}}}:"):
        return True
    place = _place(key, federation)
    return bool(place) and not place.startswith(_CONTENTS)


def written(words: Iterable[bytes]) -> bytes:
    """A command as Redis writes it (a RESP array of bulk strings)."""
    parts = [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(parts)


def _keep(rounds: dict[str, Round], key: bytes, content: bytes, federation: str) -> None:
    """Notes a shard whose bytes have become an update or a result."""
    place = _place(key, federation)
    found = rounds.get(_round(key)) if place else None
    if found is None:
        return
    match place.split(":"):
        case ["update", client, shard, _]:
            update = Update(client=unquote(client), shard=int(shard), content=content)
            found.updates = [u for u in found.updates if (u.client, u.shard) != (update.client, update.shard)]
            found.updates.append(update)
        case ["result", shard, _]:
            found.results[int(shard)] = content
        case _:
            return


def _round(key: bytes) -> str:
    """The round's identifier in a key of aggregation: `shelora:aggregation:{round}:...`."""
    return unquote(key.decode().removeprefix(PREFIX + "{").split("}", 1)[0])


def _place(key: bytes, federation: str, only: str = "") -> str:
    """What follows the round in a key of this federation, or "" if it is another key."""
    text = key.decode(errors="replace")
    if not text.startswith(f"{PREFIX}{{{federation}."):
        return ""
    place = text.split("}:", 1)[1]
    return place if not only or place == only else ""


def commands(log: bytes) -> Iterator[list[bytes]]:
    """The commands of an append-only file (RESP arrays of bulk strings); ends at the first cut one."""
    at = 0
    while at < len(log):
        end = log.find(b"\r\n", at)
        if log[at : at + 1] == b"#" and end > 0:  # a remark: a time
            at = end + 2
            continue
        if log[at : at + 1] != b"*" or end < 0:
            return
        count, at, words = int(log[at + 1 : end]), end + 2, []
        for _ in range(count):
            end = log.find(b"\r\n", at)
            if end < 0:
                return
            size = int(log[at + 1 : end])
            words.append(log[end + 2 : end + 2 + size])
            at = end + 2 + size + 2
        if at > len(log):
            return
        yield words
