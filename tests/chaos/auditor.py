"""Keeps a copy of every update that agents have ready, and holds what was published against these copies."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.aggregation import contributions
from coordinator.committees import context_of
from coordinator.decisions import contributors
from coordinator.records import Commit, FederationRecord, RoundRecord
from coordinator.store import Store
from shelora.committee.certificate import ContributorSet
from shelora.federation import ScreeningSpec
from shelora.lora.aggregate import aggregate_shard
from shelora.lora.kind import Contribution
from shelora.lora.layout import Layout
from shelora.rounds import RoundState


class Copies:
    """Shards by their SHA-256, taken from the agents' spools while the federation runs."""

    def __init__(self, folder: Path, states: Mapping[str, Path]) -> None:
        self._folder = folder
        self._states = states
        folder.mkdir(parents=True, exist_ok=True)

    def take(self) -> None:
        """Copies what is complete and not copied yet. An agent may delete it meanwhile; then it takes the next."""
        for state in self._states.values():
            for manifest in state.glob("spool/*/manifest.json"):
                try:
                    self._take(manifest)
                except (FileNotFoundError, ValueError, KeyError):
                    continue

    def _take(self, manifest: Path) -> None:
        for index, shard in enumerate(json.loads(manifest.read_bytes())["shards"]):
            copy = self._folder / shard["sha256"]
            if not copy.exists():
                data = (manifest.parent / f"{index:05d}.shard").read_bytes()
                if hashlib.sha256(data).hexdigest() == shard["sha256"]:
                    copy.write_bytes(data)

    def read(self, sha256: str) -> bytes | None:
        path = self._folder / sha256
        return path.read_bytes() if path.exists() else None

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class RoundAudit:
    """One round, as it stands in the coordinator's store."""

    record: RoundRecord
    commits: list[Commit]
    layout: Layout
    proposed: str = ""
    """Digest in hex of the set that its committee was asked to certify, as members note it; "" if there was none."""

    @property
    def published(self) -> bool:
        return self.record.round.state is RoundState.PUBLISHED

    @property
    def title(self) -> str:
        round_ = self.record.round
        return f"{round_.kind.lower()} {round_.number} attempt {round_.attempt} ({round_.round_id})"

    def miscount(self) -> str:
        """What is wrong with who was counted; "" if nothing is."""
        clients = [commit.update.client_id for commit in self.commits]
        counted = [name for name in clients if name not in self.record.dropped_ids]
        if len(set(clients)) != len(clients) or sorted(c.ordinal for c in self.commits) != list(
            range(1, len(clients) + 1)
        ):
            return f"{self.title}: a commit was counted twice: {clients}"
        if self.published and self.record.contributor_count != len(counted):
            return f"{self.title}: {self.record.contributor_count} counted, {len(counted)} committed"
        if (
            self.published
            and self.record.round.convenes
            and list(self.record.contributors) != sorted(counted)
        ):
            return f"{self.title}: {self.record.contributors} are certified, {counted} committed"
        if self.published and self.record.dropped:
            return f"{self.title}: committed updates were lost: {self.record.dropped}"
        return ""

    def sum_error(self, copies: Copies) -> str:
        """What is wrong with the published sum: it must be that of the committed updates, each once, to the bit."""
        commits = contributors(self.record, self.commits)
        for shard, published in enumerate(self.record.results):
            parts = contributions(self.record.round.kind, shard, commits, ScreeningSpec())
            found = {part.client_id: copies.read(part.sha256.hex()) for part in parts}
            missing = [name for name, data in found.items() if data is None]
            if missing:
                return f"{self.title}: no copy of shard {shard} of {missing}"
            wanted = aggregate_shard(
                self.layout,
                shard,
                [Contribution(p.client_id, p.weight, p.scaling) for p in parts],
                lambda name, found=found: found[name],
            )
            if hashlib.sha256(wanted).hexdigest() != published.sha256:
                return f"{self.title}: shard {shard} is not the sum of the committed updates"
        return ""


async def rounds_of(store: Store, federation: FederationRecord) -> list[RoundAudit]:
    """All rounds of a federation, as they stand."""
    found = []
    for sequence in range(1, federation.sequence + 1):
        stored = await store.rounds.read(federation, sequence)
        if stored is None:
            continue
        record = stored.record
        layout = await store.rounds.layout(federation.federation_id, record.layout_digest)
        commits = await store.updates.commits(federation, record.sequence)
        found.append(RoundAudit(record, commits, layout.layout(), _proposed(federation, record)))
    return found


def _proposed(federation: FederationRecord, record: RoundRecord) -> str:
    if not record.proposed:
        return ""
    return ContributorSet.read(context_of(federation, record), bytes.fromhex(record.proposed)).digest.hex()


def certified(state: Path) -> dict[int, str]:
    """What an agent has certified as a member of committees: digests of sets in hex, by draw."""
    file = state / "certified.json"
    noted = json.loads(file.read_bytes())["sets"] if file.exists() else {}
    return {int(place.rpartition("/")[2]): digest for place, digest in noted.items()}
