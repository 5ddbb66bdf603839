"""Names of everything the coordinator keeps in Redis."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """Builds every key and channel. Braces put a federation's keys in one slot of a cluster, for scripts."""

    prefix: str = "shelora:coordinator"

    @property
    def index(self) -> str:
        """Sorted set of federations by the time their record expires."""
        return f"{self.prefix}:federations"

    @property
    def every_change(self) -> str:
        """Pattern that matches the channel of every federation."""
        return f"{self.prefix}:*:changes"

    def federation(self, federation_id: str) -> str:
        """Hash of revision, state and data."""
        return f"{self._base(federation_id)}:federation"

    def members(self, federation_id: str) -> str:
        """Hash from client to MemberRecord."""
        return f"{self._base(federation_id)}:members"

    def shapes(self, federation_id: str) -> str:
        """Hash from client to Model, until the first round."""
        return f"{self._base(federation_id)}:shapes"

    def sessions(self, federation_id: str) -> str:
        """Hash from client to the process of it that takes part."""
        return f"{self._base(federation_id)}:sessions"

    def copies(self, federation_id: str) -> str:
        """Hash from client to the time at which another process of it was last refused, Unix milliseconds."""
        return f"{self._base(federation_id)}:copies"

    def applicants(self, federation_id: str) -> str:
        """Hash from client to the Sighting that says why it could not join."""
        return f"{self._base(federation_id)}:applicants"

    def sighting(self, federation_id: str, client_id: str) -> str:
        """Sighting, with a short expiry."""
        return f"{self._base(federation_id)}:seen:{client_id}"

    def lease(self, federation_id: str) -> str:
        """Token of the driver that drives the federation."""
        return f"{self._base(federation_id)}:lease"

    def changes(self, federation_id: str) -> str:
        """Channel: a client's name if only that client is concerned, "" for everyone."""
        return f"{self._base(federation_id)}:changes"

    def federation_of_channel(self, channel: str) -> str:
        """The federation that a channel belongs to."""
        return channel.removeprefix(f"{self.prefix}:{{").removesuffix("}:changes")

    def round(self, federation_id: str, instance: str, sequence: int) -> str:
        """Hash of revision, state and data."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:round"

    def commits(self, federation_id: str, instance: str, sequence: int) -> str:
        """Hash from client to "ordinal manifest-digest UpdateRecord"."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:commits"

    def refusals(self, federation_id: str, instance: str, sequence: int) -> str:
        """Hash from client to Dropped: updates refused at their commit, the newest of each client."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:refusals"

    def objections(self, federation_id: str, instance: str, sequence: int) -> str:
        """Hash from client to Dropped: whom the round's result serves badly, and why."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:objections"

    def plan_objections(self, federation_id: str, instance: str, plan_number: int) -> str:
        """Hash from client to Dropped: who rejects a plan, and why."""
        return f"{self._base(federation_id)}:{instance}:plan:{plan_number}:objections"

    def ballots(self, federation_id: str, instance: str, sequence: int) -> str:
        """Hash from client to its encoded ballot, until the vote is over."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:ballots"

    def statements(self, federation_id: str, instance: str, sequence: int, kind: str) -> str:
        """Hash from client to what it stated to or as the committee of a round, until the round is over."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:committee:{kind}"

    def orders(self, federation_id: str, instance: str, sequence: int) -> str:
        """Hash of the committees that clients work out: names by digest."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:committee:orders"

    def dealings(self, federation_id: str, instance: str, sequence: int) -> str:
        """Hash from client to the Dealing of its update, without the shares, until the round is over."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:committee:dealings"

    def shares(self, federation_id: str, instance: str, sequence: int, place: int) -> str:
        """Hash from client to the share sealed to the member of that place, until the round is over."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:committee:shares:{place}"

    def opening(self, federation_id: str, sha256: str) -> str:
        """Serialized Opening of that digest."""
        return f"{self._base(federation_id)}:opening:{sha256}"

    def shards(self, federation_id: str, instance: str, sequence: int, generation: int) -> str:
        """Hash from shard index to ShardResult; another generation for another set of contributors."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:shards:{generation}"

    def evaluations(self, federation_id: str, instance: str, sequence: int) -> str:
        """Hash from client to EvaluationRecord."""
        return f"{self._base(federation_id)}:{instance}:{sequence}:evaluations"

    def layout(self, federation_id: str, digest: str) -> str:
        """LayoutRecord of that digest."""
        return f"{self._base(federation_id)}:layout:{digest}"

    def plan(self, federation_id: str, sha256: str) -> str:
        """Sealed plan of that digest."""
        return f"{self._base(federation_id)}:plan:{sha256}"

    def _base(self, federation_id: str) -> str:
        return f"{self.prefix}:{{{federation_id}}}"
