"""Metrics of the aggregation service."""

from typing import Final

from shelora.errors import Reason
from shelora.telemetry.metrics import counter, gauge, histogram

REASONS: Final = tuple(reason.value for reason in Reason)
KINDS: Final = ("update_clear", "update_encrypted", "result")
"""What stored bytes are: of updates, those in ciphertexts and all others; of results, all."""

RECEIVED_BYTES: Final = counter("aggregation_received_bytes_total", "Bytes of updates received from clients.")
SENT_BYTES: Final = counter("aggregation_sent_bytes_total", "Bytes of results sent to clients.")
STORED_BYTES: Final = counter(
    "aggregation_stored_bytes_total",
    "Bytes of shards that became complete in the store, by what they are.",
    {"kind": KINDS},
)
REFUSALS: Final = counter(
    "aggregation_refusals_total", "Calls refused, by method and reason.", {"method": [], "reason": []}
)
SHARDS: Final = counter("aggregation_shards_total", "Shards aggregated by this replica.")
PARTS: Final = counter(
    "aggregation_parts_total",
    "Parts of shards that this replica's workers made for a worker that aggregates them.",
)
SHARD_SECONDS: Final = histogram(
    "aggregation_shard_seconds", "Time from a worker's receiving a shard to its answer, failures included."
)
SHARD_CPU: Final = counter(
    "aggregation_cpu_seconds_total", "CPU seconds that workers spent on aggregated shards."
)
QUEUED: Final = gauge("aggregation_queue_count", "Shards that wait for a worker.")
WORKERS: Final = gauge("aggregation_workers_count", "Worker processes that are ready or busy.")
REPLACED: Final = counter(
    "aggregation_workers_replaced_total", "Worker processes that died or took too long."
)
UPLOADS: Final = gauge("aggregation_uploads_count", "Uploads whose pieces are being received.")
