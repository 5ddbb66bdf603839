"""Names of every Redis key of the aggregation service."""

from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

PREFIX: Final = "shelora:aggregation:"

REPLICAS: Final = f"{PREFIX}replicas"
"""Sorted set: addresses of replicas by the time, Unix milliseconds, at which their announcement expires."""


@dataclass(frozen=True, slots=True)
class SharedKeys:
    """What workers that share a shard tell each other. All expire within minutes."""

    prefix: str

    @property
    def common(self) -> str:
        """String: what all parts need to know of the whole cohort."""
        return f"{self.prefix}common"

    def taken(self, part: int) -> str:
        """Mark that a worker makes this part, or has."""
        return f"{self.prefix}taken:{part}"

    def partial(self, part: int) -> str:
        """String: CPU seconds and the part's sum."""
        return f"{self.prefix}partial:{part}"

    def all(self, parts: int) -> list[str]:
        """All of them."""
        return [self.common, *(key(part) for part in range(parts) for key in (self.taken, self.partial))]


@dataclass(frozen=True, slots=True)
class RoundKeys:
    """The keys of one round. They share a hash tag: a Redis cluster keeps them together, and scripts can span them.

    Identifiers come from outside and are quoted: no two identifiers can give the same key.
    """

    round_id: str

    @property
    def round(self) -> str:
        """Hash: layout, layout_digest, format. While it exists the round accepts writes; all else expires with it.

        A round of some clients alone has `restricted`, and `rank:<client>` of each.
        """
        return f"{self._base}round"

    @property
    def closed(self) -> str:
        """Mark that the round was closed, so that a late call does not open it again; with a short expiry."""
        return f"{self._base}closed"

    @property
    def updates(self) -> str:
        """Set: every key that holds a part of an update, for deletion without a scan."""
        return f"{self._base}updates"

    @property
    def results(self) -> str:
        """Set: every key that holds a part of a result."""
        return f"{self._base}results"

    def client(self, client_id: str) -> str:
        """Hash: `complete:<shard>` is `<sha256>:<bytes>`, `partial:<shard>` is `<token>:<sha256>:<bytes>`.

        `norm:<shard>` is the squared norm of complete content; `sealed` is there once the update is.
        """
        return f"{self._base}client:{quote(client_id, safe='')}"

    def partial(self, client_id: str, shard: int) -> str:
        """String: the bytes received so far of an upload in progress."""
        return f"{self.partial_prefix(client_id)}{shard}"

    def partial_prefix(self, client_id: str) -> str:
        """Start of the names of a client's uploads in progress; the shard's index follows."""
        return f"{self._base}partial:{quote(client_id, safe='')}:"

    def update_prefix(self, client_id: str, shard: int) -> str:
        """Start of the names of a shard's checked contents; its SHA-256 in hex follows."""
        return f"{self._base}update:{quote(client_id, safe='')}:{shard}:"

    def update(self, client_id: str, shard: int, sha256: bytes) -> str:
        """String: a checked serialized UpdateShard. Content addressed: what was committed is what is read."""
        return self.update_prefix(client_id, shard) + sha256.hex()

    def result(self, shard: int) -> str:
        """Hash: wanted (the newest request), request, sha256, total_bytes, cpu_s (of what is stored)."""
        return f"{self._base}result:{shard}"

    def result_prefix(self, shard: int) -> str:
        """Start of the names of a shard's result contents; the SHA-256 in hex follows."""
        return f"{self._base}result:{shard}:"

    def result_bytes(self, shard: int, sha256: bytes) -> str:
        """String: a serialized ResultShard."""
        return self.result_prefix(shard) + sha256.hex()

    def shared(self, shard: int, request: bytes) -> "SharedKeys":
        """The keys of workers that share the shard of that request, by its digest."""
        return SharedKeys(f"{self._base}shared:{shard}:{request.hex()}:")

    @property
    def _base(self) -> str:
        return f"{PREFIX}{{{quote(self.round_id, safe='')}}}:"
