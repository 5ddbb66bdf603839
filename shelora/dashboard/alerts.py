"""What needs somebody, each with its first step: the alerts of deploy/observability that a page can tell by itself.

Names and first steps are those of alerts.yaml; a test compares them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shelora.dashboard.servers import Sample
from shelora.v1 import coordinator_pb2 as pb
from shelora.view import SILENT_MS

HOUR_MS: Final = 3_600_000

FIRST_STEPS: Final = {
    "SheloraServerDown": "Look at its last log lines: exit code 2 is a refused configuration, which names the remedy; "
    "otherwise start it again, no state is lost.",
    "SheloraCertificateExpires": "Its log says why (renewal_failed): bring the key authority back, or correct the "
    "machine's clock; an expired one is enrolled anew.",
    "SheloraOpenFiles": "Raise the process's limit of open files (LimitNOFILE, ulimit -n) to 65536 or more, or add a "
    "replica.",
    "SheloraRedisFull": "Raise maxmemory, and the memory of its machine or container to more than twice that, as a "
    "rewrite of its file may double it; full, Redis refuses writes and uploads wait until rounds end.",
    "SheloraShardQueueLong": "Add aggregation replicas, or workers where CPUs are idle; lower the coordinator's "
    "aggregate_concurrency if rounds are not urgent.",
    "SheloraRoundsAbandoned": "TOO_FEW_UPDATES: look at silent and slow agents, then at deadline_s and min_updates; "
    "other reasons are explained in docs/operations.md, 'A round is abandoned'.",
    "SheloraMembersSilent": "If all of them at once: the network or load balancer before the coordinator. If some: "
    "their machines, their logs, `client-agent check`.",
    "SheloraUpdatesRefused": "`shelora federation show NAME` names whose and why; NORM_*: a diverging or hostile "
    "agent, lower its learning rate or revoke it.",
}
"""By alert: the runbook's first step."""


@dataclass(frozen=True)
class Alert:
    """One thing that needs somebody."""

    name: str
    what: str

    @property
    def first_step(self) -> str:
        """What to do first."""
        return FIRST_STEPS[self.name]


def server_alerts(samples: Mapping[str, Sample | None]) -> list[Alert]:
    """What metrics tell."""
    return [alert for name, sample in samples.items() for alert in _of_server(name, sample)]


def _of_server(name: str, sample: Sample | None) -> Iterator[Alert]:
    if sample is None:
        yield Alert("SheloraServerDown", f"{name} cannot be scraped")
        return
    expiry = sample.get("shelora_certificate_expiry_timestamp_seconds")
    if 0 < expiry < sample.at_s + 6 * 3600:
        yield Alert("SheloraCertificateExpires", f"the certificate of {name} was not renewed")
    if sample.get("process_open_fds") > 0.8 * sample.get("process_max_fds") > 0:
        yield Alert("SheloraOpenFiles", f"{name} is about to run out of connections")
    if sample.get("shelora_redis_used_bytes") > 0.8 * sample.get("shelora_redis_limit_bytes") > 0:
        yield Alert("SheloraRedisFull", f"{name} says that Redis uses more than 80% of its maxmemory")
    if sample.get("shelora_aggregation_queue_count") > 2 * sample.get("shelora_aggregation_workers_count"):
        yield Alert("SheloraShardQueueLong", f"shards wait for workers of {name}")


def federation_alerts(federations: Iterable[pb.Federation]) -> list[Alert]:
    """What the coordinator tells of running federations that were read with members and history."""
    return [a for f in federations if f.phase == pb.PHASE_RUNNING for a in _of_federation(f)]


def _of_federation(federation: pb.Federation) -> Iterator[Alert]:
    name = federation.federation_id
    silent = [m.client_id for m in federation.members if m.idle_ms > SILENT_MS]
    if len(silent) > len(federation.members) - len(silent):
        yield Alert(
            "SheloraMembersSilent", f"{name}: {len(silent)} of {len(federation.members)} members are silent"
        )
    recent = _recent(federation)
    lost = [
        r
        for r in recent
        if r.state == pb.ROUND_STATE_ABANDONED and r.reason not in {"CERTIFICATE_REVOKED", "EPOCH_RETIRED"}
    ]
    if len(lost) > 1:
        yield Alert(
            "SheloraRoundsAbandoned", f"{name}: {len(lost)} rounds led to no result, {lost[-1].reason}"
        )
    refused = sum(1 for r in recent for drop in r.dropped if not drop.gave_up)
    if refused > 3:
        yield Alert("SheloraUpdatesRefused", f"{name}: {refused} updates do not count")


def _recent(federation: pb.Federation) -> Sequence[pb.RoundSummary]:
    """Rounds that ended within the last hour, and the one in progress."""
    since = federation.now_unix_ms - HOUR_MS
    ended = [r for r in federation.history if r.ended_unix_ms > since]
    return [*ended, federation.current] if federation.HasField("current") else ended
