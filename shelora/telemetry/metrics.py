"""Prometheus metrics: names by convention, labels from closed vocabularies, series that start at zero."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import prometheus_client
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from shelora.errors import DomainError, Reason

PREFIX: Final = "shelora_"

LATENCY_BUCKETS_S: Final = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)
"""From a call answered from memory to the upload of a shard over a phone's uplink."""

Labels = Mapping[str, Sequence[str]]
"""Label names and all values each can have."""

_Metric = TypeVar("_Metric", bound=MetricWrapperBase)
_UNIT_NAME: Final = re.compile(r"[a-z][a-z0-9_]*_(seconds|bytes|ratio|count|nats)")
_COUNTER_NAME: Final = re.compile(r"[a-z][a-z0-9_]*_total")


@dataclass(frozen=True)
class MetricsServer:
    """A running HTTP endpoint for scrapes."""

    port: int
    stop: Callable[[], None]
    """Closes the endpoint and waits for its thread."""


def start_metrics_server(
    port: int, host: str = "127.0.0.1", registry: CollectorRegistry = REGISTRY
) -> MetricsServer:
    """Serves the metrics of this process at http://host:port/metrics from a thread.

    Args:
        port: TCP port; 0 picks a free one, see `MetricsServer.port`.
        host: Address to listen on.
        registry: Metrics to serve.

    Raises: DomainError CONFIGURATION_INVALID if the port cannot be listened on.
    """
    try:
        server, thread = prometheus_client.start_http_server(port, addr=host, registry=registry)
    except (OSError, UnicodeError) as error:  # a name that no host can have is none of the system's errors
        why = error.strerror if isinstance(error, OSError) else "no host can have this name"
        raise DomainError(
            Reason.CONFIGURATION_INVALID, f"metrics cannot be served on {host}:{port}: {why}"
        ) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return MetricsServer(server.server_port, stop)


def counter(
    name: str, description: str, labels: Labels | None = None, registry: CollectorRegistry = REGISTRY
) -> Counter:
    """A counter `shelora_<name>`, all of whose series exist from the start.

    Raises: ValueError if the name does not end in `_total`.
    """
    _check_name(_COUNTER_NAME, name)
    return _at_zero(Counter(PREFIX + name, description, list(labels or {}), registry=registry), labels)


def histogram(
    name: str,
    description: str,
    labels: Labels | None = None,
    buckets: Sequence[float] = LATENCY_BUCKETS_S,
    registry: CollectorRegistry = REGISTRY,
) -> Histogram:
    """A histogram `shelora_<name>`, all of whose series exist from the start.

    Raises: ValueError if the name does not end in its unit: `_seconds`, `_bytes`, `_ratio`, `_count` or `_nats`.
    """
    _check_name(_UNIT_NAME, name)
    metric = Histogram(PREFIX + name, description, list(labels or {}), registry=registry, buckets=buckets)
    return _at_zero(metric, labels)


def gauge(
    name: str, description: str, labels: Labels | None = None, registry: CollectorRegistry = REGISTRY
) -> Gauge:
    """A gauge `shelora_<name>`, all of whose series exist, at zero, from the start.

    Raises: ValueError if the name does not end in its unit: `_seconds`, `_bytes`, `_ratio`, `_count` or `_nats`.
    """
    _check_name(_UNIT_NAME, name)
    return _at_zero(Gauge(PREFIX + name, description, list(labels or {}), registry=registry), labels)


def at_zero(metric: _Metric, labels: Labels) -> _Metric:
    """Makes every series of `labels` exist; for vocabularies known only when a server is put together."""
    for values in itertools.product(*labels.values()):
        metric.labels(**dict(zip(labels, values, strict=True)))
    return metric


def _at_zero(metric: _Metric, labels: Labels | None) -> _Metric:
    return at_zero(metric, labels) if labels else metric


def _check_name(pattern: re.Pattern[str], name: str) -> None:
    if not pattern.fullmatch(name):
        raise ValueError(f"metric name {name!r} does not match {pattern.pattern!r}")
