"""What `shelora dashboard` is told on its command line."""

import pytest

from shelora.cli.page import metrics_addresses
from shelora.errors import DomainError


def test_metrics_addresses_are_named():
    found = metrics_addresses(["coordinator=10.0.0.5:9100", "aggregation=[::1]:9101"])
    assert found == {"coordinator": "10.0.0.5:9100", "aggregation": "[::1]:9101"}


@pytest.mark.parametrize(
    "text", ["10.0.0.5:9100", "=h:1", "coordinator=", "coordinator=h", "coordinator=h:0"]
)
def test_others_are_refused_with_the_form_to_write(text):
    with pytest.raises(DomainError, match=r"NAME=HOST:PORT|port"):
        metrics_addresses([text])
