import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from shelora.errors import DomainError, Reason
from shelora.telemetry.metrics import counter, gauge, histogram, start_metrics_server


@pytest.fixture
def registry():
    return CollectorRegistry()


def samples(registry):
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_every_series_of_a_counter_starts_at_zero(registry):
    counter("tests_total", "Tests.", {"kind": ["unit", "e2e"], "result": ["passed"]}, registry)
    shown = samples(registry)
    assert 'shelora_tests_total{kind="unit",result="passed"} 0.0' in shown
    assert 'shelora_tests_total{kind="e2e",result="passed"} 0.0' in shown


def test_gauges_and_histograms_start_at_zero_too(registry):
    gauge("queue_count", "Queue.", {"name": ["a"]}, registry)
    histogram("wait_seconds", "Wait.", registry=registry)
    shown = samples(registry)
    assert 'shelora_queue_count{name="a"} 0.0' in shown
    assert "shelora_wait_seconds_count 0.0" in shown


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (counter, "tests"),
        (counter, "Tests_total"),
        (gauge, "queue"),
        (histogram, "wait_ms"),
        (histogram, "_seconds"),
    ],
)
def test_a_name_without_its_unit_is_refused(make, name, registry):
    with pytest.raises(ValueError, match=name):
        make(name, "", registry=registry)


def test_metrics_are_served_on_a_free_port_until_stopped(registry):
    counter("tests_total", "Tests.", registry=registry).inc()
    server = start_metrics_server(0, registry=registry)
    url = f"http://127.0.0.1:{server.port}/metrics"
    with urllib.request.urlopen(url) as response:
        assert b"shelora_tests_total 1.0" in response.read()
    server.stop()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url)


@pytest.mark.parametrize(
    "host", ["a" * 300, "ü" * 80, ".", "\ud800", "999.1.1.1", "[::1]", "127.0.0.1:80", ""]
)
def test_a_host_that_cannot_be_is_a_refused_configuration(host):
    """The resolver raises UnicodeError, which is no OSError, for what no name can be."""
    with pytest.raises(DomainError, match="metrics cannot be served on") as caught:
        start_metrics_server(0, host)
    assert caught.value.reason is Reason.CONFIGURATION_INVALID


def test_a_port_in_use_is_a_refused_configuration():
    server = start_metrics_server(0)
    with pytest.raises(DomainError, match=str(server.port)) as caught:
        start_metrics_server(server.port)
    server.stop()
    assert caught.value.reason is Reason.CONFIGURATION_INVALID
